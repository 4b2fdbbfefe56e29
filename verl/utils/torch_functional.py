"""Masked statistics and log-probabilities.

A masked entry never affects a result, whatever its value, even NaN.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK_ELEMENTS = 2**26
"""Most logits that are upcast to float32 at a time (256 MiB)."""


def masked_sum(values: Tensor, mask: Tensor, axis: int | None = None) -> Tensor:
    """Sum of `values` where `mask` is non-zero, over `axis` (None: all). 0 for an empty mask."""
    return torch.where(mask.bool(), values, 0.0).sum(dim=axis)


def masked_mean(values: Tensor, mask: Tensor, axis: int | None = None) -> Tensor:
    """Mean of `values` where `mask` is non-zero, over `axis` (None: all). 0 for an empty mask."""
    return masked_sum(values, mask, axis) / mask.bool().sum(dim=axis).clamp(min=1)


def masked_var(values: Tensor, mask: Tensor, unbiased: bool = True) -> Tensor:
    """Variance of `values` where `mask` is non-zero; 0 with fewer than two such entries."""
    deviations = torch.where(mask.bool(), values - masked_mean(values, mask), 0.0)
    return deviations.square().sum() / (mask.bool().sum() - int(unbiased)).clamp(min=1)


def masked_whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """`values` with mean 0 and unit variance over the mask; 0 outside of it.

    Without `shift_mean` the mean is kept.
    """
    mean = masked_mean(values, mask)
    whitened = (values - mean) * torch.rsqrt(masked_var(values, mask) + 1e-8)
    return torch.where(mask.bool(), whitened if shift_mean else whitened + mean, 0.0)


def logprobs_from_logits(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probability of `labels` [...] under `logits` [..., vocab] / temperature.

    It is in float32, or in float64 for float64 logits.
    """
    return _by_rows(partial(_label_logprobs, temperature=temperature), logits, labels)


def logprobs_and_entropy(
    logits: Tensor, labels: Tensor, temperature: float = 1.0, entropy_grad: bool = True
) -> tuple[Tensor, Tensor]:
    """`logprobs_from_logits`, and the entropy of the same distributions, in one pass.

    Without `entropy_grad` the entropy has no gradient, which saves work in the backward pass.
    """
    both = _by_rows(
        partial(_both, temperature=temperature, entropy_grad=entropy_grad), logits, labels
    )
    return both[..., 0], both[..., 1]


def entropy_from_logits(logits: Tensor) -> Tensor:
    """Entropy in nats of the distributions `logits` [..., vocab].

    It is in float32, or in float64 for float64 logits.
    """
    return _by_rows(_entropy, logits)


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """float32, or `dtype` where that is wider."""
    return torch.promote_types(dtype, torch.float32)


def _upcast(logits: Tensor) -> Tensor:
    return logits.to(at_least_float32(logits.dtype))


def _label_logprobs(logits: Tensor, labels: Tensor, temperature: float) -> Tensor:
    return _of_labels((_upcast(logits) / temperature).log_softmax(-1), labels)


def _both(logits: Tensor, labels: Tensor, temperature: float, entropy_grad: bool) -> Tensor:
    log_p = (_upcast(logits) / temperature).log_softmax(-1)
    return torch.stack(
        [_of_labels(log_p, labels), _entropy_of(log_p if entropy_grad else log_p.detach())], dim=-1
    )


def _of_labels(log_p: Tensor, labels: Tensor) -> Tensor:
    return log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def _entropy(logits: Tensor) -> Tensor:
    return _entropy_of(_upcast(logits).log_softmax(-1))


def _entropy_of(log_p: Tensor) -> Tensor:
    # an impossible token (-inf) contributes 0, not 0 * inf, to the entropy and to its gradient
    log_p = log_p.clamp(min=torch.finfo(log_p.dtype).min)
    return -(log_p.exp() * log_p).sum(-1)


def _by_rows(fn: Callable[..., Tensor], logits: Tensor, *columns: Tensor) -> Tensor:
    """Applies `fn` to chunks of rows, and concatenates the results.

    If there are several chunks, each is recomputed in the backward pass, so that only one chunk at
    a time has a float32 copy in memory.
    """
    rows = max(1, CHUNK_ELEMENTS // logits.shape[-1])
    chunks = [
        logits.flatten(0, -2).split(rows),
        *(column.flatten().split(rows) for column in columns),
    ]
    if len(chunks[0]) > 1:
        fn = partial(checkpoint, fn, use_reentrant=False, preserve_rng_state=False)
    found = torch.cat([fn(*chunk) for chunk in zip(*chunks, strict=True)])
    return found.view(*logits.shape[:-1], *found.shape[1:])
