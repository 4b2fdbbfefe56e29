"""Correcting for tokens that were not sampled from the policy that is trained: another engine,
older weights, top-p."""

import numpy as np
import torch
from torch import Tensor

from verl.trainer.ppo.core_algos.kl import MAX_LOG_RATIO
from verl.utils.torch_functional import masked_mean, masked_sum

LEVELS = ("token", "sequence", "geometric")
PERCENTILES = (1, 50, 99)


def log_ratios(old_log_probs: Tensor, rollout_log_probs: Tensor, response_mask: Tensor) -> Tensor:
    """log of (probability under the trainer's policy / under the sampler's), [B, R], clamped; 0
    where masked."""
    gap = torch.where(response_mask.bool(), old_log_probs - rollout_log_probs, 0.0)
    return gap.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def at_level(log_ratio: Tensor, response_mask: Tensor, level: str) -> Tensor:
    """Log-weights [B, R] of policy tokens: each token's own; the sum over the sequence; or the mean
    over it, the log of the geometric mean. What stands elsewhere has no meaning. Raises ValueError
    for another level."""
    mask = response_mask.bool()
    if level == "token":
        return log_ratio
    if level not in LEVELS:
        raise ValueError(f"level {level!r}: expected one of {', '.join(LEVELS)}")
    reduce = masked_sum if level == "sequence" else masked_mean
    whole = reduce(log_ratio, mask, axis=-1).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return whole.unsqueeze(-1).expand_as(log_ratio)


def importance_weights(
    log_ratio: Tensor, response_mask: Tensor, level: str, threshold: float
) -> Tensor:
    """Truncated importance weights min(ratio, threshold), [B, R], 0 where masked: TIS, at one of
    LEVELS."""
    weights = at_level(log_ratio, response_mask, level).exp().clamp(max=threshold)
    return torch.where(response_mask.bool(), weights, 0.0)


def accepted(
    log_ratio: Tensor,
    response_mask: Tensor,
    level: str | None,
    low: float,
    high: float,
    veto: float | None,
) -> Tensor:
    """Policy tokens [B, R] that may be trained on: masked importance sampling (MIS).

    At `token` level a token outside of [low, high] goes, at the other levels its whole sequence;
    with `veto` also every sequence with a token whose ratio is below it.
    """
    mask = response_mask.bool()
    keep = mask
    if level is not None:
        ratio = at_level(log_ratio, mask, level).exp()
        keep = keep & (ratio >= low) & (ratio <= high)
    if veto is not None:
        keep = keep & ~(mask & (log_ratio.exp() < veto)).any(-1, keepdim=True)
    return keep


def mismatch(
    old_log_probs: Tensor, rollout_log_probs: Tensor, response_mask: Tensor
) -> dict[str, float]:
    """How far sampler and trainer are apart over the policy tokens.

    `kl`: estimate k1 of KL(sampler || trainer), in nats per token; `k3_kl`: estimate k3 of it,
    which is never negative; `diff_mean`, `diff_max`: of the log-probs; `ratio/p*`: percentiles of
    the tokens' ratios, `ratio/max` the largest; `ppl_ratio`: geometric mean of all ratios. Zeros
    and ones for an empty mask.
    """
    mask = response_mask.bool()
    log_ratio = log_ratios(old_log_probs, rollout_log_probs, mask)
    own = log_ratio[mask].double() if mask.any() else torch.zeros(1, dtype=torch.float64)
    ratio = own.exp()
    # torch's own refuses more than 16 million tokens
    quantiles = np.percentile(ratio.numpy(), PERCENTILES)
    return {
        "kl": -own.mean().item(),
        "k3_kl": (ratio - 1 - own).mean().item(),
        "diff_mean": own.abs().mean().item(),
        "diff_max": own.abs().max().item(),
        "ppl_ratio": own.mean().exp().item(),
        "ratio/max": ratio.max().item(),
        **{f"ratio/p{p}": float(q) for p, q in zip(PERCENTILES, quantiles, strict=True)},
    }
