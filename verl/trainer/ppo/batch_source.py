"""Makes the batch of a training step: rolls out prompts, scores, filters and lays out rows."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from verl.agent import RewardFn, Source, Trajectory
from verl.protocol import DataProto
from verl.rollout.agent_worker import Failure, Job
from verl.rollout.manager import RolloutManager
from verl.trainer.config import FilterGroupsConfig, PPOConfig
from verl.trainer.ppo.batching import build_batch
from verl.trainer.ppo.failures import check_failures, failure_metrics
from verl.trainer.ppo.greedy import greedy_metrics, with_greedy_scores
from verl.trainer.ppo.groups import (
    differing_groups,
    first_groups,
    numbers_of_groups,
    score_groups,
    surviving,
)
from verl.trainer.ppo.rollout_queue import RolloutQueue
from verl.utils.dataset import RLHFDataset


class NothingToLearn(RuntimeError):
    """A training step is left without a trajectory."""


@dataclass
class Rollouts:
    """All that was rolled out for one training step, in however many batches of prompts."""

    jobs: list[Job] = field(default_factory=list)
    trajectories: list[Trajectory] = field(default_factory=list)
    """The trajectories to train on, one for each of `jobs`."""
    num_batches: int = 0
    rows: list[int] = field(default_factory=list)
    """The row numbers of all prompts."""
    results: list[Trajectory | Failure] = field(default_factory=list)
    greedy: list[Trajectory | Failure] = field(default_factory=list)
    """The greedy trajectory of each prompt, if they are rolled out."""
    surviving: list[Trajectory] = field(default_factory=list)
    """All that could be trained on, including those that dynamic sampling leaves out."""
    dropped: Counter[str] = field(default_factory=Counter)
    drawn: dict[str, float] = field(default_factory=dict)
    """Metrics of which questions were drawn: shares of their sources, and what the gate did."""

    def add(
        self,
        results: Sequence[Trajectory | Failure],
        trajectories: Sequence[Trajectory],
        dropped: Mapping[str, int],
        *,
        rows: Sequence[int] = (),
        greedy: Sequence[Trajectory | Failure] = (),
    ) -> None:
        """Adds a batch of prompts: all results, what survived of them, and what was dropped.

        `rows`: the row numbers of the prompts. `greedy`: their greedy trajectories, where these are
        rolled out.
        """
        self.num_batches += 1
        self.rows += rows
        self.results += results
        self.greedy += greedy
        self.surviving += trajectories
        self.dropped.update(dropped)

    @property
    def num_groups(self) -> int:
        """The number of prompts whose trajectories are to be trained on."""
        return len({job.uid for job in self.jobs})

    def metrics(self) -> dict[str, float]:
        """`rollout/failed*`, `rollout/dropped_*`, `greedy/*`, `training/num_*` of all batches."""
        return {
            **failure_metrics(self.results),
            **greedy_metrics(self.greedy, self.results),
            **{name: float(count) for name, count in self.dropped.items()},
            "training/num_gen_batches": float(self.num_batches),
            "training/num_trajectories": float(len(self.surviving)),
            **self.drawn,
        }

    def nothing_left(self, filters: FilterGroupsConfig) -> str:
        """A message: why no trajectory is left to train on, and what to do."""
        if not self.surviving:
            counts = {**self.metrics(), "rollout/drawn": float(len(self.results))}
            listed = ", ".join(
                f"{name} {value:g}" for name, value in sorted(counts.items()) if "share" not in name
            )
            return f"no trajectory of this step can be trained on ({listed})"
        return (
            f"none of {len(self.surviving)} trajectories is in a group that differs in "
            f"{filters.metric} (algorithm.filter_groups), so nothing can be learned: try easier "
            "questions, or a denser reward"
        )


class BatchSource:
    """Rolls out the prompts of each training step and makes its batch.

    The agent workers score a trajectory as it ends; a reward that compares the trajectories of a
    prompt (`score_groups`) is computed here, once all of them are there.
    """

    def __init__(
        self,
        config: PPOConfig,
        train_set: RLHFDataset,
        rollout: RolloutManager,
        reward: RewardFn | None,
        pad_token_id: int,
        world_size: int,
    ) -> None:
        self.config = config
        self.train_set = train_set
        self.reward = reward
        self.pad_token_id = pad_token_id
        self.world_size = world_size
        self.queue = RolloutQueue(config, train_set, rollout)
        self.min_group = 2 if config.uses_groups else 1

    def roll_out(self, steps_left: int) -> Rollouts:
        """Waits for the scored trajectories of a step, and drops what cannot be trained on.

        With `algorithm.filter_groups` further batches are drawn until enough groups have differing
        scores. `steps_left`: training steps that still need a batch, this one included. Raises
        NothingToLearn, RolloutFailed when too many failed, RewardError.
        """
        filters = self.config.algorithm.filter_groups
        most = filters.max_num_gen_batches if filters.enable else 1
        wanted = self.config.data.train_batch_size
        rollouts = Rollouts()
        while rollouts.num_batches < most and rollouts.num_groups < wanted:
            self._add_batch(rollouts, steps_left)
        chosen = first_groups(rollouts.jobs, rollouts.trajectories, wanted)
        rollouts.jobs, rollouts.trajectories = chosen
        rollouts.drawn = self._drawn_metrics(rollouts.rows)
        return rollouts

    def _add_batch(self, rollouts: Rollouts, steps_left: int) -> None:
        """Adds the next batch of prompts, without failures and groups that all score the same."""
        filters = self.config.algorithm.filter_groups
        rolled = self.queue.next_batch(steps_left)
        jobs = rolled.jobs
        row_of = dict(zip(dict.fromkeys(job.uid for job in jobs), rolled.rows, strict=True))
        results = score_groups(self.reward, jobs, rolled.results, self.min_group)
        if self.config.uses_greedy:
            results = with_greedy_scores(jobs, results, rolled.greedy)
        check_failures(results, self.config.trainer.max_failed_share)
        jobs, trajectories, dropped = surviving(jobs, results, self.min_group)
        rollouts.add(results, trajectories, dropped, rows=rolled.rows, greedy=rolled.greedy)
        if self.config.data.gate.is_on:
            self._observe(row_of, jobs, trajectories)
        if filters.enable:
            jobs, trajectories = differing_groups(jobs, trajectories, filters.metric)
        rollouts.jobs += jobs
        rollouts.trajectories += trajectories

    def _observe(
        self, row_of: Mapping[str, int], jobs: Sequence[Job], trajectories: Sequence[Trajectory]
    ) -> None:
        """Tells the gate how each group has scored. `row_of`: row numbers by uid."""
        metric = self.config.data.gate.metric
        values = numbers_of_groups(jobs, trajectories, metric, "data.gate.metric")
        for uid, numbers in values.items():
            self.queue.sampler.gate.observe(row_of[uid], numbers)

    def _drawn_metrics(self, rows: Sequence[int]) -> dict[str, float]:
        """`data/share/*` of the questions of a step, and `gate/*`, where these are configured."""
        data = self.config.data
        metrics: dict[str, float] = {}
        if data.source_weights:
            sources = Counter(self.train_set.rows[row]["data_source"] for row in rows)
            for source in data.source_weights:
                metrics[f"data/share/{source}"] = sources[source] / len(rows)
        if data.gate.is_on:
            metrics |= self.queue.sampler.gate.take_metrics()
        return metrics

    def build(self, rollouts: Rollouts) -> DataProto:
        """Builds the batch to train on. Raises NothingToLearn when no trajectory is left."""
        config = self.config
        if not rollouts.trajectories:
            raise NothingToLearn(rollouts.nothing_left(config.algorithm.filter_groups))
        return build_batch(
            rollouts.jobs,
            rollouts.trajectories,
            pad_token_id=self.pad_token_id,
            num_mini_batches=config.num_mini_batches,
            world_size=self.world_size,
            state_masking=config.actor_rollout_ref.actor.state_masking,
        )

    def drain_before_sync(self) -> None:
        """Waits for trajectories under way, unless they may get new weights between two turns."""
        self.queue.drain_before_sync()

    @property
    def epoch(self) -> int:
        """The number of completed passes over the training questions."""
        return self.queue.epoch

    def state_dict(self) -> dict[str, Any]:
        """The position in the data from which a resumed run draws its next batch."""
        return self.queue.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a `state_dict`, and forgets the batches under way."""
        self.queue.load_state_dict(state)


