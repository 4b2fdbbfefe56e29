"""Failures of the environment: a trajectory is run twice, then given up; nothing of it reaches the
policy."""

import asyncio

import pytest

from tests.verl.fake_agent import SAMPLING, make_worker
from verl.agent import Trajectory
from verl.rollout.agent_worker import Failure, Job


async def test_one_failure_is_repeated_from_the_start(tmp_path):
    (result,) = await make_worker(tmp_path, 1).run([Job("u", "s", {"name": "a"}, [7])], SAMPLING)
    assert (
        isinstance(result, Trajectory)
        and result.token_ids == [7, 1, 2]
        and result.reward == {"score": 1.0}
    )
    assert result.context_violations == 0


async def test_two_failures_give_it_up_with_the_number_of_searches(tmp_path):
    jobs = [Job("u", f"s{i}", {"name": str(i)}, [7]) for i in range(3)]
    made = make_worker(tmp_path, 2)
    assert await made.run(jobs, SAMPLING) == [Failure("retriever is down", 2)] * 3
    assert made.engines.load == [0]


class Broken:
    """Fails in a way that no environment does, while the others wait for ever; counts those that
    were cancelled."""

    cancelled = 0

    async def run(self, prompt_ids, row, generate):
        await asyncio.sleep(0)
        if row["name"] == "0":
            raise ZeroDivisionError
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise


async def test_an_unforeseen_exception_ends_the_batch_and_leaves_nothing_behind(tmp_path):
    made = make_worker(tmp_path, 0)
    made.agent = broken = Broken()
    with pytest.raises(ZeroDivisionError):
        await made.run([Job("u", f"s{i}", {"name": str(i)}, [7]) for i in range(3)], SAMPLING)
    await asyncio.gather(*asyncio.all_tasks() - {asyncio.current_task()}, return_exceptions=True)
    assert broken.cancelled == 2 and await made.progress() == {}


class Counting:
    """Counts how many trajectories are under way, and in which order they began; each ends when it
    is told to."""

    def __init__(self) -> None:
        self.began = []
        self.ends = asyncio.Queue()
        self.under_way = 0
        self.most = 0

    async def run(self, prompt_ids, row, generate):
        self.began.append(row["name"])
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        await self.ends.get()
        self.under_way -= 1
        return Trajectory(prompt_ids)


async def test_batches_share_the_places_first_come_first_served_and_their_progress_is_known(
    tmp_path,
):
    """A batch that came first is never overtaken, so one that is waited for cannot starve behind a
    later one."""
    made = make_worker(tmp_path, 0, max_under_way=2)
    made.agent = agent = Counting()
    names = {"train": [f"t{i}" for i in range(5)], "val": [f"v{i}" for i in range(4)]}
    calls = [
        asyncio.create_task(
            made.run([Job("u", name, {"name": name}, [7]) for name in batch], SAMPLING)
        )
        for batch in names.values()
    ]

    async def end(count):
        for _ in range(count):
            agent.ends.put_nowait(None)
        for _ in range(50):
            await asyncio.sleep(0)

    await end(0)
    assert agent.began == ["t0", "t1"] and await made.progress() == {"t0": 0, "v0": 0}
    await end(3)
    assert agent.began == ["t0", "t1", "t2", "t3", "t4"] and await made.progress() == {
        "t0": 3,
        "v0": 0,
    }
    await end(3)
    assert (
        calls[0].done()
        and agent.began[5:] == ["v0", "v1", "v2"]
        and await made.progress() == {"v0": 1}
    )
    await end(3)
    assert [len(await call) for call in calls] == [5, 4]
    assert (
        agent.most == 2
        and agent.began == names["train"] + names["val"]
        and await made.progress() == {}
    )
