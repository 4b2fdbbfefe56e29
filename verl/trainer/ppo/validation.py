"""Validation: the same agent loop over every held-out question; nothing is filtered."""

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from verl.agent import Source, Trajectory
from verl.rollout.agent_worker import Failure, Job
from verl.rollout.manager import RolloutManager, Submitted
from verl.rollout.records import trajectory_records
from verl.trainer.config import PPOConfig
from verl.trainer.ppo.batching import check_failures, component_means, failure_metrics
from verl.utils.dataset import RLHFDataset
from verl.utils.tracking import STEP


def submit(config: PPOConfig, val_set: RLHFDataset, rollout: RolloutManager) -> Submitted:
    """`val_kwargs.n` trajectories of every held-out question, under way or waiting for their
    turn."""
    sampling = config.actor_rollout_ref.rollout.val_kwargs
    return rollout.submit(
        val_set.rows, val_set.prompt_ids, sampling, seed=config.trainer.seed, name="validation"
    )


def score(
    config: PPOConfig,
    jobs: Sequence[Job],
    results: Sequence[Trajectory | Failure],
    agent: Any,
    tokenizer: Any,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """`val/` metrics, by data source and over all, and the records of all trajectories.

    With `val_kwargs.n` = k samples per question, `val/pass@k` is the share of questions with a
    sample that scores 1. A component is averaged over the trajectories that have it. A trajectory
    that failed twice is counted (`val/failed`), not scored.
    """
    sampling = config.actor_rollout_ref.rollout.val_kwargs
    check_failures(results, config.trainer.max_failed_share)
    done = [(job, r) for job, r in zip(jobs, results, strict=True) if isinstance(r, Trajectory)]
    by_source: dict[str, list[Trajectory]] = defaultdict(list)
    solved: dict[str, dict[str, bool]] = defaultdict(dict)
    for job, trajectory in done:
        if not trajectory.num_tokens(Source.MODEL):
            trajectory.reward = {"score": 0.0}
        source = job.row["data_source"]
        reward = trajectory.reward["score"]
        by_source[source].append(trajectory)
        solved[source][job.uid] = solved[source].get(job.uid, False) or reward >= 1
    metrics = failure_metrics(results, "val")
    for source, trajectories in by_source.items():
        metrics[f"val/test_score/{source}"] = mean_score(trajectories)
        if sampling.n > 1:
            metrics[f"val/pass@{sampling.n}/{source}"] = sum(solved[source].values()) / len(
                solved[source]
            )
        metrics |= {
            f"val/{name}/{source}": mean for name, mean in component_means(trajectories).items()
        }
        metrics |= {f"val/{k}/{source}": v for k, v in agent.reduce_metrics(trajectories).items()}
    metrics["val/test_score/all"] = mean_score([t for _, t in done])
    metrics |= {f"val/{k}": v for k, v in agent.reduce_metrics([t for _, t in done]).items()}
    return metrics, trajectory_records([j for j, _ in done], [t for _, t in done], tokenizer)


def recorded(run_dir: Path, step: int) -> dict[str, float]:
    """The `val/` metrics that the run folder has of `step`; none if its validation was not
    finished."""
    path = run_dir / "metrics.jsonl"
    lines = [json.loads(line) for line in path.open()] if path.exists() else []
    figures = [figure for line in lines if line[STEP] == step for figure in line.items()]
    return {name: value for name, value in figures if name.startswith("val/") and value is not None}


def mean_score(trajectories: Sequence[Trajectory]) -> float:
    return sum(t.reward["score"] for t in trajectories) / len(trajectories)
