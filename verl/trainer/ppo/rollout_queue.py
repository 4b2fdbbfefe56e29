"""The queue of batches that are rolled out ahead of the training."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from verl.agent import TRAINING_STEP, Trajectory
from verl.rollout.agent_worker import Failure, Job
from verl.rollout.job import Submitted
from verl.rollout.manager import RolloutManager
from verl.trainer.config import PPOConfig
from verl.trainer.ppo.greedy import GREEDY
from verl.trainer.ppo.question_sampler import QuestionSampler
from verl.utils.dataset import RLHFDataset
from verl.workers.config import SamplingConfig


@dataclass(frozen=True)
class Rolled:
    """A batch of prompts that was rolled out."""

    rows: list[int]
    """The row numbers of the prompts."""
    jobs: list[Job]
    results: list[Trajectory | Failure]
    """The trajectories to train on, one for each of `jobs`."""
    greedy: list[Trajectory | Failure] = field(default_factory=list)
    """The greedy trajectory of each prompt, if they are rolled out, in the order of the prompts."""


@dataclass(frozen=True)
class UnderWay:
    """A batch of prompts under way."""

    rows: list[int]
    """The row numbers of the prompts."""
    sampled: Submitted
    greedy: Submitted | None

    @property
    def submitted(self) -> list[Submitted]:
        """All that is under way for it."""
        return [self.sampled] if self.greedy is None else [self.sampled, self.greedy]


class RolloutQueue:
    """Batches of prompts under way, trained on in the order in which they were drawn.

    With `max_staleness` = s, s + 1 batches are under way while the next one is waited for. So the
    weights that sampled a batch are at most s updates older than those that it trains; with s = 0
    training is synchronous. The queue is first in, first out: taking whatever finishes first would
    favour short trajectories, and the order of the prompts would depend on timing. A resumed run
    begins with the questions that were under way: they depend on the step and on the scores at
    which they were drawn, and could not be drawn again.
    """

    def __init__(self, config: PPOConfig, train_set: RLHFDataset, rollout: RolloutManager) -> None:
        self.config = config
        self.train_set = train_set
        self.rollout = rollout
        self.sampler = QuestionSampler(config, train_set.rows)
        self.under_way: deque[UnderWay] = deque()

    def next_batch(self, steps_left: int) -> Rolled:
        """Waits for the oldest batch.

        Before it waits, it submits batches of the next steps. `steps_left`: training steps that
        still need a batch, this one included; no more batches than that are submitted.
        """
        wanted = max(1, min(self.config.async_training.max_staleness + 1, steps_left))
        while len(self.under_way) < wanted:
            self.under_way.append(self._submit())
        oldest = self.under_way.popleft()
        jobs, results = self.rollout.collect(oldest.sampled)
        if oldest.greedy is None:
            return Rolled(oldest.rows, jobs, results)
        _, greedy = self.rollout.collect(oldest.greedy)
        return Rolled(oldest.rows, jobs, results, greedy)

    def _submit(self) -> UnderWay:
        """Starts the next batch, and greedy trajectories of its prompts if they are needed."""
        step = self.rollout.version + 1
        rows = self.sampler.draw(self.config.data.train_batch_size, step)
        sampled = self._roll_out(rows, step, self.config.actor_rollout_ref.rollout)
        greedy = self._roll_out(rows, step, GREEDY) if self.config.uses_greedy else None
        return UnderWay(rows, sampled, greedy)

    def _roll_out(self, rows: Sequence[int], step: int, sampling: SamplingConfig) -> Submitted:
        return self.rollout.submit(
            [self.train_set.rows[row] | {TRAINING_STEP: step} for row in rows],
            [self.train_set.prompt_ids[row] for row in rows],
            sampling,
            seed=self.config.trainer.seed + 1_000_000 * self.sampler.drawn,
        )

    def drain_before_sync(self) -> None:
        """Waits for trajectories under way, unless they may get new weights between two turns."""
        if not self.config.async_training.partial_rollout:
            self.rollout.drain([s for batch in self.under_way for s in batch.submitted])

    @property
    def epoch(self) -> int:
        """The number of completed passes over the training questions."""
        return self.sampler.epoch

    def state_dict(self) -> dict[str, Any]:
        """The position in the data to resume from; batches under way are not yet trained on."""
        state = self.sampler.state_dict()
        under_way = [row for batch in self.under_way for row in batch.rows]
        state["waiting"] = under_way + state["waiting"]
        state["drawn"] -= len(self.under_way)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a `state_dict`, and forgets the batches under way."""
        self.under_way.clear()
        self.sampler.load_state_dict(state)
