"""The gradient of a mini-batch depends on neither micro-batch size nor the number of ranks, nor on who holds what."""

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from tests.distributed import run_ranks
from verl.protocol import DataProto
from verl.single_controller.decorator import Dispatch, dispatch
from verl.single_controller.worker import Worker
from verl.workers.actor import policy_loss
from verl.workers.config import ActorConfig, FSDPConfig, ModelConfig
from verl.workers.fsdp_model import TrainState, build_model, forward_log_probs
from verl.workers.update import update_mini_batches

VOCAB, PROMPT, RESPONSE, ROWS = 50, 5, 9, 16
ACTOR = ActorConfig(use_kl_loss=True, kl_loss_coef=0.1, entropy_coeff=0.01)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(path)
    return str(path)


def make_batch(dtype: torch.dtype) -> DataProto:
    """Ragged prompts and responses with observation spans."""
    g = torch.Generator().manual_seed(1)
    prompt_lens = torch.randint(1, PROMPT + 1, (ROWS,), generator=g)
    response_lens = torch.randint(2, RESPONSE + 1, (ROWS,), generator=g)
    attention = torch.zeros(ROWS, PROMPT + RESPONSE, dtype=torch.long)
    mask = torch.zeros(ROWS, RESPONSE, dtype=torch.long)
    for row in range(ROWS):
        attention[row, PROMPT - prompt_lens[row] : PROMPT + response_lens[row]] = 1
        mask[row, : response_lens[row]] = 1
        mask[row, 1 : 1 + int(response_lens[row]) // 3] = 0
    real = {k: torch.randn(ROWS, RESPONSE, generator=g, dtype=dtype) for k in ("advantages", "noise", "ref_noise")}
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
        },
        meta_info={"num_mini_batches": 1},
    )


class Recorder(torch.optim.SGD):
    """Keeps the whole gradients instead of stepping."""

    def step(self, closure=None):
        self.seen = [p.grad.full_tensor().clone() for g in self.param_groups for p in g["params"]]


def gradient(model_path: str, dtype: str, micro: int, sizes: list[int] | None) -> tuple[list[torch.Tensor], dict]:
    worker = Worker()
    fsdp = FSDPConfig.model_construct(model_dtype=dtype, dtype=dtype, param_offload=False, reshard_after_forward=True)
    model = build_model(ModelConfig(path=model_path, enable_gradient_checkpointing=False), "lm", fsdp, worker.mesh)
    optimizer = Recorder(model.parameters(), lr=1.0)
    state = TrainState(model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0))
    batch = make_batch(getattr(torch, dtype))
    if sizes is not None:
        batch.meta_info["rank_sizes"] = sizes
    (mine,) = dispatch(Dispatch.DP_COMPUTE_PROTO, worker.world_size, (batch,))[worker.rank]

    def loss_fn(rows, counts):
        log_probs, entropy = forward_log_probs(model, rows, 1.0, with_entropy=True)
        return policy_loss(ACTOR, log_probs, entropy, rows, counts)

    metrics = update_mini_batches(state, mine, loss_fn, epochs=1, micro_batch_size=micro, grad_clip=1e9)
    return optimizer.seen, metrics


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-10)])
def test_gradient_ignores_micro_batches_and_ranks(model_path, dtype, tolerance):
    cases = [(1, 16, None), (1, 4, None), (1, 1, None), (2, 4, None), (2, 4, [11, 5]), (2, 1, [15, 1])]
    results = [run_ranks(ranks, gradient, model_path, dtype, micro, sizes)[0] for ranks, micro, sizes in cases]
    (reference, metrics), *others = results
    scale = torch.stack([g.abs().max() for g in reference]).max()
    assert scale > 1e-3
    for grads, other_metrics in others:
        for a, b in zip(reference, grads, strict=True):
            assert float((a - b).abs().max() / scale) <= tolerance
        assert other_metrics == pytest.approx(metrics, rel=1e-4, abs=1e-6)


def diverging_step(model_path: str) -> tuple[float, bool]:
    worker = Worker()
    fsdp = FSDPConfig(model_dtype="float32", dtype="float32")
    model = build_model(ModelConfig(path=model_path, enable_gradient_checkpointing=True), "lm", fsdp, worker.mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    state = TrainState(model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0))
    before = [p.full_tensor().clone() for p in model.parameters()]
    batch = make_batch(torch.float32)
    batch.batch["advantages"][0, 0] = torch.nan  # on one rank only
    (mine,) = dispatch(Dispatch.DP_COMPUTE_PROTO, worker.world_size, (batch,))[worker.rank]

    def loss_fn(rows, counts):
        log_probs, entropy = forward_log_probs(model, rows, 1.0, with_entropy=True)
        return policy_loss(ACTOR, log_probs, entropy, rows, counts)

    metrics = update_mini_batches(state, mine, loss_fn, epochs=1, micro_batch_size=4, grad_clip=1.0)
    same = all(torch.equal(a, p.full_tensor()) for a, p in zip(before, model.parameters(), strict=True))
    return metrics["skipped_steps"], same


def test_nan_on_one_rank_skips_the_step_on_all(model_path):
    assert run_ranks(2, diverging_step, model_path) == [(1.0, True), (1.0, True)]
