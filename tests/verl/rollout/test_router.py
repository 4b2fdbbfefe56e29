"""Which engine serves which trajectory, with plain fakes for engines."""

import asyncio

import pytest

from verl.agent import Completion, context_digest
from verl.workers.rollout.router import Router


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
    assert len(servers[0].request_ids) == 1, "the engine that holds the long session is the busier one"
    assert router.load == [1, 0] and list(router.sessions) == ["long"]
    router.forget("never started")
    assert router.load == [1, 0]


def test_an_engine_error_reaches_the_caller():
    router = Router([BrokenServer()])
    with pytest.raises(RuntimeError, match="engine died"):
        asyncio.run(router.generate("s", [1], {}))
