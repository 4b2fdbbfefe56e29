"""Trajectories to be rolled out, and what rolls them out."""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from verl.agent import Row, Trajectory
from verl.rollout.agent_worker import Failure, Job
from verl.workers.config import BranchesConfig, SamplingConfig


@dataclass(frozen=True)
class Submitted:
    """Trajectories under way."""

    jobs: list[Job]
    parts: list[list[Job]]
    """The jobs that each agent worker got."""
    running: list[Any]
    """The pending call to each of these agent workers."""
    name: str = "rollout"
    """What the progress messages call them."""


class Rollout(Protocol):
    """Rolls out rows: engines under Ray (`RolloutManager`) or an endpoint (`LocalRollout`)."""

    @property
    def capacity(self) -> int:
        """The number of trajectories that must be under way to keep it busy."""
        ...

    def submit(
        self, rows: Sequence[Row], prompts: Sequence[list[int]], sampling: SamplingConfig, seed: int
    ) -> Submitted:
        """Starts `sampling.n` trajectories per row."""
        ...

    def first_done(self, pending: Sequence[Submitted]) -> int:
        """Waits until one of them has ended; returns its index."""
        ...

    def collect(self, submitted: Submitted) -> tuple[list[Job], list[Trajectory | Failure]]:
        """Waits for jobs and results, in the order in which they were submitted."""
        ...


def make_jobs(
    rows: Sequence[Row], prompts: Sequence[list[int]], sampling: SamplingConfig, seed: int | None
) -> list[Job]:
    """`sampling.n` jobs per row, one group each; `seed`, if given, seeds every call of each.

    Consecutive jobs of a row form a tree where trajectories branch off each other.
    """
    jobs: list[Job] = []
    branching = sampling.branching
    for row, prompt in zip(rows, prompts, strict=True):
        uid = uuid.uuid4().hex
        for copy in range(sampling.n):
            tree, member = divmod(copy, branching.tree_size)
            first = copy - member
            parents = range(first, first + earlier_members(branching, member))
            job_seed = None if seed is None else seed + 1000 * len(jobs)
            begins_from = tuple(f"{uid}-{parent}" for parent in parents)
            jobs.append(Job(uid, f"{uid}-{copy}", row, prompt, job_seed, tree, begins_from))
    return jobs


def earlier_members(branching: BranchesConfig, member: int) -> int:
    """How many trajectories a tree has before the round in which its `member` is rolled out.

    >>> [earlier_members(BranchesConfig(rounds=2, per_round=2), member) for member in range(5)]
    [0, 1, 1, 3, 3]
    """
    if member == 0:
        return 0
    rounds_before = (member - 1) // branching.per_round
    return 1 + rounds_before * branching.per_round
