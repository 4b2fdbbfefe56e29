"""Losses of policy and critic. They are additive, see the package."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from verl.trainer.ppo.core_algos.kl import MAX_LOG_RATIO
from verl.utils.torch_functional import entropy_from_logits, masked_mean, masked_sum

Count = float | Tensor | None
Metrics = dict[str, Tensor]
LOSS_AGG_MODES = (
    "token-mean",
    "token-sum",
    "seq-mean-token-sum",
    "seq-mean-token-mean",
    "seq-mean-token-sum-norm",
)


def agg_loss(
    loss_mat: Tensor,
    loss_mask: Tensor,
    loss_agg_mode: str,
    *,
    num_tokens: Count = None,
    num_seqs: Count = None,
    loss_scale_factor: float | None = None,
) -> Tensor:
    """Scalar from a loss per token [B, R] (additive, see the package).

    `token-mean`: sum / num_tokens. `token-sum`: sum. `seq-mean-token-sum`: sum / num_seqs.
    `seq-mean-token-mean`: sum over rows of the row's mean, / num_seqs. `seq-mean-token-sum-norm`:
    sum / num_seqs / `loss_scale_factor`, the constant divisor of Dr. GRPO (arXiv 2503.20783). A row
    without unmasked token is no sequence. Raises ValueError for another mode, or a missing factor.
    """
    mask = loss_mask.bool()
    if loss_agg_mode == "token-mean":
        return masked_sum(loss_mat, mask) / _denominator(num_tokens, mask.sum())
    if loss_agg_mode == "token-sum":
        return masked_sum(loss_mat, mask)
    if loss_agg_mode == "seq-mean-token-mean":
        rows = masked_mean(loss_mat, mask, axis=-1)
    elif loss_agg_mode == "seq-mean-token-sum":
        rows = masked_sum(loss_mat, mask, axis=-1)
    elif loss_agg_mode == "seq-mean-token-sum-norm":
        if loss_scale_factor is None:
            raise ValueError("loss_agg_mode seq-mean-token-sum-norm needs loss_scale_factor")
        rows = masked_sum(loss_mat, mask, axis=-1) / loss_scale_factor
    else:
        raise ValueError(
            f"loss_agg_mode {loss_agg_mode!r}: expected one of {', '.join(LOSS_AGG_MODES)}"
        )
    return rows.sum() / _denominator(num_seqs, mask.any(-1).sum())


def _denominator(given: Count, local: Tensor) -> Tensor:
    return torch.as_tensor(local if given is None else given, device=local.device).clamp(min=1)


def _log_ratio(log_prob: Tensor, old_log_prob: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, log_prob - old_log_prob, 0.0).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


@dataclass(frozen=True)
class Policy:
    """What a policy loss is made of, all [B, R] and 0 where masked."""

    log_prob: Tensor
    log_ratio: Tensor
    """New minus old log-prob, clamped."""
    advantages: Tensor
    mask: Tensor
    low: float
    high: float
    clip_ratio_c: float


def vanilla(p: Policy) -> tuple[Tensor, Metrics]:
    """PPO's clipped loss (arXiv 1707.06347), dual-clipped for negative advantages (arXiv
    1912.09729), per token.

    `pg_clipfrac`, `pg_clipfrac_lower`: tokens held by the clip and by the dual clip.
    """
    ratio = p.log_ratio.exp()
    free = -p.advantages * ratio
    held = -p.advantages * ratio.clamp(1 - p.low, 1 + p.high)
    clipped = torch.maximum(free, held)
    bound = -p.advantages * p.clip_ratio_c
    losses = torch.where(p.advantages < 0, torch.minimum(clipped, bound), clipped)
    lower = ((p.advantages < 0) & (clipped > bound)).float()
    return losses, {"pg_clipfrac": (held > free).float(), "pg_clipfrac_lower": lower}


def gspo(p: Policy) -> tuple[Tensor, Metrics]:
    """GSPO's loss (arXiv 2507.18071) in its token form: a token has the ratio of its sequence, the
    geometric mean of the policy tokens' ratios, as value, and the gradient of its own log-prob. The
    clip holds whole sequences."""
    sequence = masked_mean(p.log_ratio, p.mask, axis=-1).unsqueeze(-1).detach()
    ratio = (p.log_prob - p.log_prob.detach() + sequence).exp()
    free = -p.advantages * ratio
    held = -p.advantages * ratio.clamp(1 - p.low, 1 + p.high)
    return torch.maximum(free, held), {"pg_clipfrac": (held > free).float()}


def cispo(p: Policy) -> tuple[Tensor, Metrics]:
    """CISPO's loss (arXiv 2506.13585): REINFORCE weighted by the clipped ratio, through which no
    gradient flows, so that a clipped token still learns."""
    ratio = p.log_ratio.detach().exp()
    weight = ratio.clamp(1 - p.low, 1 + p.high)
    return -weight * p.advantages * p.log_prob, {"pg_clipfrac": (weight != ratio).float()}


def reinforce(p: Policy) -> tuple[Tensor, Metrics]:
    """REINFORCE (Williams 1992). No ratio and no trust region: for one optimizer step per rollout
    batch."""
    return -p.advantages * p.log_prob, {}


POLICY_LOSSES: dict[str, Callable[[Policy], tuple[Tensor, Metrics]]] = {
    "vanilla": vanilla,
    "gspo": gspo,
    "cispo": cispo,
    "reinforce": reinforce,
}


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
    loss_scale_factor: float | None = None,
    loss_mode: str = "vanilla",
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """Loss of the policy and metrics: `loss_mode` names one of POLICY_LOSSES.

    The sides of the clip default to `cliprange`; raises ValueError when neither is given.
    `rollout_is_weights` [B, R] multiply the tokens' losses. Metrics: what the loss counts, and
    `ppo_kl`, the mean of old - new log-prob.
    """
    low = cliprange if cliprange_low is None else cliprange_low
    high = cliprange if cliprange_high is None else cliprange_high
    if low is None or high is None:
        raise ValueError("give cliprange, or both cliprange_low and cliprange_high")
    mask = response_mask.bool()
    log_ratio = _log_ratio(log_prob, old_log_prob, mask)
    own = torch.where(mask, log_prob, 0.0)
    earned = torch.where(mask, advantages, 0.0)
    losses, counted = POLICY_LOSSES[loss_mode](
        Policy(own, log_ratio, earned, mask, low, high, clip_ratio_c)
    )
    if rollout_is_weights is not None:
        losses = losses * torch.where(mask, rollout_is_weights, 0.0)
    tokens = {**counted, "ppo_kl": -log_ratio.detach()}
    metrics = {
        name: agg_loss(x, mask, "token-mean", num_tokens=num_tokens) for name, x in tokens.items()
    }
    shares: dict[str, Any] = {
        "num_tokens": num_tokens,
        "num_seqs": num_seqs,
        "loss_scale_factor": loss_scale_factor,
    }
    return agg_loss(losses, mask, loss_agg_mode, **shares), metrics


def likelihood_losses(
    old_log_prob: Tensor, log_prob: Tensor, advantages: Tensor, response_mask: Tensor
) -> Tensor:
    """The likelihood-preserving regulariser of LLDS (arXiv 2512.04220), per token: old minus new
    log-prob of the tokens that lost some, in responses that were not bad (advantage of at least 0)
    and whose log-prob fell as a whole."""
    mask = response_mask.bool()
    lost = -_log_ratio(log_prob, old_log_prob, mask)
    fell = lost.detach().sum(-1, keepdim=True) > 0
    return torch.where(fell & (torch.where(mask, advantages, 0.0) >= 0), lost.clamp(min=0), 0.0)


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
    """Half the squared error of `vpreds` or, where worse, of those held within `cliprange_value` of
    the old `values`.

    Metrics: `vf_clipfrac` (share of tokens where it is worse), `vpred_mean`.
    """
    mask = response_mask.bool()
    vpreds, returns, values = (torch.where(mask, x, 0.0) for x in (vpreds, returns, values))
    held = vpreds.clamp(values - cliprange_value, values + cliprange_value)
    free_loss = (vpreds - returns).square()
    held_loss = (held - returns).square()
    losses = 0.5 * torch.maximum(free_loss, held_loss)
    tokens = {"vf_clipfrac": (held_loss > free_loss).float(), "vpred_mean": vpreds.detach()}
    metrics = {
        name: agg_loss(x, mask, "token-mean", num_tokens=num_tokens) for name, x in tokens.items()
    }
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
    # selected first: a masked row of logits has no path to the gradient
    entropy = entropy_from_logits(logits[mask])
    per_token = torch.zeros(mask.shape, dtype=entropy.dtype, device=entropy.device).masked_scatter(
        mask, entropy
    )
    return agg_loss(per_token, mask, loss_agg_mode, num_tokens=num_tokens, num_seqs=num_seqs)
