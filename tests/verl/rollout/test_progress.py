"""How far a batch is, as the driver learns it from agent workers that are real Ray actors."""

import asyncio
import logging
import re
import threading

import pytest
import ray

from tests.processes import PATIENCE_S
from verl.agent import Trajectory
from verl.rollout.agent_worker import AgentLoopWorker, Job
from verl.rollout.job import Submitted
from verl.rollout.manager import RolloutManager
from verl.single_controller.worker_group import get, ready, spawn

JOBS = [Job("u", f"s{i}", {}, [7]) for i in range(4)]


class Gate:
    """A loop whose trajectories end one by one, when they are told to."""

    def __init__(self):
        self.ends = asyncio.Queue()

    async def run(self, prompt_ids, row, generate):
        await self.ends.get()
        return Trajectory(prompt_ids)


class Engines:
    """Never asked."""

    def forget(self, session): ...


class GatedWorker(AgentLoopWorker):
    """An agent worker over a gate."""

    def __init__(self):
        self.agent = Gate()
        self.engines = Engines()
        self.limit(2)

    async def end_one(self):
        self.agent.ends.put_nowait(None)


@pytest.fixture(scope="module", autouse=True)
def own_ray():
    ray.init(address="local", include_dashboard=False, num_cpus=1, logging_level=logging.WARNING)
    yield
    ray.shutdown()


def test_finished_trajectories_are_progress_and_nothing_else_is(caplog):
    caplog.set_level(logging.INFO, logger="verl.rollout.manager")
    manager = RolloutManager.__new__(RolloutManager)
    worker = spawn(GatedWorker, num_cpus=0)
    get(ready(worker))
    manager.workers = [worker]
    manager.lifelines = []
    manager.finished = {}
    manager.progress_s = 0.05
    heard = threading.Semaphore(0)
    manager.on_progress = heard.release
    lines = []

    def wait_for_lines(count):
        """Returns when the driver has looked so many times more."""
        wanted = len(caplog.messages) + count
        while len(caplog.messages) < wanted:
            assert waiting.is_alive()
            waiting.join(0.01)
        lines.append(caplog.messages[-1])

    call = worker.run.remote(JOBS, {"log_probs": False})
    batch = Submitted(JOBS, [JOBS], [call], "validation")
    waiting = threading.Thread(target=manager.drain, args=([batch],))
    waiting.start()
    wait_for_lines(3)
    while heard.acquire(blocking=False):  # that the batch has begun
        pass
    wait_for_lines(5)
    assert not heard.acquire(blocking=False), "nothing has finished"
    for _ in range(3):
        get(worker.end_one.remote())
        assert heard.acquire(timeout=PATIENCE_S)
        wait_for_lines(2)
    get(worker.end_one.remote())
    waiting.join(60)
    assert not waiting.is_alive() and heard.acquire(blocking=False)
    assert lines[1:] == [f"validation: {done} of 4 trajectories" for done in range(4)]
    assert all(re.fullmatch(r"validation: \d of 4 trajectories", line) for line in caplog.messages)
    ray.kill(worker)
