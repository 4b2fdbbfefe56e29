"""Which engine serves which trajectory."""

from collections.abc import Sequence
from typing import Any

from verl.agent import Completion


class Router:
    """Keeps a session (trajectory) on the engine that started it, whose cache holds its earlier turns.

    `handles` answer `generate.remote(request_id, prompt_ids, sampling)` with an awaitable: Ray actors, or fakes.
    """

    def __init__(self, handles: Sequence[Any]) -> None:
        self.handles = handles
        self.load = [0] * len(handles)
        self.sessions: dict[str, int] = {}
        self.calls = 0

    async def generate(self, session: str, prompt_ids: list[int], sampling: dict[str, Any]) -> Completion:
        """One completion for the session; a new session goes to the engine with the fewest."""
        if session not in self.sessions:
            self.sessions[session] = min(range(len(self.handles)), key=self.load.__getitem__)
            self.load[self.sessions[session]] += 1
        self.calls += 1
        request_id = f"{session}-{self.calls}"
        return await self.handles[self.sessions[session]].generate.remote(request_id, prompt_ids, sampling)

    def forget(self, session: str) -> None:
        """Ends a session. One that never generated is no error."""
        replica = self.sessions.pop(session, None)
        if replica is not None:
            self.load[replica] -= 1
