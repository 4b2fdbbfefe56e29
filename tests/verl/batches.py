"""Batches made on the spot, and a model of their vocabulary."""

from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from verl.protocol import DataProto
from verl.workers.actor import policy_loss
from verl.workers.config import ActorConfig, PolicyLossConfig
from verl.workers.update import Counts

VOCAB = 50
PROMPT = 5
RESPONSE = 9
ROWS = 16


def normal(seed: int) -> torch.Tensor:
    """Normally distributed numbers [ROWS, RESPONSE] in float64."""
    return torch.randn(
        ROWS, RESPONSE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def ragged_batch(dtype: torch.dtype) -> DataProto:
    """Ragged prompts and responses with observation spans: one step of the actor, two of the
    critic."""
    g = torch.Generator().manual_seed(1)
    prompt_lens = torch.randint(1, PROMPT + 1, (ROWS,), generator=g)
    response_lens = torch.randint(2, RESPONSE + 1, (ROWS,), generator=g)
    attention = torch.zeros(ROWS, PROMPT + RESPONSE, dtype=torch.long)
    mask = torch.zeros(ROWS, RESPONSE, dtype=torch.long)
    for row in range(ROWS):
        attention[row, PROMPT - prompt_lens[row] : PROMPT + response_lens[row]] = 1
        mask[row, : response_lens[row]] = 1
        mask[row, 1 : 1 + int(response_lens[row]) // 3] = 0
    real = {
        k: torch.randn(ROWS, RESPONSE, generator=g, dtype=dtype)
        for k in ("advantages", "noise", "ref_noise")
    }
    return DataProto.from_dict(
        {
            "prompts": torch.randint(0, VOCAB, (ROWS, PROMPT), generator=g),
            "responses": torch.randint(0, VOCAB, (ROWS, RESPONSE), generator=g),
            "attention_mask": attention,
            "response_mask": mask,
            "advantages": real["advantages"],
            "old_log_probs": -4 + 0.1 * real["noise"],
            "ref_log_prob": -4 + 0.1 * real["ref_noise"],
            "mini_batch": torch.zeros(ROWS, dtype=torch.long),
            "critic_mini_batch": torch.arange(ROWS) % 2,
        },
        meta_info={"num_mini_batches": {"mini_batch": 1, "critic_mini_batch": 2}},
    )


def policy_loss_of(
    old: torch.Tensor,
    new: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    loss_mode: str = "vanilla",
    weights: torch.Tensor | None = None,
    counts: Counts | None = None,
    **settings,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The policy's part of the actor's loss on bare tensors [B, R], and the metrics beside it.

    `settings` are those of the actor. Without `counts` these rows are the whole mini-batch.
    """
    columns = {"old_log_probs": old, "advantages": advantages, "response_mask": mask}
    if weights is not None:
        columns["rollout_is_weights"] = weights
    if counts is None:
        counts = Counts(int(mask.bool().sum()), int(mask.bool().any(-1).sum()))
    config = ActorConfig(policy_loss=PolicyLossConfig(loss_mode=loss_mode), **settings)
    nothing = torch.zeros_like(old)
    loss, metrics = policy_loss(config, new, nothing, DataProto.from_dict(columns), counts)
    del metrics["entropy"], metrics["pg_loss"]
    return loss, metrics


def make_model(path: Path) -> str:
    """Folder of a random Qwen2 with a tied head."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    Qwen2ForCausalLM(config).save_pretrained(path)
    return str(path)
