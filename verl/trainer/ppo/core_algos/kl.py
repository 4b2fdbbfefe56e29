"""KL to the reference: estimators, controllers, and the KL in the reward."""

from collections.abc import Callable

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to this *before* exp: clamped after it, an overflow has the gradient 0 *
inf = NaN."""
MAX_LOW_VAR_KL = 10.0


class AdaptiveKLController:
    """A KL coefficient `value` that steers towards a target KL (arXiv 1909.08593, section 2.2)."""

    def __init__(self, init_kl_coef: float, target_kl: float, horizon: float) -> None:
        self.value = init_kl_coef
        self.target = target_kl
        self.horizon = horizon

    def update(self, current_kl: float, n_steps: int) -> None:
        """Moves `value` by at most 20 % per `horizon` of `n_steps`."""
        error = min(max(current_kl / self.target - 1, -0.2), 0.2)
        self.value *= 1 + error * n_steps / self.horizon


class FixedKLController:
    """A KL coefficient `value` that stays."""

    def __init__(self, kl_coef: float) -> None:
        self.value = kl_coef

    def update(self, current_kl: float, n_steps: int) -> None:
        """Does nothing."""


def compute_rewards(
    token_level_scores: Tensor,
    old_log_prob: Tensor,
    ref_log_prob: Tensor,
    kl_ratio: float,
    response_mask: Tensor,
    kl_type: str = "kl",
) -> Tensor:
    """Scores minus `kl_ratio` times the KL to the reference, per token [B, R]."""
    kl = kl_penalty(old_log_prob, ref_log_prob, kl_type)
    return torch.where(response_mask.bool(), token_level_scores - kl_ratio * kl, 0.0)


def kl_penalty(logprob: Tensor, ref_logprob: Tensor, kl_penalty: str) -> Tensor:
    """Estimate of KL(policy || reference) per token, from log-probs of sampled tokens
    (joschu.net/blog/kl-approx.html).

    `kl` = `k1` the log-ratio, `abs` its size, `mse` = `k2` half its square, `low_var_kl` = `k3`
    exp(-x) - 1 + x of the log-ratio x. Where an input is NaN or infinite the result is NaN and the
    gradient 0: an unmasked one is seen in the loss, a masked one has no effect. Raises ValueError
    for another name.
    """
    if kl_penalty not in _KL_ESTIMATORS:
        raise ValueError(f"kl_penalty {kl_penalty!r}: expected one of {sorted(_KL_ESTIMATORS)}")
    log_ratio = logprob - ref_logprob
    finite = log_ratio.isfinite()
    return torch.where(
        finite, _KL_ESTIMATORS[kl_penalty](torch.where(finite, log_ratio, 0.0)), torch.nan
    )


def _k2(log_ratio: Tensor) -> Tensor:
    return 0.5 * log_ratio.square()


def _k3(log_ratio: Tensor) -> Tensor:
    inverse = (-log_ratio).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return (inverse.exp() - inverse - 1).clamp(-MAX_LOW_VAR_KL, MAX_LOW_VAR_KL)


_KL_ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "kl": torch.clone,
    "k1": torch.clone,
    "abs": torch.abs,
    "mse": _k2,
    "k2": _k2,
    "low_var_kl": _k3,
    "k3": _k3,
}