def trajectory_metrics(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Reward components, tokens by author, and context violations, of which there must be none."""
    size = len(trajectories)
    metrics = {f"reward/{name}": mean for name, mean in component_means(trajectories).items()}
    for source in Source:
        num_tokens = sum(trajectory.num_tokens(source) for trajectory in trajectories)
        metrics[f"rollout/{source}_tokens"] = num_tokens / size
    violations = sum(trajectory.context_violations for trajectory in trajectories)
    metrics["rollout/context_violations"] = float(violations)
    return metrics


def branch_metrics(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """What the trees of a step cost: tokens of the policy, sampled or taken over.

    A token is taken over by a trajectory that begins with it after another one had sampled it.
    """
    written = 0
    shared = 0
    for trajectory in trajectories:
        written += trajectory.num_tokens(Source.MODEL)
        taken_over = trajectory.turns[: trajectory.shared_turns]
        shared += sum(len(turn.token_ids) for turn in taken_over)
    branched = [t.shared_turns for t in trajectories if t.shared_turns]
    return {
        "branches/generated_tokens": float(written - shared),
        "branches/shared_tokens": float(shared),
        "branches/shared_tokens_share": shared / max(1, written),
        "branches/shared_turns": sum(branched) / max(1, len(branched)),
    }


def component_means(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Mean of every component of the reward, over the trajectories that have it."""
    values: dict[str, list[float]] = {}
    for trajectory in trajectories:
        for name, value in trajectory.reward.items():
            values.setdefault(name, []).append(value)
    components = sorted(values.keys() - {"score"})
    return {name: sum(values[name]) / len(values[name]) for name in components}
