"""Which engine serves which trajectory, with plain fakes for engines."""

import asyncio

import pytest
from ray.exceptions import RayActorError

from verl.agent import Completion, TrajectoryFailed, context_digest
from verl.rollout.router import MAX_LOST, Router


class FakeServer:
    """Answers `generate.remote(...)` like the handle of an actor, and writes down who asked."""

    def __init__(self) -> None:
        self.request_ids: list[str] = []
        self.generate = self

    async def remote(self, request_id, prompt_ids, sampling):
        self.request_ids.append(request_id)
        await asyncio.sleep(0)
        return Completion([1], [0.0], "stop", None, 0, context_digest(prompt_ids))


class BrokenServer(FakeServer):
    async def remote(self, request_id, prompt_ids, sampling):
        raise RuntimeError("engine died")


async def turns(router, session, n):
    for k in range(n):
        await router.generate(session, [k], {})
    router.forget(session)


def test_a_session_stays_on_its_engine_and_load_is_spread():
    servers = [FakeServer() for _ in range(3)]
    router = Router(servers)

    async def main():
        await asyncio.gather(*(turns(router, f"s{i}", 4) for i in range(9)))

    asyncio.run(main())
    sessions = [{request.split("-")[0] for request in server.request_ids} for server in servers]
    assert [len(s) for s in sessions] == [3, 3, 3]
    assert len(set.union(*sessions)) == 9, "no session on two engines"
    ids = [request for server in servers for request in server.request_ids]
    assert len(set(ids)) == 36, "request ids are unique"


def test_finished_sessions_are_forgotten_and_free_their_engine():
    servers = [FakeServer(), FakeServer()]
    router = Router(servers)

    async def main():
        await router.generate("long", [1], {})
        for i in range(5):
            await turns(router, f"short{i}", 1)

    asyncio.run(main())
    assert len(servers[0].request_ids) == 1, (
        "the engine that holds the long session is the busier one"
    )
    assert router.load == [1, 0] and list(router.sessions) == ["long"]
    router.forget("never started")
    assert router.load == [1, 0]


def test_an_engine_error_reaches_the_caller():
    router = Router([BrokenServer()])
    with pytest.raises(RuntimeError, match="engine died"):
        asyncio.run(router.generate("s", [1], {}))


class MortalServer(FakeServer):
    """Holds its answers back until `die` or `live` is called."""

    def __init__(self) -> None:
        super().__init__()
        self.end = asyncio.Event()
        self.dead = False

    async def remote(self, request_id, prompt_ids, sampling):
        self.request_ids.append(request_id)
        await self.end.wait()
        if self.dead:
            raise RayActorError
        return Completion([1], [0.0], "stop", None, 0, context_digest(prompt_ids))

    def die(self):
        self.dead = True
        self.end.set()

    def live(self):
        self.end.set()


async def let_others_run():
    for _ in range(20):
        await asyncio.sleep(0)


async def test_calls_of_a_dead_engine_are_repeated_on_another_one():
    dying = MortalServer()
    other = FakeServer()
    router = Router([dying, other])
    calls = [asyncio.ensure_future(router.generate(f"s{i}", [i], {})) for i in range(4)]
    await let_others_run()
    assert router.load == [2, 2] and len(other.request_ids) == 2
    dying.die()
    assert [completion.token_ids for completion in await asyncio.gather(*calls)] == [[1]] * 4
    assert router.load == [0, 4] and router.dead == {0} and set(router.sessions.values()) == {1}
    assert len(set(other.request_ids)) == 4, "a repeated call has a new request id"
    await router.generate("new", [1], {})
    assert router.load == [0, 5], "nothing new goes to the dead one"
    for session in list(router.sessions):
        router.forget(session)
    assert router.load == [0, 0]


async def test_without_an_engine_a_call_waits_for_one():
    first = MortalServer()
    second = MortalServer()
    router = Router([first, second])
    calls = [asyncio.ensure_future(router.generate(f"s{i}", [i], {})) for i in range(3)]
    await let_others_run()
    first.die(), second.die()
    await let_others_run()
    assert (
        not any(call.done() for call in calls) and router.load == [0, 0] and router.sessions == {}
    )
    calls.append(asyncio.ensure_future(router.generate("new", [1], {})))
    fresh = FakeServer()
    router.replace(1, fresh)
    await asyncio.gather(*calls)
    assert len(fresh.request_ids) == 4 and router.load == [0, 4] and router.dead == {0}
    router.replace(0, FakeServer())
    await router.generate("newer", [1], {})
    assert router.load == [1, 4] and router.dead == set()


async def test_a_call_that_kills_engine_after_engine_is_given_up():
    servers = [MortalServer() for _ in range(MAX_LOST + 1)]
    for server in servers:
        server.die()
    router = Router(servers)
    with pytest.raises(TrajectoryFailed, match="3 engines died"):
        await router.generate("s", [1], {})
    assert [len(server.request_ids) for server in servers] == [1, 1, 1, 0] and router.dead == {
        0,
        1,
        2,
    }
    assert router.load == [0, 0, 0, 0] and router.sessions == {}


async def test_a_late_error_of_a_replaced_engine_does_not_mark_the_new_one():
    old = MortalServer()
    new = FakeServer()
    router = Router([old])
    call = asyncio.ensure_future(router.generate("s", [1], {}))
    await let_others_run()
    router.replace(0, new)
    old.die()
    assert (await call).token_ids == [1]
    assert router.dead == set() and router.load == [1] and len(new.request_ids) == 1


async def test_a_session_whose_engine_died_between_its_turns_loses_no_attempt():
    first = MortalServer()
    second = MortalServer()
    router = Router([first, second])
    first.live(), second.live()
    for session in ("idle", "filler", "other"):  # on the first, the second, the first
        await router.generate(session, [1], {})
    first.die()
    await router.generate("other", [1], {})
    assert router.dead == {0} and router.load == [1, 2] and len(first.request_ids) == 3
    await router.generate("idle", [1, 2], {})
    assert router.load == [0, 3] and len(first.request_ids) == 3, (
        "it does not ask the dead one first"
    )
