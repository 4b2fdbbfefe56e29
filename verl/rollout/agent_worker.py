"""The CPU process that runs agent loops: one coroutine per trajectory, scored as it finishes."""

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

from verl.agent import Completion, Image, Row, Source, Trajectory, TrajectoryFailed
from verl.rollout.branches import Answering, Prefix, Tape, Trees
from verl.rollout.router import Router
from verl.single_controller.worker import stacks
from verl.single_controller.worker_group import ActorHandle
from verl.trainer.config import PPOConfig, build_agent, build_reward, build_tokenizer
from verl.utils.reward import score

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """One trajectory to roll out."""

    uid: str
    """Group: trajectories of one prompt share it."""
    session: str
    """Unique name of the trajectory; the engine that starts it keeps it."""
    row: Row
    prompt_ids: list[int]
    seed: int | None = None
    """Seed of every engine call of the trajectory; None where calls are not seeded."""
    tree: int = 0
    """Number of its tree among those of the prompt (`rollout.branches`)."""
    begins_from: tuple[str, ...] = ()
    """Sessions of the trajectories of its tree from one of which it branches off; none: it begins
    at the prompt."""


@dataclass(frozen=True)
class Failure:
    """A trajectory that the environment broke twice, or that got no score."""

    message: str
    num_calls: int


class Engines(Protocol):
    """What answers the calls of a session: a Router over Ray actors, or an OpenAIEngine."""

    async def generate(
        self, session: str, prompt_ids: list[int], sampling: dict[str, Any]
    ) -> Completion: ...

    def forget(self, session: str) -> None: ...


class AgentLoopWorker:
    """Owns one agent loop and one reward; serves batches of jobs.

    At most `max_under_way` trajectories run at a time, over all batches; the others wait in the
    order in which they came. More would not keep the engines busier. They would search at the same
    time, and a retriever that is slower than the engines would answer most of them too late.
    """

    def __init__(self, config: PPOConfig, engines: Engines, max_under_way: int) -> None:
        tokenizer = build_tokenizer(config)
        self.agent = build_agent(config, tokenizer)
        self.reward = build_reward(config, tokenizer)
        self.engines = engines
        self.limit(max_under_way)

    def limit(self, max_under_way: int) -> None:
        """Sets how many trajectories may be under way."""
        self.places = asyncio.Semaphore(max_under_way)
        self.finished: dict[str, int] = {}

    async def run(
        self, jobs: Sequence[Job], sampling: dict[str, Any]
    ) -> list[Trajectory | Failure]:
        """Rolls out and scores `jobs`, and returns the trajectories in the same order.

        An exception other than TrajectoryFailed ends all of them.
        """
        batch = jobs[0].session
        self.finished[batch] = 0
        trees = Trees({session for job in jobs for session in job.begins_from})
        answering = trees.answering(self.agent)

        async def run_in_turn(job: Job) -> Trajectory | Failure:
            # waits before it takes a place, which those that it waits for may need
            prefix = await trees.prefix(job.begins_from, job.seed)
            async with self.places:
                result, tape = await self._run_twice(job, sampling, prefix, answering)
            trees.end(job.session, tape)
            self.finished[batch] += 1
            return result

        tasks = [asyncio.ensure_future(run_in_turn(job)) for job in jobs]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()  # which does nothing to those that have ended
            del self.finished[batch]

    async def progress(self) -> dict[str, int]:
        """Returns how many trajectories of each running call of `run` have finished.

        The key of a call is the session of its first job.
        """
        return dict(self.finished)

    async def _run_twice(
        self, job: Job, sampling: dict[str, Any], prefix: Prefix | None, answering: Answering
    ) -> tuple[Trajectory | Failure, Tape | None]:
        """The trajectory and its tape, or the failure of the second attempt."""
        for attempt in range(2):
            tape = Tape(prefix)
            try:
                session = f"{job.session}-{attempt}"
                with answering(tape.give, tape.tell):
                    return await self._run_once(job, session, sampling, tape), tape
            except TrajectoryFailed as error:
                logger.warning(
                    "trajectory %s failed (attempt %d of 2): %s",
                    job.session,
                    attempt + 1,
                    error.args[0],
                )
                failure = Failure(str(error.args[0]), error.num_calls)
        return failure, None

    async def _run_once(
        self, job: Job, session: str, sampling: dict[str, Any], tape: Tape
    ) -> Trajectory:
        calls = 0

        async def generate(
            prompt_ids: list[int],
            *,
            max_tokens: int,
            stop: Sequence[str] = (),
            images: Sequence[Image] = (),
        ) -> Completion:
            nonlocal calls
            calls += 1
            completion = tape.completion(prompt_ids)
            if completion is None:
                seed = None if job.seed is None else job.seed + calls
                params = {**sampling, "max_tokens": max_tokens, "stop": list(stop), "seed": seed}
                if images:
                    params["images"] = list(images)
                completion = await self.engines.generate(session, prompt_ids, params)
            tape.completions.append(completion)
            return completion

        try:
            trajectory: Trajectory = await self.agent.run(job.prompt_ids, job.row, generate)
        finally:
            self.engines.forget(session)
        trajectory.shared_turns = tape.num_shared
        if not sampling["log_probs"]:
            trajectory.images = []  # nothing is trained on it, and pixels are large
        if trajectory.num_tokens(Source.MODEL):
            await score(self.reward, trajectory, job.row)
        return trajectory

    def replace_engine(self, replica: int, server: ActorHandle) -> None:
        """Puts a new engine in the place of one that died."""
        cast("Router", self.engines).replace(replica, server)

    def stacks(self) -> str:
        """Returns the stacks of the threads of this process."""
        return stacks()

    async def close(self) -> None:
        await self.agent.close()
