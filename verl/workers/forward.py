"""Forward passes over packed rows of a batch: log-probs and values of the trained tokens.

Shapes: b rows of a micro-batch, P prompt, R response, T real tokens of all rows, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from verl.protocol import DataProto
from verl.utils.torch_functional import at_least_float32, logprobs_and_entropy, logprobs_from_logits
from verl.workers.attention import packed_arguments
from verl.workers.image_tower import image_arguments, sampled_logits


@dataclass(frozen=True)
class Packed:
    """The real tokens of several rows, packed in one row."""

    inputs: dict[str, Any]
    """Arguments of the model: input_ids and position_ids [1, T], what its attention needs, and the
    images of the rows."""
    chosen_at: torch.Tensor
    """[n] positions of the states in which the n trained tokens were chosen. They are one before
    the positions of the tokens."""
    labels: torch.Tensor
    """[n] ids of the trained tokens."""
    response_mask: torch.Tensor
    """[b, R] positions of the trained tokens in the rows."""

    def unpack(self, values: torch.Tensor) -> torch.Tensor:
        """Puts `values` [n] at the trained tokens of [b, R], with 0 elsewhere."""
        return torch.zeros(
            self.response_mask.shape, dtype=values.dtype, device=values.device
        ).masked_scatter(self.response_mask, values)


def pack(data: DataProto) -> Packed:
    """Packs the rows of `data`. Each needs a token before its first trained one."""
    prompts = data.batch["prompts"]
    responses = data.batch["responses"]
    real = data.batch["attention_mask"].bool()
    trained = data.batch["response_mask"].bool()
    whole = torch.cat([torch.zeros_like(prompts, dtype=torch.bool), trained], dim=1)[real]
    lengths = real.sum(1)
    return Packed(
        inputs={
            "input_ids": torch.cat([prompts, responses], dim=1)[real][None],
            "position_ids": (real.cumsum(1) - 1)[real][None],
            "use_cache": False,
            **packed_arguments(lengths),
            **image_arguments(data.batch),
        },
        chosen_at=whole.nonzero()[:, 0] - 1,
        labels=responses[trained],
        response_mask=trained,
    )


def forward_log_probs(
    model: PreTrainedModel,
    data: DataProto,
    temperature: float,
    with_entropy: bool,
    entropy_grad: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log-probs of the trained tokens under logits / temperature, and the entropy there.

    Both are [b, R] and 0 elsewhere. Only states in which the policy chose a token go through the
    head, so observations cost no logits.
    """
    rows = pack(data)
    logits = model(**rows.inputs, logits_to_keep=rows.chosen_at).logits[0]
    logits = sampled_logits(model, logits)
    if not with_entropy:
        return rows.unpack(logprobs_from_logits(logits, rows.labels, temperature)), None
    log_probs, entropy = logprobs_and_entropy(logits, rows.labels, temperature, entropy_grad)
    return rows.unpack(log_probs), rows.unpack(entropy)


def log_probs_of_rows(model: PreTrainedModel, data: DataProto, temperature: float) -> torch.Tensor:
    """`forward_log_probs` without the entropy: [b, R]."""
    return forward_log_probs(model, data, temperature, with_entropy=False)[0]


def entropy_of_rows(model: PreTrainedModel, data: DataProto, temperature: float) -> torch.Tensor:
    """Entropy [b, R] of the distributions that the trained tokens were chosen from; 0 elsewhere."""
    _, entropy = forward_log_probs(model, data, temperature, with_entropy=True, entropy_grad=False)
    assert entropy is not None
    return entropy


def forward_values(model: PreTrainedModel, data: DataProto) -> torch.Tensor:
    """Values [b, R] of the states in which the trained tokens were chosen; 0 elsewhere."""
    rows = pack(data)
    values = model(**rows.inputs).logits[0, rows.chosen_at, 0]
    return rows.unpack(values.to(at_least_float32(values.dtype)))
