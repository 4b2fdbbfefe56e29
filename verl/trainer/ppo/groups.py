"""Groups: the trajectories of one prompt, which are compared, and kept or dropped together."""

from collections import Counter
from collections.abc import Sequence

import torch

from verl.agent import GroupReward, RewardFn, Source, Trajectory
from verl.rollout.agent_worker import Failure, Job
from verl.trainer.ppo.core_algos import are_equal
from verl.utils.errors import RewardError
from verl.utils.reward import compare


def groups_of(jobs: Sequence[Job], trajectories: Sequence[Trajectory]) -> list[list[Trajectory]]:
    """The trajectories of each prompt."""
    groups: dict[str, list[Trajectory]] = {}
    for job, trajectory in zip(jobs, trajectories, strict=True):
        groups.setdefault(job.uid, []).append(trajectory)
    return list(groups.values())


def score_groups(
    reward: RewardFn | None,
    jobs: Sequence[Job],
    results: Sequence[Trajectory | Failure],
    min_group: int,
) -> list[Trajectory | Failure]:
    """Lets a reward that has `score_groups` compare the trajectories of each prompt.

    Returns the results, in which a trajectory without a finite score afterwards is a failure.
    Raises RewardError when the reward raises.
    """
    if not isinstance(reward, GroupReward):
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
    """The trajectories that can be trained on with their jobs, and counts of dropped ones.

    They did not fail, have a token of the policy, and their group has `min_group` such members. A
    group with one survivor is dropped because its advantage in GRPO would be the bare reward. The
    counts are by the name of their metric.
    """
    alive = [
        (job, result)
        for job, result in zip(jobs, results, strict=True)
        if isinstance(result, Trajectory) and result.num_tokens(Source.MODEL)
    ]
    sizes = Counter(job.uid for job, _ in alive)
    kept = [(job, result) for job, result in alive if sizes[job.uid] >= min_group]
    num_trajectories = sum(isinstance(result, Trajectory) for result in results)
    dropped = {
        "rollout/dropped_empty": num_trajectories - len(alive),
        "rollout/dropped_small_group": len(alive) - len(kept),
    }
    return [job for job, _ in kept], [result for _, result in kept], dropped


def differing_groups(
    jobs: Sequence[Job], trajectories: Sequence[Trajectory], metric: str
) -> tuple[list[Job], list[Trajectory]]:
    """The trajectories of groups in which the rewards differ in `metric`, with their jobs.

    Raises RewardError for a reward without `metric`.
    """
    values = numbers_of_groups(jobs, trajectories, metric, "algorithm.filter_groups.metric")
    differing = {uid for uid, found in values.items() if not are_equal(torch.tensor(found))}
    return of_groups(jobs, trajectories, differing)


def numbers_of_groups(
    jobs: Sequence[Job], trajectories: Sequence[Trajectory], metric: str, key: str
) -> dict[str, list[float]]:
    """By uid, the numbers `metric` of the rewards of each group.

    Raises RewardError, naming the entries that there are, for a reward without `metric`. `key` is
    the key of the configuration that asks for it.
    """
    if lacking := [t for t in trajectories if metric not in t.reward]:
        raise RewardError(
            f"{key}={metric}: the reward of {len(lacking)} of "
            f"{len(trajectories)} trajectories has no such number, only "
            f"{', '.join(sorted(lacking[0].reward))}: name one of these, or let the reward return "
            "it for every trajectory"
        )
    values: dict[str, list[float]] = {}
    for job, trajectory in zip(jobs, trajectories, strict=True):
        values.setdefault(job.uid, []).append(trajectory.reward[metric])
    return values


def first_groups(
    jobs: Sequence[Job], trajectories: Sequence[Trajectory], count: int
) -> tuple[list[Job], list[Trajectory]]:
    """The trajectories of the first `count` groups, with their jobs."""
    in_order = list(dict.fromkeys(job.uid for job in jobs))
    return of_groups(jobs, trajectories, set(in_order[:count]))


def of_groups(
    jobs: Sequence[Job], trajectories: Sequence[Trajectory], uids: set[str]
) -> tuple[list[Job], list[Trajectory]]:
    """The trajectories of the groups `uids`, with their jobs."""
    kept = [(job, t) for job, t in zip(jobs, trajectories, strict=True) if job.uid in uids]
    return [job for job, _ in kept], [trajectory for _, trajectory in kept]
