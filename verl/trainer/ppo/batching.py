"""From what the rollout returned to a batch that can be trained on: what is dropped, and which row
goes where."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from verl.agent import Source, Trajectory
from verl.protocol import DataProto, collate_trajectories
from verl.rollout.agent_worker import Failure, Job
from verl.trainer.config import FilterGroupsConfig
from verl.utils.reward import compare
from verl.utils.seqlen_balancing import balance


class RolloutFailed(RuntimeError):
    """Too many trajectories failed for reasons that are not the policy's."""


class NothingToLearn(RuntimeError):
    """A training step is left without a trajectory."""


@dataclass
class Drawn:
    """All that was rolled out for one training step, in however many batches of prompts."""

    num_batches: int = 0
    results: list[Trajectory | Failure] = field(default_factory=list)
    surviving: list[Trajectory] = field(default_factory=list)
    """Those that could be trained on, also where dynamic sampling leaves them out."""
    dropped: Counter[str] = field(default_factory=Counter)

    def add(
        self,
        results: Sequence[Trajectory | Failure],
        trajectories: Sequence[Trajectory],
        dropped: Mapping[str, int],
    ) -> None:
        """Adds one batch of prompts: everything that came back, what survived of it, and what
        `surviving` dropped."""
        self.num_batches += 1
        self.results += results
        self.surviving += trajectories
        self.dropped.update(dropped)

    def metrics(self) -> dict[str, float]:
        """`rollout/failed*`, `rollout/dropped_*` and `training/num_*` over all batches."""
        return {
            **failure_metrics(self.results),
            **{name: float(count) for name, count in self.dropped.items()},
            "training/num_gen_batches": float(self.num_batches),
            "training/num_trajectories": float(len(self.surviving)),
        }

    def nothing_left(self, filters: FilterGroupsConfig) -> str:
        """Why no trajectory is left to train on, and what to do."""
        if not self.surviving:
            counts = {**self.metrics(), "rollout/drawn": float(len(self.results))}
            listed = ", ".join(
                f"{name} {value:g}" for name, value in sorted(counts.items()) if "share" not in name
            )
            return f"no trajectory of this step can be trained on ({listed})"
        return (
            f"none of {len(self.surviving)} trajectories is in a group that differs in "
            f"{filters.metric} "
            "(algorithm.filter_groups), so nothing can be learned: try easier questions, or a "
            "denser reward"
        )


def failure_metrics(
    results: Sequence[Trajectory | Failure], prefix: str = "rollout"
) -> dict[str, float]:
    """Share of failed trajectories, in all and by the number of environment calls of the failed
    ones."""
    failed = [r for r in results if isinstance(r, Failure)]
    metrics = {
        f"{prefix}/failed_share": len(failed) / len(results),
        f"{prefix}/failed": float(len(failed)),
    }
    by_calls = Counter(f.num_calls for f in failed)
    return metrics | {
        f"{prefix}/failed/calls_{calls}": float(n) for calls, n in sorted(by_calls.items())
    }


