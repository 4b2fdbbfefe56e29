"""The losses of policy and critic. They are additive, see the docstring of the package."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from verl.trainer.ppo.core_algos.kl import MAX_LOG_RATIO
from verl.utils.torch_functional import entropy_from_logits, masked_mean, masked_sum

Count = float | Tensor | None
"""A count over the whole mini-batch; None where this batch is the whole mini-batch."""
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
    seq_tokens: Tensor | None = None,
) -> Tensor:
    """Aggregates a loss per token [B, R] to a scalar, which is additive (see the package).

    `token-mean`: sum / num_tokens. `token-sum`: sum. `seq-mean-token-sum`: sum / num_seqs.
    `seq-mean-token-mean`: sum over rows of the row's mean, / num_seqs. `seq-mean-token-sum-norm`:
    sum / num_seqs / `loss_scale_factor`, the constant divisor of Dr. GRPO (arXiv 2503.20783). A row
    without an unmasked token is no sequence. Where a sequence is several rows, `seq_tokens` [B] are
    the unmasked tokens of all rows of a row's sequence. Raises ValueError for another mode and for
    a missing factor.
    """
    mask = loss_mask.bool()
    if loss_agg_mode == "token-mean":
        return masked_sum(loss_mat, mask) / _denominator(num_tokens, mask.sum())
    if loss_agg_mode == "token-sum":
        return masked_sum(loss_mat, mask)
    if loss_agg_mode == "seq-mean-token-mean":
        if seq_tokens is None:
            rows = masked_mean(loss_mat, mask, axis=-1)
        else:
            rows = masked_sum(loss_mat, mask, axis=-1) / seq_tokens.clamp(min=1)
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
class LossInputs:
    """What a policy loss is computed from: tensors [B, R], 0 where masked, and the clip range."""

    log_prob: Tensor
    log_ratio: Tensor
    """New minus old log-prob, clamped."""
    advantages: Tensor
    response_mask: Tensor
    """Boolean."""
    clip_ratio_low: float
    clip_ratio_high: float
    clip_ratio_c: float

    @classmethod
    def masked(
        cls,
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        *,
        clip_ratio_low: float,
        clip_ratio_high: float,
        clip_ratio_c: float = 3.0,
    ) -> "LossInputs":
        """The inputs with masked positions set to 0."""
        mask = response_mask.bool()
        return cls(
            log_prob=torch.where(mask, log_prob, 0.0),
            log_ratio=_log_ratio(log_prob, old_log_prob, mask),
            advantages=torch.where(mask, advantages, 0.0),
            response_mask=mask,
            clip_ratio_low=clip_ratio_low,
            clip_ratio_high=clip_ratio_high,
            clip_ratio_c=clip_ratio_c,
        )

    def clip(self, ratio: Tensor) -> Tensor:
        """`ratio` clamped to the clip range."""
        return ratio.clamp(1 - self.clip_ratio_low, 1 + self.clip_ratio_high)


def compute_policy_loss_vanilla(inputs: LossInputs) -> tuple[Tensor, Metrics]:
    """PPO's clipped loss per token (arXiv 1707.06347), with the dual clip of arXiv 1912.09729.

    `pg_clipfrac`, `pg_clipfrac_lower`: tokens on which the clip and the dual clip take effect.
    """
    advantages = inputs.advantages
    ratio = inputs.log_ratio.exp()
    clipped_ratio = inputs.clip(ratio)
    pg_losses1 = -advantages * ratio
    pg_losses2 = -advantages * clipped_ratio
    clip_pg_losses1 = torch.maximum(pg_losses1, pg_losses2)
    pg_losses3 = -advantages * inputs.clip_ratio_c
    clip_pg_losses2 = torch.minimum(clip_pg_losses1, pg_losses3)
    pg_losses = torch.where(advantages < 0, clip_pg_losses2, clip_pg_losses1)
    return pg_losses, {
        "pg_clipfrac": (pg_losses2 > pg_losses1).float(),
        "pg_clipfrac_lower": ((advantages < 0) & (clip_pg_losses1 > pg_losses3)).float(),
    }


def compute_policy_loss_gspo(inputs: LossInputs) -> tuple[Tensor, Metrics]:
    """GSPO's loss (arXiv 2507.18071) in its token form.

    The value of a token's ratio is that of its sequence: the geometric mean of the ratios of its
    policy tokens. The gradient is that of the token's own log-prob. The clip takes effect on whole
    sequences.
    """
    log_ratio = masked_mean(inputs.log_ratio, inputs.response_mask, axis=-1).unsqueeze(-1).detach()
    # log_prob minus its own value is 0, so this adds the gradient and keeps the value
    ratio = (inputs.log_prob - inputs.log_prob.detach() + log_ratio).exp()
    clipped_ratio = inputs.clip(ratio)
    pg_losses1 = -inputs.advantages * ratio
    pg_losses2 = -inputs.advantages * clipped_ratio
    pg_losses = torch.maximum(pg_losses1, pg_losses2)
    return pg_losses, {"pg_clipfrac": (pg_losses2 > pg_losses1).float()}


def compute_policy_loss_cispo(inputs: LossInputs) -> tuple[Tensor, Metrics]:
    """CISPO's loss (arXiv 2506.13585): REINFORCE weighted by the clipped ratio.

    No gradient flows through the ratio, so a clipped token still has a gradient.
    """
    ratio = inputs.log_ratio.detach().exp()
    clipped_ratio = inputs.clip(ratio)
    pg_losses = -clipped_ratio * inputs.advantages * inputs.log_prob
    return pg_losses, {"pg_clipfrac": (clipped_ratio != ratio).float()}


def compute_policy_loss_reinforce(inputs: LossInputs) -> tuple[Tensor, Metrics]:
    """REINFORCE (Williams 1992).

    It has no ratio and no trust region, so it is meant for one optimizer step per rollout batch.
    """
    return -inputs.advantages * inputs.log_prob, {}


def compute_policy_loss_geo_mean(inputs: LossInputs) -> tuple[Tensor, Metrics]:
    """GMPO's loss (arXiv 2507.20673): the geometric mean of a sequence's clipped ratios.

    Every token of a sequence has the loss of the sequence, - A exp(mean_t log rho_t), where A is
    the mean advantage of its tokens. log rho_t is clamped to [-`clip_ratio_low`,
    `clip_ratio_high`], which are logarithms here, and only on the side to which the advantage
    drives it. A clamped token has no gradient; the others keep theirs.
    """
    mask = inputs.response_mask
    log_ratio = inputs.log_ratio
    clamped = log_ratio.clamp(-inputs.clip_ratio_low, inputs.clip_ratio_high)
    advantage = masked_mean(inputs.advantages, mask, axis=-1)
    is_good = (advantage > 0).unsqueeze(-1)
    held = torch.where(
        is_good, torch.minimum(log_ratio, clamped), torch.maximum(log_ratio, clamped)
    )
    ratio = masked_mean(held, mask, axis=-1).exp()
    pg_losses = torch.where(mask, (-advantage * ratio).unsqueeze(-1), 0.0)
    return pg_losses, {"pg_clipfrac": (held != log_ratio).float()}


SAPO_TEMPERATURES = (1.0, 1.05)
"""How fast SAPO's gate closes for a positive and for a negative advantage: the paper's values."""


def compute_policy_loss_sapo(inputs: LossInputs) -> tuple[Tensor, Metrics]:
    """SAPO's loss (arXiv 2511.20347): a smooth gate instead of a clip.

    - A 4/tau sigmoid(tau (rho - 1)), whose slope in rho is that of - A rho at rho = 1 and falls to
    0 on both sides, faster for a negative advantage. The clip range is not used.
    """
    good, bad = SAPO_TEMPERATURES
    tau = torch.full_like(inputs.advantages, bad).masked_fill(inputs.advantages > 0, good)
    gate = torch.sigmoid(tau * (inputs.log_ratio.exp() - 1)) * 4 / tau
    return -inputs.advantages * gate, {}


def compute_policy_loss_dppo_tv(inputs: LossInputs) -> tuple[Tensor, Metrics]:
    """DPPO's loss with the total variation (arXiv 2602.04879), see `divergence_loss`.

    The variation of a token is |pi - pi_old|, of its probability alone: a rare token may change its
    ratio much, and a likely one little.
    """
    new, old = probabilities(inputs)
    return divergence_loss(inputs, (new - old).abs())


def compute_policy_loss_dppo_kl(inputs: LossInputs) -> tuple[Tensor, Metrics]:
    """DPPO's loss with the KL (arXiv 2602.04879), see `divergence_loss`.

    The KL of a token is that of two outcomes, the token and all others, from pi_old to pi.
    """
    new, old = probabilities(inputs)
    of_token = old * (old / new).log()
    of_others = (1 - old) * ((1 - old) / (1 - new)).log()
    return divergence_loss(inputs, of_token + of_others)


SURE = 1 - 1e-6
"""The largest probability of a token from which a KL is computed; 1 - SURE is the smallest."""


def probabilities(inputs: LossInputs) -> tuple[Tensor, Tensor]:
    """The new and the old probability of each token, without gradient, kept off 0 and 1."""
    new = inputs.log_prob.detach()
    old = new - inputs.log_ratio.detach()
    return new.exp().clamp(1 - SURE, SURE), old.exp().clamp(1 - SURE, SURE)


def divergence_loss(inputs: LossInputs, divergence: Tensor) -> tuple[Tensor, Metrics]:
    """REINFORCE weighted by the truncated ratio, on tokens within a divergence.

    - A min(rho, `clip_ratio_c`) log pi, without gradient through the ratio. A token is left out if
    its advantage drives it further from the old policy and `divergence` [B, R] is above
    `clip_ratio_high` (for a positive advantage) or `clip_ratio_low`.
    """
    is_good = inputs.advantages > 0
    limit = torch.full_like(divergence, inputs.clip_ratio_low)
    limit = limit.masked_fill(is_good, inputs.clip_ratio_high)
    log_ratio = inputs.log_ratio.detach()
    drifts = torch.where(is_good, log_ratio > 0, log_ratio < 0)
    left_out = drifts & (divergence > limit)
    weight = log_ratio.exp().clamp(max=inputs.clip_ratio_c).masked_fill(left_out, 0.0)
    return -weight * inputs.advantages * inputs.log_prob, {"pg_clipfrac": left_out.float()}


PolicyLoss = Callable[[LossInputs], tuple[Tensor, Metrics]]
"""Returns the loss and the metrics that come with it, all per token [B, R]."""

POLICY_LOSSES: dict[str, PolicyLoss] = {
    "vanilla": compute_policy_loss_vanilla,
    "gspo": compute_policy_loss_gspo,
    "cispo": compute_policy_loss_cispo,
    "reinforce": compute_policy_loss_reinforce,
    "geo_mean": compute_policy_loss_geo_mean,
    "sapo": compute_policy_loss_sapo,
    "dppo_tv": compute_policy_loss_dppo_tv,
    "dppo_kl": compute_policy_loss_dppo_kl,
}
"""The choices of `actor.policy_loss.loss_mode`."""


def likelihood_losses(
    old_log_prob: Tensor, log_prob: Tensor, advantages: Tensor, response_mask: Tensor
) -> Tensor:
    """The likelihood-preserving regulariser of LLDS (arXiv 2512.04220), per token [B, R].

    For tokens whose log-prob fell it is the old minus the new log-prob, in responses with an
    advantage of at least 0 whose log-prob fell as a whole. Elsewhere it is 0.
    """
    mask = response_mask.bool()
    lost = -_log_ratio(log_prob, old_log_prob, mask)
    response_fell = lost.detach().sum(-1, keepdim=True) > 0
    not_bad = torch.where(mask, advantages, 0.0) >= 0
    return torch.where(response_fell & not_bad, lost.clamp(min=0), 0.0)


def compute_value_loss(
    vpreds: Tensor,
    returns: Tensor,
    values: Tensor,
    response_mask: Tensor,
    cliprange_value: float,
    loss_agg_mode: str = "token-mean",
    num_tokens: Count = None,
    num_seqs: Count = None,
    seq_tokens: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """PPO's clipped loss of the critic, aggregated by `agg_loss`.

    It is half the larger of two squared errors: that of `vpreds`, and that of `vpreds` clipped to
    `cliprange_value` around the old `values`. Metrics: `vf_clipfrac` (share of tokens where the
    clipped one is larger), `vpred_mean`.
    """
    mask = response_mask.bool()
    vpreds, returns, values = (torch.where(mask, x, 0.0) for x in (vpreds, returns, values))
    clipped_vpreds = vpreds.clamp(values - cliprange_value, values + cliprange_value)
    vf_losses1 = (vpreds - returns).square()
    vf_losses2 = (clipped_vpreds - returns).square()
    vf_losses = 0.5 * torch.maximum(vf_losses1, vf_losses2)
    mean_of_tokens = partial(
        agg_loss, loss_mask=mask, loss_agg_mode="token-mean", num_tokens=num_tokens
    )
    metrics = {
        "vf_clipfrac": mean_of_tokens((vf_losses2 > vf_losses1).float()),
        "vpred_mean": mean_of_tokens(vpreds.detach()),
    }
    vf_loss = agg_loss(
        vf_losses,
        mask,
        loss_agg_mode,
        num_tokens=num_tokens,
        num_seqs=num_seqs,
        seq_tokens=seq_tokens,
    )
    return vf_loss, metrics


def compute_entropy_loss(
    logits: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    num_tokens: Count = None,
    num_seqs: Count = None,
) -> Tensor:
    """Entropy (nats) of `logits` [B, R, vocab] over the mask, aggregated by `agg_loss`.

    For callers that have logits. In training the forward pass returns the entropy of each token
    instead of logits, and `policy_loss` of verl/workers/actor.py adds it to the loss.
    """
    mask = response_mask.bool()
    # selected first, so that masked rows of logits get no gradient
    entropy = entropy_from_logits(logits[mask])
    per_token = torch.zeros(mask.shape, dtype=entropy.dtype, device=entropy.device).masked_scatter(
        mask, entropy
    )
    return agg_loss(per_token, mask, loss_agg_mode, num_tokens=num_tokens, num_seqs=num_seqs)
