"""The mathematics of PPO and GRPO: tensors and floats in, tensors out.

Shapes: B trajectories, R response tokens. `response_mask` [B, R] is non-zero on the tokens that the policy sampled; on
every other position (observations, forced tokens, padding) inputs may hold anything, NaN included: they change neither
a result nor a gradient, and results are 0 there.

Losses are *additive*: they are sums over a micro-batch divided by the token and sequence counts of the whole mini-batch
(`num_tokens`, `num_seqs`: over all micro-batches and ranks; None: this batch is all there is). So are the metrics that
come with them, always per token. Summed over micro-batches and ranks both are the figures of the mini-batch, and the
gradient does not depend on how it was cut.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from verl.utils.torch_functional import entropy_from_logits, masked_mean, masked_sum, masked_whiten

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to this *before* exp: clamped after it, an overflow has the gradient 0 * inf = NaN."""
MAX_LOW_VAR_KL = 10.0

Count = float | Tensor | None
Metrics = dict[str, Tensor]


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


def compute_gae_advantage_return(
    token_level_rewards: Tensor, values: Tensor, response_mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Advantages, whitened over the mask, and returns (of the raw advantages), both [B, R]; arXiv 1506.02438.

    Only policy tokens are time steps: the next value and the advantage are carried across masked tokens, so that the
    result is that of the sequence with its observations cut out.
    """
    mask = response_mask.bool()
    advantage = next_value = torch.zeros_like(values[:, 0])
    columns = []
    for t in reversed(range(values.shape[1])):
        delta = token_level_rewards[:, t] + gamma * next_value - values[:, t]
        advantage = torch.where(mask[:, t], delta + gamma * lam * advantage, advantage)
        next_value = torch.where(mask[:, t], values[:, t], next_value)
        columns.append(advantage)
    advantages = torch.stack(columns[::-1], dim=1)
    return masked_whiten(advantages, mask), torch.where(mask, advantages + values, 0.0)


def compute_grpo_outcome_advantage(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: np.ndarray,
    epsilon: float = 1e-6,
    norm_adv_by_std_in_grpo: bool = True,
) -> tuple[Tensor, Tensor]:
    """Advantages and returns (the same), [B, R]: each row's score against its group's mean and unbiased std.

    `index` [B] names the group of each row. A group of one has no spread: as in verl its mean counts as 0 and its std
    as 1, the advantage is then the bare score; callers drop such groups beforehand. Without `norm_adv_by_std_in_grpo`
    the std is left out (arXiv 2503.20783).
    """
    scores = masked_sum(token_level_rewards, response_mask, axis=-1)
    names, group_of = np.unique(np.asarray(index), return_inverse=True)
    advantages = torch.empty_like(scores)
    for group in range(len(names)):
        rows = torch.from_numpy(np.flatnonzero(group_of == group)).to(scores.device)
        members = scores[rows]
        mean, std = 0.0, 1.0
        if len(rows) > 1:
            # equal scores become exactly 0: a rounding error of their mean would be blown up by 1 / epsilon
            members = members - members[0]
            mean, std = members.mean(), members.std()
        advantages[rows] = (members - mean) / (std + epsilon if norm_adv_by_std_in_grpo else 1.0)
    per_token = torch.where(response_mask.bool(), advantages.unsqueeze(-1), 0.0)
    return per_token, per_token


def kl_penalty(logprob: Tensor, ref_logprob: Tensor, kl_penalty: str) -> Tensor:
    """Estimate of KL(policy || reference) per token, from log-probs of sampled tokens (joschu.net/blog/kl-approx.html).

    `kl` = `k1` the log-ratio, `abs` its size, `mse` = `k2` half its square, `low_var_kl` = `k3` exp(-x) - 1 + x of the
    log-ratio x. Where an input is NaN or infinite the result is NaN and the gradient 0: an unmasked one is seen in the
    loss, a masked one has no effect. Raises ValueError for another name.
    """
    if kl_penalty not in _KL_ESTIMATORS:
        raise ValueError(f"kl_penalty {kl_penalty!r}: expected one of {sorted(_KL_ESTIMATORS)}")
    log_ratio = logprob - ref_logprob
    finite = log_ratio.isfinite()
    return torch.where(finite, _KL_ESTIMATORS[kl_penalty](torch.where(finite, log_ratio, 0.0)), torch.nan)


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


def agg_loss(
    loss_mat: Tensor, loss_mask: Tensor, loss_agg_mode: str, *, num_tokens: Count = None, num_seqs: Count = None
) -> Tensor:
    """Scalar from a loss per token [B, R] (additive, see the module).

    `token-mean`: sum / num_tokens. `seq-mean-token-sum`: sum / num_seqs. `seq-mean-token-mean`: sum over rows of the
    row's mean, / num_seqs. A row without unmasked token is no sequence. Raises ValueError for another mode.
    """
    mask = loss_mask.bool()
    if loss_agg_mode == "token-mean":
        return masked_sum(loss_mat, mask) / _denominator(num_tokens, mask.sum())
    if loss_agg_mode == "seq-mean-token-sum":
        rows = masked_sum(loss_mat, mask, axis=-1)
    elif loss_agg_mode == "seq-mean-token-mean":
        rows = masked_mean(loss_mat, mask, axis=-1)
    else:
        raise ValueError(
            f"loss_agg_mode {loss_agg_mode!r}: expected token-mean, seq-mean-token-sum or seq-mean-token-mean"
        )
    return rows.sum() / _denominator(num_seqs, mask.any(-1).sum())


def _denominator(given: Count, local: Tensor) -> Tensor:
    return torch.as_tensor(local if given is None else given, device=local.device).clamp(min=1)


def compute_policy_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    cliprange: float | None = None,
    cliprange_low: float | None = None,
    cliprange_high: float | None = None,
    clip_ratio_c: float = 3.0,
    loss_agg_mode: str = "token-mean",
    num_tokens: Count = None,
    num_seqs: Count = None,
) -> tuple[Tensor, Metrics]:
    """Clipped policy loss (arXiv 1707.06347), dual-clipped for negative advantages (arXiv 1912.09729), and metrics.

    `pg_clipfrac`, `pg_clipfrac_lower`: shares of tokens held by the clip and by the dual clip; `ppo_kl`: mean of
    old - new log-prob. The sides of the clip default to `cliprange`; raises ValueError when neither is given.
    """
    low = cliprange if cliprange_low is None else cliprange_low
    high = cliprange if cliprange_high is None else cliprange_high
    if low is None or high is None:
        raise ValueError("give cliprange, or both cliprange_low and cliprange_high")
    mask = response_mask.bool()
    log_ratio = torch.where(mask, log_prob - old_log_prob, 0.0).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = log_ratio.exp()
    free = -advantages * ratio
    held = -advantages * ratio.clamp(1 - low, 1 + high)
    clipped = torch.maximum(free, held)
    bound = -advantages * clip_ratio_c
    losses = torch.where(advantages < 0, torch.minimum(clipped, bound), clipped)
    tokens = {
        "pg_clipfrac": (held > free).float(),
        "ppo_kl": -log_ratio.detach(),
        "pg_clipfrac_lower": ((advantages < 0) & (clipped > bound)).float(),
    }
    metrics = {name: agg_loss(x, mask, "token-mean", num_tokens=num_tokens) for name, x in tokens.items()}
    return agg_loss(losses, mask, loss_agg_mode, num_tokens=num_tokens, num_seqs=num_seqs), metrics


def compute_value_loss(
    vpreds: Tensor,
    returns: Tensor,
    values: Tensor,
    response_mask: Tensor,
    cliprange_value: float,
    loss_agg_mode: str = "token-mean",
    num_tokens: Count = None,
    num_seqs: Count = None,
) -> tuple[Tensor, Metrics]:
    """Half the squared error of `vpreds` or, where worse, of those held within `cliprange_value` of the old `values`.

    Metrics: `vf_clipfrac` (share of tokens where it is worse), `vpred_mean`.
    """
    mask = response_mask.bool()
    vpreds, returns, values = (torch.where(mask, x, 0.0) for x in (vpreds, returns, values))
    held = vpreds.clamp(values - cliprange_value, values + cliprange_value)
    free_loss, held_loss = (vpreds - returns).square(), (held - returns).square()
    losses = 0.5 * torch.maximum(free_loss, held_loss)
    tokens = {"vf_clipfrac": (held_loss > free_loss).float(), "vpred_mean": vpreds.detach()}
    metrics = {name: agg_loss(x, mask, "token-mean", num_tokens=num_tokens) for name, x in tokens.items()}
    return agg_loss(losses, mask, loss_agg_mode, num_tokens=num_tokens, num_seqs=num_seqs), metrics


def compute_entropy_loss(
    logits: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    num_tokens: Count = None,
    num_seqs: Count = None,
) -> Tensor:
    """Entropy (nats) of `logits` [B, R, vocab] over the mask, aggregated by `agg_loss`."""
    mask = response_mask.bool()
    entropy = entropy_from_logits(logits[mask])  # selected first: a masked row of logits has no path to the gradient
    per_token = torch.zeros(mask.shape, dtype=entropy.dtype, device=entropy.device).masked_scatter(mask, entropy)
    return agg_loss(per_token, mask, loss_agg_mode, num_tokens=num_tokens, num_seqs=num_seqs)


ADVANTAGE_ESTIMATORS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "gae": compute_gae_advantage_return,
    "grpo": compute_grpo_outcome_advantage,
}
