"""Trajectories to be rolled out, and what rolls them out."""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from verl.agent import Row, Trajectory
from verl.rollout.agent_worker import Failure, Job
from verl.workers.config import SamplingConfig


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
    """`sampling.n` jobs per row, one group each; `seed`, if given, seeds every call of each."""
    jobs: list[Job] = []
    for row, prompt in zip(rows, prompts, strict=True):
        uid = uuid.uuid4().hex
        for copy in range(sampling.n):
            job_seed = None if seed is None else seed + 1000 * len(jobs)
            jobs.append(Job(uid, f"{uid}-{copy}", row, prompt, job_seed))
    return jobs
