"""Refuses requests before they are read: too large ones, and all while the queue is full."""

import asyncio
from collections.abc import Callable

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from search_r1.search.server.batching import Overloaded

REFUSALS_PER_S = 50
"""Refusals that are sent per second, which takes a hundredth of a core."""
LOOK_EVERY_S = 1.0
"""Seconds after which a request that waits to be refused checks again whether there is room."""
MAX_TURN_S = 20.0
"""The longest time in seconds that a request waits to be refused."""


class BodyLimit:
    """ASGI middleware that answers 413 to bodies of more than `max_bytes`."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app = app
        self.max_bytes = max_bytes
        self.problem = f"the body has more than {max_bytes} bytes"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self.max_bytes:
            refusal = JSONResponse({"detail": self.problem}, status_code=413)
            return await refusal(scope, receive, send)
        received = 0

        async def limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.max_bytes:
                # FastAPI lets this exception through when it reads the body.
                raise HTTPException(413, self.problem)
            return message

        await self.app(scope, limited, send)


class Door:
    """ASGI middleware that answers 429 with Retry-After while there is no room.

    `overload(path)` says why there is none for a path. Neither body nor query is looked at, and
    refusals are sent one by one, so that they take nothing from the requests that were let in,
    however many clients ask again at once. A request that finds room when it is its turn is let in.
    """

    def __init__(
        self,
        app: ASGIApp,
        overload: Callable[[str], Overloaded | None],
        on_refusal: Callable[[], object],
    ) -> None:
        self.app = app
        self.overload = overload
        self.on_refusal = on_refusal
        self.last_turn = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            return await self.app(scope, receive, send)
        path = scope["path"]
        if self.overload(path) is None:
            return await self.app(scope, receive, send)
        await self.turn(path)
        reason = self.overload(path)
        if reason is None:
            return await self.app(scope, receive, send)
        self.on_refusal()
        headers = {"Retry-After": f"{reason.retry_after_s:.0f}"}
        refusal = JSONResponse({"detail": str(reason)}, 429, headers)
        return await refusal(scope, receive, send)

    async def turn(self, path: str) -> None:
        """Waits for this request's turn to be refused, or until there is room."""
        clock = asyncio.get_running_loop().time
        end_of_line = max(clock(), self.last_turn) + 1 / REFUSALS_PER_S
        turn = self.last_turn = min(end_of_line, clock() + MAX_TURN_S)
        while (left_s := turn - clock()) > 0 and self.overload(path) is not None:
            await asyncio.sleep(min(left_s, LOOK_EVERY_S))
