"""Counts trajectories that the environment broke, and ends the run when there are too many."""

from collections import Counter
from collections.abc import Sequence

from verl.agent import Trajectory
from verl.rollout.agent_worker import Failure


class RolloutFailed(RuntimeError):
    """Too many trajectories failed for reasons that are not the policy's."""


def failure_metrics(
    results: Sequence[Trajectory | Failure], prefix: str = "rollout"
) -> dict[str, float]:
    """Share of failed trajectories, over all and by their number of environment calls."""
    failed = [result for result in results if isinstance(result, Failure)]
    metrics = {
        f"{prefix}/failed_share": len(failed) / len(results),
        f"{prefix}/failed": float(len(failed)),
    }
    by_calls = Counter(failure.num_calls for failure in failed)
    for calls, count in sorted(by_calls.items()):
        metrics[f"{prefix}/failed/calls_{calls}"] = float(count)
    return metrics


def check_failures(results: Sequence[Trajectory | Failure], limit: float) -> None:
    """Raises RolloutFailed, with the commonest causes, when too many trajectories failed.

    `limit` is the largest share of failed trajectories that is accepted.
    """
    failed = [result.message for result in results if isinstance(result, Failure)]
    if len(failed) <= limit * len(results) and len(failed) < len(results):
        return
    causes = [f"  {count} x {cause}" for cause, count in Counter(failed).most_common(3)]
    raise RolloutFailed(
        f"{len(failed)} of {len(results)} trajectories failed, more than "
        f"trainer.max_failed_share={limit}:\n" + "\n".join(causes) + "\n"
        "The last checkpoint is intact: repair the cause, then run the same command again to "
        "resume."
    )
