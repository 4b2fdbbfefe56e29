"""Which trajectories a step trains on: groups that teach nothing are replaced, others left out of the policy loss."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from verl.agent import Trajectory
from verl.protocol import DataProto
from verl.workers.rollout.agent_worker import Job

Rolled = tuple[list[Job], list[Trajectory]]


def differing_groups(jobs: Sequence[Job], trajectories: Sequence[Trajectory], metric: str) -> Rolled:
    """The trajectories of groups that do not all have the same `metric` in their reward.

    Raises KeyError for a reward without it.
    """
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
    return (data.batch["advantages"] == 0).all(1)


FILTERS: dict[str, Callable[[DataProto], Tensor]] = {
    "zero_variance": _zero_variance,
    "void_turn": lambda data: data.batch["void_turns"] > 0,
    "truncated": lambda data: data.batch["truncated"],
}
"""Rows [B] to leave out."""


def filter_loss(data: DataProto, names: Sequence[str]) -> tuple[DataProto, dict[str, float]]:
    """The batch with the response mask of filtered rows emptied, so that they are neither trained on nor counted, and
    the share that each filter took."""
    left_out = {name: FILTERS[name](data) for name in names}
    metrics = {f"rollout/filtered/{name}": float(rows.float().mean()) for name, rows in left_out.items()}
    out = torch.zeros(len(data), dtype=torch.bool)
    for rows in left_out.values():
        out |= rows
    return data.with_tensors(response_mask=data.batch["response_mask"] * ~out.unsqueeze(1)), metrics
