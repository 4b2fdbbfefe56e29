"""Rollouts on an endpoint, from a thread of this process and without Ray."""

import asyncio
import threading
from collections.abc import Coroutine, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any

from verl.agent import Row, Trajectory
from verl.rollout.agent_worker import AgentLoopWorker, Failure, Job
from verl.rollout.job import Submitted, make_jobs
from verl.rollout.openai_engine import OpenAIEngine
from verl.trainer.config import PPOConfig, build_tokenizer
from verl.workers.config import SamplingConfig


class LocalRollout:
    """The part of a RolloutManager's interface that `evaluate` uses."""

    def __init__(self, config: PPOConfig) -> None:
        rollout = config.actor_rollout_ref.rollout
        self.capacity = 2 * rollout.endpoint.max_concurrent
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        self.engine, self.worker = self._start(self._build(config)).result()

    def _start(self, coroutine: Coroutine[Any, Any, Any]) -> "Future[Any]":
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    async def _build(self, config: PPOConfig) -> tuple[OpenAIEngine, AgentLoopWorker]:
        model = config.actor_rollout_ref.model.path
        engine = OpenAIEngine(
            config.actor_rollout_ref.rollout.endpoint, model, build_tokenizer(config)
        )
        return engine, AgentLoopWorker(config, engine, self.capacity)

    def submit(
        self, rows: Sequence[Row], prompts: Sequence[list[int]], sampling: SamplingConfig, seed: int
    ) -> Submitted:
        """Starts `sampling.n` trajectories per row. `seed` is ignored: an endpoint takes none."""
        jobs = make_jobs(rows, prompts, sampling, None)
        return Submitted(jobs, [jobs], [self._start(self.worker.run(jobs, sampling.params()))])

    def first_done(self, pending: Sequence[Submitted]) -> int:
        """Waits until one of them has ended; returns its index."""
        futures = [submitted.running[0] for submitted in pending]
        done, _ = wait(futures, return_when=FIRST_COMPLETED)
        return futures.index(next(iter(done)))

    def collect(self, submitted: Submitted) -> tuple[list[Job], list[Trajectory | Failure]]:
        """Waits for jobs and results, in the order in which they were submitted."""
        return submitted.jobs, submitted.running[0].result()

    def shutdown(self) -> None:
        self._start(self.worker.close()).result()
        self._start(self.engine.close()).result()
        self.loop.call_soon_threadsafe(self.loop.stop)
