"""Preparation of a batch for the policy loss: rows are filtered, and rollouts are corrected."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from verl.protocol import DataProto
from verl.trainer.config import RolloutCorrectionConfig
from verl.trainer.ppo.core_algos import (
    accepted,
    are_equal,
    group_rows,
    importance_weights,
    log_ratios,
    mismatch,
)
from verl.trainer.ppo.joined import Joined, has_several_rows, one_of_each, sum_of_trajectory
from verl.utils.torch_functional import masked_mean, masked_sum


def _zero_variance(data: DataProto) -> Tensor:
    """Rows [B] of groups that all score the same.

    Scores are compared, not advantages, because whitening, a critic or a KL in the reward make
    advantages differ where scores are the same.
    """
    scores = masked_sum(data.batch["token_level_scores"], data.batch["response_mask"], axis=-1)
    scores = sum_of_trajectory(scores, data)
    same = torch.zeros(len(data), dtype=torch.bool)
    for rows in group_rows(data.non_tensor_batch["uid"]):
        same[rows] = are_equal(scores[rows])
    return same


FILTERS: dict[str, Callable[[DataProto], Tensor]] = {
    "zero_variance": _zero_variance,
    "void_turn": lambda data: data.batch["void_turns"] > 0,
    "truncated": lambda data: data.batch["truncated"],
}
"""By the name of a filter: a function that gives the rows [B] to leave out."""


def filter_loss(data: DataProto, names: Sequence[str]) -> tuple[DataProto, dict[str, float]]:
    """Clears the response mask of filtered rows; returns the batch and the share of each filter.

    Filtered rows are then neither trained on nor counted.
    """
    metrics: dict[str, float] = {}
    left_out = torch.zeros(len(data), dtype=torch.bool)
    for name in names:
        rows = FILTERS[name](data)
        metrics[f"rollout/filtered/{name}"] = float(rows[one_of_each(data)].float().mean())
        left_out |= rows
    response_mask = data.batch["response_mask"] * ~left_out.unsqueeze(1)
    return data.with_tensors(response_mask=response_mask), metrics


@dataclass(frozen=True)
class Sequences:
    """Log-ratios of whole trajectories, also where these are several rows: [S, L]."""

    log_ratio: Tensor
    mask: Tensor
    joined: Joined | None

    @classmethod
    def of(cls, data: DataProto, mask: Tensor, log_ratio: Tensor) -> "Sequences":
        """The sequences of a batch, from `mask` and `log_ratio` [B, R]."""
        if not has_several_rows(data):
            return cls(log_ratio, mask, None)
        joined = Joined.of(data, mask)
        return cls(joined.join(log_ratio), joined.joined_mask, joined)

    def of_rows(self, values: Tensor) -> Tensor:
        """[S, L] -> [B, R]."""
        return values if self.joined is None else self.joined.split(values)


def correct_rollout(
    data: DataProto, config: RolloutCorrectionConfig
) -> tuple[DataProto, dict[str, float]]:
    """Applies the rollout correction; returns the batch and the metrics `rollout_corr/*`.

    The batch gets `rollout_is_weights` [B, R] if they are configured, and tokens that are not
    accepted are removed from its response mask.
    """
    batch = data.batch
    # observations are excluded even if they are trained on: they were not sampled
    mask = batch["response_mask"].bool() & (batch["turns"] >= 0)
    old = batch["old_log_probs"]
    sampled = batch["rollout_log_probs"]
    log_ratio = log_ratios(old, sampled, mask)
    metrics = mismatch(old, sampled, mask)
    sequences = Sequences.of(data, mask, log_ratio)
    if config.rollout_is is not None:
        weights = sequences.of_rows(
            importance_weights(
                sequences.log_ratio,
                sequences.mask,
                config.rollout_is,
                config.rollout_is_threshold,
            )
        )
        metrics |= {
            "is_weight/mean": masked_mean(weights, mask).item(),
            "is_weight/max": weights.max().item(),
        }
        data = data.with_tensors(rollout_is_weights=torch.where(mask, weights, 1.0))
    low = config.lowest_ratio
    high = config.rollout_rs_threshold
    veto = config.rollout_token_veto_threshold
    if config.rollout_rs is not None or veto is not None:
        keep = accepted(sequences.log_ratio, sequences.mask, config.rollout_rs, low, high, veto)
        out = mask & ~sequences.of_rows(keep)
        metrics["left_out"] = masked_mean(out.float(), mask).item()
        data = data.with_tensors(response_mask=batch["response_mask"] * ~out)
    if config.bypass_mode:
        data = data.with_tensors(old_log_probs=torch.where(mask, sampled, old))
    return data, {f"rollout_corr/{name}": value for name, value in metrics.items()}