def rollout_metrics(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Reward components, tokens by author, and contexts that were not a prefix of their trajectory
    (must be 0)."""
    size = len(trajectories)
    metrics = {f"reward/{name}": mean for name, mean in component_means(trajectories).items()}
    metrics |= {
        f"rollout/{s}_tokens": sum(t.num_tokens(s) for t in trajectories) / size for s in Source
    }
    return metrics | {
        "rollout/context_violations": float(sum(t.context_violations for t in trajectories))
    }


def component_means(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Mean of every component of the reward, over the trajectories that have it."""
    values: dict[str, list[float]] = {}
    for trajectory in trajectories:
        for name, value in trajectory.reward.items():
            values.setdefault(name, []).append(value)
    return {
        name: sum(values[name]) / len(values[name]) for name in sorted(values.keys() - {"score"})
    }


def check_failures(results: Sequence[Trajectory | Failure], limit: float) -> None:
    """Raises RolloutFailed, with the commonest causes, when more than the share `limit` of a batch
    failed."""
    failed = [r.message for r in results if isinstance(r, Failure)]
    if len(failed) > limit * len(results) or len(failed) == len(results):
        causes = "\n".join(f"  {n} x {cause}" for cause, n in Counter(failed).most_common(3))
        raise RolloutFailed(
            f"{len(failed)} of {len(results)} trajectories failed, more than "
            f"trainer.max_failed_share={limit}:\n"
            f"{causes}\n"
            "The last checkpoint is intact: repair the cause, then run the same command again to "
            "resume."
        )


def groups_of(jobs: Sequence[Job], trajectories: Sequence[Trajectory]) -> list[list[Trajectory]]:
    """The trajectories of each prompt."""
    groups: dict[str, list[Trajectory]] = {}
    for job, trajectory in zip(jobs, trajectories, strict=True):
        groups.setdefault(job.uid, []).append(trajectory)
    return list(groups.values())


def score_groups(
    reward: Any, jobs: Sequence[Job], results: Sequence[Trajectory | Failure], min_group: int
) -> list[Trajectory | Failure]:
    """The results after a reward that has `score_groups` has compared the trajectories of each
    prompt.

    A trajectory that this leaves without a finite score is a failure. Raises RewardError when the
    reward raises.
    """
    if not hasattr(reward, "score_groups"):
        return list(results)
    compared_jobs, compared, _ = surviving(jobs, results, min_group)
    if not compared:
        return list(results)
    failed = compare(reward, groups_of(compared_jobs, compared))
    failures = {key: Failure(str(error.args[0]), error.num_calls) for key, error in failed.items()}
    return [failures.get(id(result), result) for result in results]


def surviving(
    jobs: Sequence[Job], results: Sequence[Trajectory | Failure], min_group: int
) -> tuple[list[Job], list[Trajectory], dict[str, int]]:
    """Trajectories to train on: those that did not fail, wrote a token, and whose group keeps
    `min_group` members.

    And how many were dropped for the two latter reasons, under the names of their metrics.
    With one survivor the advantage of GRPO would be the bare reward, so its group goes too.
    """
    alive = [
        (job, result)
        for job, result in zip(jobs, results, strict=True)
        if isinstance(result, Trajectory) and result.num_tokens(Source.MODEL)
    ]
    sizes = Counter(job.uid for job, _ in alive)
    kept = [(job, result) for job, result in alive if sizes[job.uid] >= min_group]
    empty = sum(isinstance(r, Trajectory) and not r.num_tokens(Source.MODEL) for r in results)
    dropped = {
        "rollout/dropped_empty": empty,
        "rollout/dropped_small_group": len(alive) - len(kept),
    }
    return [job for job, _ in kept], [result for _, result in kept], dropped


def build_batch(
    jobs: Sequence[Job],
    trajectories: Sequence[Trajectory],
    *,
    pad_token_id: int,
    num_mini_batches: Mapping[str, int],
    world_size: int,
    state_masking: bool,
) -> DataProto:
    """The batch, its rows ordered by rank, with `uid`, `data_source` and the columns of
    `num_mini_batches`.

    `num_mini_batches` says for the actor, and for the critic where there is one, how many optimizer
    steps the batch takes. Consecutive rows form mini-batches, so that a group stays together; each
    mini-batch is spread over the ranks with nearly equal tokens. `meta_info["rank_sizes"]` is what
    each rank gets. Without `state_masking` every response token is trained on (the paper's
    ablation); this is the only place that decides it.
    """
    lengths = [len(t.prompt_ids) + sum(len(s.token_ids) for s in t.segments) for t in trajectories]
    place = np.arange(len(lengths))
    mini_batches = {
        column: place * number // len(lengths) for column, number in num_mini_batches.items()
    }
    ranks = rows_of_ranks(lengths, list(mini_batches.values()), world_size)
    order = [
        row for rank in ranks for row in rank
    ]  # before there is a batch: it is too large to be copied for it
    data = collate_trajectories([trajectories[row] for row in order], pad_token_id)
    if not state_masking:
        prompt_len = data.batch["prompts"].shape[1]
        data = data.with_tensors(response_mask=data.batch["attention_mask"][:, prompt_len:])
    return DataProto.from_dict(
        {
            **data.batch,
            **{column: torch.from_numpy(index[order]) for column, index in mini_batches.items()},
        },
        {
            "uid": np.array([jobs[row].uid for row in order], dtype=object),
            "data_source": np.array([jobs[row].row["data_source"] for row in order], dtype=object),
        },
        {"rank_sizes": [len(rank) for rank in ranks], "num_mini_batches": dict(num_mini_batches)},
    )


def rows_of_ranks(
    lengths: Sequence[int], mini_batches: Sequence[np.ndarray], world_size: int
) -> list[list[int]]:
    """The rows of each rank: every mini-batch [B] spread over all of them, with nearly equal tokens
    for each.

    Of several divisions into mini-batches (the actor's and the critic's), each piece between two
    borders is spread, so that the mini-batches of all divisions are. Where rows do not divide
    evenly, the parts with more rows go to another rank in each piece.
    """
    ranks: list[list[int]] = [[] for _ in range(world_size)]
    _, piece_of_row = np.unique(np.stack(mini_batches), axis=1, return_inverse=True)
    for piece in range(int(piece_of_row.max()) + 1):
        rows = np.flatnonzero(piece_of_row == piece).tolist()
        parts = balance([lengths[row] for row in rows], world_size)
        first = piece % world_size
        for rank, part in enumerate(parts[first:] + parts[:first]):
            ranks[rank] += [rows[i] for i in part]
    return ranks
