"""Validation: the same agent loop over every held-out question; nothing is filtered."""

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verl.agent import AgentLoop, Source, Trajectory
from verl.rollout.agent_worker import Failure, Job
from verl.rollout.job import Submitted
from verl.rollout.manager import RolloutManager
from verl.rollout.records import trajectory_records
from verl.trainer.config import PPOConfig
from verl.trainer.ppo.batch_source import component_means
from verl.trainer.ppo.failures import check_failures, failure_metrics
from verl.trainer.preparation import Task
from verl.utils.dataset import RLHFDataset
from verl.utils.tracking import STEP, Tracking


@dataclass(frozen=True)
class Validated:
    """A validation that has ended."""

    step: int
    """The step of the weights that were validated."""
    metrics: dict[str, float]


class Validator:
    """Rolls out every held-out question, one validation at a time.

    With engines of its own (`rollout.num_val_replicas`) it goes on while further steps are trained.
    """

    def __init__(
        self,
        config: PPOConfig,
        val_set: RLHFDataset,
        rollout: RolloutManager,
        task: Task,
        tracking: Tracking,
    ) -> None:
        self.config = config
        self.val_set = val_set
        self.rollout = rollout
        self.task = task
        self.tracking = tracking
        self._under_way: tuple[int, Submitted] | None = None

    @property
    def step(self) -> int | None:
        """The step of the weights under validation; None if none is under way."""
        return None if self._under_way is None else self._under_way[0]

    @property
    def is_done(self) -> bool:
        """Whether a validation is under way and complete, so that `finish` would not wait."""
        return self._under_way is not None and self.rollout.is_done(self._under_way[1])

    def start(self, step: int) -> None:
        """Starts to roll out under the weights of `step`, which the engines must hold."""
        sampling = self.config.actor_rollout_ref.rollout.val_kwargs
        submitted = self.rollout.submit(
            self.val_set.rows,
            self.val_set.prompt_ids,
            sampling,
            seed=self.config.trainer.seed,
            name="validation",
        )
        self._under_way = (step, submitted)

    def finish(self) -> Validated | None:
        """Waits for the validation under way, writes its trajectories, and returns its metrics."""
        if self._under_way is None:
            return None
        step, submitted = self._under_way
        self._under_way = None
        jobs, results = self.rollout.collect(submitted)
        metrics, records = score(self.config, jobs, results, self.task)
        self.tracking.log_trajectories("val", records, step)
        scores = [f"{k} {v:.3f}" for k, v in sorted(metrics.items()) if "test_score" in k]
        self.tracking.message(f"step {step}: " + "  ".join(scores))
        return Validated(step, metrics)

    def forget(self) -> None:
        """Gives up the validation under way."""
        self._under_way = None


def score(
    config: PPOConfig, jobs: Sequence[Job], results: Sequence[Trajectory | Failure], task: Task
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """`val/` metrics, by data source and over all, and the records of all trajectories.

    With `val_kwargs.n` = k samples per question, `val/pass@k` is the share of questions with a
    sample that scores 1. A reward component is averaged over the trajectories that have it. A
    trajectory that failed twice is counted in `val/failed` and has no score.
    """
    check_failures(results, config.trainer.max_failed_share)
    sampled = [(job, r) for job, r in zip(jobs, results, strict=True) if isinstance(r, Trajectory)]
    trajectories = [trajectory for _, trajectory in sampled]
    for trajectory in trajectories:
        if not trajectory.num_tokens(Source.MODEL):
            trajectory.reward = {"score": 0.0}
    samples = config.actor_rollout_ref.rollout.val_kwargs.n
    metrics = failure_metrics(results, "val") | source_metrics(sampled, samples, task.agent)
    metrics["val/test_score/all"] = mean_score(trajectories)
    figures = task.agent.reduce_metrics(trajectories)
    metrics |= {f"val/{name}": value for name, value in figures.items()}
    records = trajectory_records(
        [job for job, _ in sampled],
        trajectories,
        task.tokenizer,
        with_token_ends=config.trainer.trajectory_records.tokens,
    )
    return metrics, records


def source_metrics(
    sampled: Sequence[tuple[Job, Trajectory]], samples: int, agent: AgentLoop
) -> dict[str, float]:
    """`val/<name>/<source>`: the figures of every data source, see `figures_of`."""
    by_source: dict[str, list[tuple[Job, Trajectory]]] = defaultdict(list)
    for job, trajectory in sampled:
        by_source[job.row["data_source"]].append((job, trajectory))
    metrics: dict[str, float] = {}
    for source, of_source in by_source.items():
        figures = figures_of(of_source, samples, agent)
        metrics |= {f"val/{name}/{source}": value for name, value in figures.items()}
    return metrics


def figures_of(
    sampled: Sequence[tuple[Job, Trajectory]], samples: int, agent: AgentLoop
) -> dict[str, float]:
    """The metrics of one data source, of which each question has up to `samples` trajectories."""
    trajectories = [trajectory for _, trajectory in sampled]
    figures = {"test_score": mean_score(trajectories)}
    if samples > 1:
        figures[f"pass@{samples}"] = share_solved(sampled)
    return figures | component_means(trajectories) | agent.reduce_metrics(trajectories)


def share_solved(sampled: Sequence[tuple[Job, Trajectory]]) -> float:
    """Share of questions with a sample that scores 1."""
    solved: dict[str, bool] = {}
    for job, trajectory in sampled:
        solved[job.uid] = solved.get(job.uid, False) or trajectory.reward["score"] >= 1
    return sum(solved.values()) / len(solved)


def mean_score(trajectories: Sequence[Trajectory]) -> float:
    """Mean of the scores of at least one trajectory."""
    return sum(trajectory.reward["score"] for trajectory in trajectories) / len(trajectories)


def recorded(run_dir: Path, step: int) -> dict[str, float]:
    """Reads the `val/` metrics of `step` from the run folder.

    There are none if that validation was not finished.
    """
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return {}
    found: dict[str, float] = {}
    for line in path.read_text().splitlines():
        figures = json.loads(line)
        if figures[STEP] != step:
            continue
        for name, value in figures.items():
            if name.startswith("val/") and value is not None:
                found[name] = value
    return found
