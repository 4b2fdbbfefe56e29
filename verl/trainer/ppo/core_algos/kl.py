"""The KL to the reference: estimators, controllers of the coefficient, and KL in the reward."""

from collections.abc import Callable

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to this range before `exp`.

Clamping after it would give an overflow the gradient 0 * inf = NaN."""
MAX_LOW_VAR_KL = 10.0
"""The bound of `low_var_kl` per token, as in verl."""


class AdaptiveKLController:
    """Moves a KL coefficient `value` towards a target KL (arXiv 1909.08593, section 2.2)."""

    def __init__(self, init_kl_coef: float, target_kl: float, horizon: float) -> None:
        self.value = init_kl_coef
        self.target = target_kl
        self.horizon = horizon

    def update(self, current_kl: float, n_steps: int) -> None:
        """Moves `value` by at most 20 % per `horizon` of `n_steps`."""
        error = min(max(current_kl / self.target - 1, -0.2), 0.2)
        self.value *= 1 + error * n_steps / self.horizon


class FixedKLController:
    """A KL coefficient `value` that stays as it is."""

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
    """The scores minus `kl_ratio` times the KL to the reference, per token [B, R]."""
    kl = kl_penalty(old_log_prob, ref_log_prob, kl_type)
    return torch.where(response_mask.bool(), token_level_scores - kl_ratio * kl, 0.0)


def kl_penalty(logprob: Tensor, ref_logprob: Tensor, kl_penalty: str) -> Tensor:
    """An estimate of KL(policy || reference) per token, from log-probs of sampled tokens.

    The estimators (joschu.net/blog/kl-approx.html) are functions of the log-ratio x: `kl` = `k1` is
    x, `abs` is |x|, `mse` = `k2` is x^2 / 2, `low_var_kl` = `k3` is exp(-x) - 1 + x. Where an input
    is NaN or infinite the result is NaN and the gradient 0, so that an unmasked one shows in the
    loss and a masked one has no effect. Raises ValueError for another name.
    """
    if kl_penalty not in KL_PENALTIES:
        raise ValueError(f"kl_penalty {kl_penalty!r}: expected one of {sorted(KL_PENALTIES)}")
    log_ratio = logprob - ref_logprob
    finite = log_ratio.isfinite()
    estimate = KL_PENALTIES[kl_penalty](torch.where(finite, log_ratio, 0.0))
    return torch.where(finite, estimate, torch.nan)


def _k2(log_ratio: Tensor) -> Tensor:
    return 0.5 * log_ratio.square()


def _k3(log_ratio: Tensor) -> Tensor:
    inverse = (-log_ratio).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return (inverse.exp() - inverse - 1).clamp(-MAX_LOW_VAR_KL, MAX_LOW_VAR_KL)


KL_PENALTIES: dict[str, Callable[[Tensor], Tensor]] = {
    "kl": torch.clone,
    "k1": torch.clone,
    "abs": torch.abs,
    "mse": _k2,
    "k2": _k2,
    "low_var_kl": _k3,
    "k3": _k3,
}
"""The choices of `algorithm.kl_penalty` and `actor.kl_loss_type`: functions of the log-ratio."""
