"""The queue of batches that are rolled out ahead of the training."""

from collections import deque
from typing import Any

from verl.agent import TRAINING_STEP, Trajectory
from verl.rollout.agent_worker import Failure, Job
from verl.rollout.job import Submitted
from verl.rollout.manager import RolloutManager
from verl.trainer.config import PPOConfig
from verl.trainer.ppo.question_sampler import QuestionSampler
from verl.utils.dataset import RLHFDataset


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
        self.under_way: deque[tuple[list[int], Submitted]] = deque()

    def next_batch(
        self, steps_left: int
    ) -> tuple[list[int], list[Job], list[Trajectory | Failure]]:
        """Waits for the oldest batch; returns its row numbers, its jobs and their results.

        Before it waits, it submits batches of the next steps. `steps_left`: training steps that
        still need a batch, this one included; no more batches than that are submitted.
        """
        wanted = max(1, min(self.config.async_training.max_staleness + 1, steps_left))
        while len(self.under_way) < wanted:
            step = self.rollout.version + 1
            rows = self.sampler.draw(self.config.data.train_batch_size, step)
            self.under_way.append((rows, self._submit(rows, step)))
        rows, oldest = self.under_way.popleft()
        return rows, *self.rollout.collect(oldest)

    def _submit(self, rows: list[int], step: int) -> Submitted:
        return self.rollout.submit(
            [self.train_set.rows[row] | {TRAINING_STEP: step} for row in rows],
            [self.train_set.prompt_ids[row] for row in rows],
            self.config.actor_rollout_ref.rollout,
            seed=self.config.trainer.seed + 1_000_000 * self.sampler.drawn,
        )

    def drain_before_sync(self) -> None:
        """Waits for trajectories under way, unless they may get new weights between two turns."""
        if not self.config.async_training.partial_rollout:
            self.rollout.drain([submitted for _, submitted in self.under_way])

    @property
    def epoch(self) -> int:
        """The number of completed passes over the training questions."""
        return self.sampler.epoch

    def state_dict(self) -> dict[str, Any]:
        """The position in the data to resume from; batches under way are not yet trained on."""
        state = self.sampler.state_dict()
        under_way = [row for rows, _ in self.under_way for row in rows]
        state["waiting"] = under_way + state["waiting"]
        state["drawn"] -= len(self.under_way)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a `state_dict`, and forgets the batches under way."""
        self.under_way.clear()
        self.sampler.load_state_dict(state)
