"""Corrections for tokens that were not sampled from the policy that is trained.

Another engine, older weights or top-p may have sampled them.
"""

import numpy as np
import torch
from torch import Tensor

from verl.trainer.ppo.core_algos.kl import MAX_LOG_RATIO
from verl.utils.torch_functional import masked_mean, masked_sum

LEVELS = ("token", "sequence", "geometric")
"""The choices of `rollout_correction.rollout_is` and `rollout_rs`; see `at_level`."""
PERCENTILES = (1, 50, 99)


def log_ratios(old_log_probs: Tensor, rollout_log_probs: Tensor, response_mask: Tensor) -> Tensor:
    """Log of the probability under the trainer's policy over that under the sampler's, [B, R].

    It is clamped, and 0 where masked.
    """
    gap = torch.where(response_mask.bool(), old_log_probs - rollout_log_probs, 0.0)
    return gap.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def at_level(log_ratio: Tensor, response_mask: Tensor, level: str) -> Tensor:
    """The log-weights of policy tokens [B, R]; values elsewhere have no meaning.

    `token`: each token's own log-ratio. `sequence`: the sum over the sequence. `geometric`: the
    mean over it, which is the log of the geometric mean. Raises ValueError for another level.
    """
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
    """Truncated importance weights (TIS) at one of LEVELS: min(ratio, threshold), [B, R].

    They are 0 where masked.
    """
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
    """The policy tokens [B, R] that may be trained on: masked importance sampling (MIS).

    At `token` level a token whose ratio is outside of [low, high] is left out; at the other levels
    a sequence whose ratio is outside. `level` None leaves out none. With `veto`, a sequence is also
    left out if the ratio of one of its tokens is below `veto`.
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
    """Figures of the difference between sampler and trainer over the policy tokens.

    `kl`: estimate k1 of KL(sampler || trainer), in nats per token. `k3_kl`: estimate k3 of it,
    which is never negative. `diff_mean`, `diff_max`: absolute differences of the log-probs.
    `ratio/p*`: percentiles of the tokens' ratios. `ratio/max`: the largest ratio. `ppl_ratio`:
    geometric mean of all ratios. For an empty mask differences are 0 and ratios 1.
    """
    mask = response_mask.bool()
    log_ratio = log_ratios(old_log_probs, rollout_log_probs, mask)
    of_tokens = log_ratio[mask].double() if mask.any() else torch.zeros(1, dtype=torch.float64)
    ratio = of_tokens.exp()
    # torch's own refuses more than 16 million tokens
    quantiles = np.percentile(ratio.numpy(), PERCENTILES)
    return {
        "kl": -of_tokens.mean().item(),
        "k3_kl": (ratio - 1 - of_tokens).mean().item(),
        "diff_mean": of_tokens.abs().mean().item(),
        "diff_max": of_tokens.abs().max().item(),
        "ppl_ratio": of_tokens.mean().exp().item(),
        "ratio/max": ratio.max().item(),
        **{f"ratio/p{p}": float(q) for p, q in zip(PERCENTILES, quantiles, strict=True)},
    }
