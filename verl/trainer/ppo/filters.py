"""What the policy loss sees: groups that teach nothing are replaced, rows filtered, another sampler
corrected for."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from verl.agent import Trajectory
from verl.protocol import DataProto
from verl.rollout.agent_worker import Job
from verl.trainer.config import RolloutCorrectionConfig
from verl.trainer.ppo.core_algos import (
    accepted,
    group_rows,
    importance_weights,
    log_ratios,
    mismatch,
)
from verl.utils.errors import RewardError
from verl.utils.torch_functional import masked_mean, masked_sum

Rolled = tuple[list[Job], list[Trajectory]]


def differing_groups(
    jobs: Sequence[Job], trajectories: Sequence[Trajectory], metric: str
) -> Rolled:
    """The trajectories of groups that do not all have the same `metric` in their reward.

    Raises RewardError naming what there is for a reward without it.
    """
    if lacking := [t for t in trajectories if metric not in t.reward]:
        raise RewardError(
            f"algorithm.filter_groups.metric={metric}: the reward of {len(lacking)} of "
            f"{len(trajectories)} "
            f"trajectories has no such number, only {', '.join(sorted(lacking[0].reward))}: name "
            "one of these, or let "
            "the reward return it for every trajectory"
        )
    values: dict[str, set[float]] = {}
    for job, trajectory in zip(jobs, trajectories, strict=True):
        values.setdefault(job.uid, set()).add(trajectory.reward[metric])
    kept = [(job, t) for job, t in zip(jobs, trajectories, strict=True) if len(values[job.uid]) > 1]
    return [job for job, _ in kept], [t for _, t in kept]


def first_groups(jobs: Sequence[Job], trajectories: Sequence[Trajectory], count: int) -> Rolled:
    """The trajectories of the first `count` groups."""
    names = set(list(dict.fromkeys(job.uid for job in jobs))[:count])
    kept = [(job, t) for job, t in zip(jobs, trajectories, strict=True) if job.uid in names]
    return [job for job, _ in kept], [t for _, t in kept]


def _zero_variance(data: DataProto) -> Tensor:
    """By the scores, not by the advantages: whitening, a critic or a KL in the reward make all of
    those differ."""
    scores = masked_sum(data.batch["token_level_scores"], data.batch["response_mask"], axis=-1)
    same = torch.zeros(len(data), dtype=torch.bool)
    for rows in group_rows(data.non_tensor_batch["uid"]):
        same[rows] = (scores[rows] == scores[rows[0]]).all()
    return same


FILTERS: dict[str, Callable[[DataProto], Tensor]] = {
    "zero_variance": _zero_variance,
    "void_turn": lambda data: data.batch["void_turns"] > 0,
    "truncated": lambda data: data.batch["truncated"],
}
"""Rows [B] to leave out."""


def filter_loss(data: DataProto, names: Sequence[str]) -> tuple[DataProto, dict[str, float]]:
    """The batch with the response mask of filtered rows emptied, so that they are neither trained
    on nor counted, and the share that each filter took."""
    left_out = {name: FILTERS[name](data) for name in names}
    metrics = {
        f"rollout/filtered/{name}": float(rows.float().mean()) for name, rows in left_out.items()
    }
    out = torch.zeros(len(data), dtype=torch.bool)
    for rows in left_out.values():
        out |= rows
    return data.with_tensors(response_mask=data.batch["response_mask"] * ~out.unsqueeze(1)), metrics


def correct_rollout(
    data: DataProto, config: RolloutCorrectionConfig
) -> tuple[DataProto, dict[str, float]]:
    """The batch as the policy loss is to see it: with `rollout_is_weights`, and without tokens that
    are not accepted.

    And `rollout_corr/*`: the mismatch of sampler and trainer, and what was done about it.
    """
    batch = data.batch
    # without observations, also where they are trained on
    mask = batch["response_mask"].bool() & (batch["turns"] >= 0)
    old = batch["old_log_probs"]
    sampled = batch["rollout_log_probs"]
    log_ratio = log_ratios(old, sampled, mask)
    metrics = mismatch(old, sampled, mask)
    if config.rollout_is is not None:
        weights = importance_weights(
            log_ratio, mask, config.rollout_is, config.rollout_is_threshold
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
        out = mask & ~accepted(log_ratio, mask, config.rollout_rs, low, high, veto)
        metrics["left_out"] = masked_mean(out.float(), mask).item()
        data = data.with_tensors(response_mask=batch["response_mask"] * ~out)
    if config.bypass_mode:
        data = data.with_tensors(old_log_probs=torch.where(mask, sampled, old))
    return data, {f"rollout_corr/{name}": value for name, value in metrics.items()}
