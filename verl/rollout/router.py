"""Which engine serves which trajectory."""

import asyncio
from collections.abc import Sequence
from typing import Any

from verl.agent import Completion, TrajectoryFailed
from verl.single_controller.worker_group import ActorDied, ActorHandle, ActorUnavailableError

MAX_LOST = 3
"""Deaths of engines during one call after which the call counts as their cause."""


class Router:
    """Keeps a session (trajectory) on the engine that started it.

    That engine's cache holds the session's earlier turns. `servers`: the actor of each engine,
    which answers `generate.remote(request_id, prompt_ids, sampling)` with an awaitable. When an
    engine dies, the calls that it was answering are repeated on another one, or wait until there is
    one (`replace`). A call contains all its tokens, so nothing of the trajectory is lost.
    """

    def __init__(self, servers: Sequence[Any]) -> None:
        self.servers: list[Any] = list(servers)
        self.load = [0] * len(servers)
        self.sessions: dict[str, int] = {}
        self.dead: set[int] = set()
        self.revived = asyncio.Event()
        self.calls = 0

    async def generate(
        self, session: str, prompt_ids: list[int], sampling: dict[str, Any]
    ) -> Completion:
        """Returns one completion. A new session goes to the engine with the fewest sessions.

        Raises TrajectoryFailed when MAX_LOST engines died while they answered this call.
        """
        for _ in range(MAX_LOST):
            replica = await self._replica_of(session)
            server = self.servers[replica]
            self.calls += 1
            try:
                return await server.generate.remote(f"{session}-{self.calls}", prompt_ids, sampling)
            except ActorDied as error:  # one that is only unavailable will not be replaced
                if self.servers[replica] is server and not isinstance(error, ActorUnavailableError):
                    self.dead.add(replica)
                self.forget(session)
        raise TrajectoryFailed(f"{MAX_LOST} engines died while they answered the same call", 0)

    async def _replica_of(self, session: str) -> int:
        if self.sessions.get(session) in self.dead:  # it died between two calls of the session
            self.forget(session)
        while session not in self.sessions:
            if alive := [i for i in range(len(self.servers)) if i not in self.dead]:
                self.sessions[session] = min(alive, key=self.load.__getitem__)
                self.load[self.sessions[session]] += 1
            else:
                self.revived.clear()
                await self.revived.wait()
        return self.sessions[session]

    def replace(self, replica: int, server: ActorHandle) -> None:
        """Puts a new engine in the place of one that died."""
        self.servers[replica] = server
        self.dead.discard(replica)
        self.revived.set()

    def forget(self, session: str) -> None:
        """Ends a session. One that never generated is no error."""
        replica = self.sessions.pop(session, None)
        if replica is not None:
            self.load[replica] -= 1
