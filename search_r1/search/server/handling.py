"""What every request goes through: the token, the counts, and a client that may go away."""

import asyncio
import hmac
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from fastapi import HTTPException, Request, Response

from search_r1.search.schema import Problem
from search_r1.search.server.service import Service

DISCONNECTED = 499
T = TypeVar("T")


def problem(description: str) -> dict[str, Any]:
    """How the API's description names an answer other than 200."""
    return {"model": Problem, "description": description}


PROBLEMS: dict[int | str, dict[str, Any]] = {
    400: problem("Undecodable body"),
    401: problem("Missing or wrong token"),
    409: problem("Noise, of an engine that does not simulate"),
    413: problem("Body too large"),
    422: problem("Invalid request"),
    429: problem("Queue full"),
    500: problem("The engine failed"),
    503: problem("Engine loading"),
    504: problem("Out of time"),
}


async def handle(
    service: Service,
    request: Request,
    answer: Callable[[], Awaitable[T]],
    respond: Callable[[T], Response],
) -> Response:
    """Answers a request of a client that has the token, and counts it.

    Raises HTTPException as `answer` does, 401 without the token, and 499 when the client has gone.
    """
    metrics = service.metrics
    began = time.monotonic()
    status = 500
    try:
        check_token(request, service.settings.token)
        response = respond(await unless_disconnected(request, answer()))
        status = response.status_code
        return response
    except HTTPException as error:
        status = error.status_code
        metrics.errors.labels(kind=f"http_{status}").inc()
        raise
    finally:
        metrics.requests.labels(status=status).inc()
        metrics.seconds.observe(time.monotonic() - began)


def check_token(request: Request, token: str | None) -> None:
    """Raises HTTPException 401 unless the bearer token is right, or none is set."""
    given = request.headers.get("authorization", "").removeprefix("Bearer ")
    if token is not None and not hmac.compare_digest(given.encode(), token.encode()):
        raise HTTPException(401, "a bearer token is needed", {"WWW-Authenticate": "Bearer"})


async def unless_disconnected(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled when the client goes away.

    Raises HTTPException 499 then.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(disconnect(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise HTTPException(DISCONNECTED, "the client went away")
        return task.result()
    finally:
        task.cancel()
        gone.cancel()


async def disconnect(request: Request) -> None:
    """Returns when the client has closed its connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
