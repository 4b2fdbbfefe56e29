"""The HTTP side of a retrieval server: `/retrieve`, `/health` and `/metrics` over one engine."""

import asyncio
import hmac
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Annotated, Any, TypeVar

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import Field, StringConstraints
from pydantic_core import to_json

from search_r1.search.engine import EngineError, Hits, Retriever
from search_r1.search.schema import Problem, RetrieveRequest, RetrieveResponse
from search_r1.search.server.limits import BodyLimit, Door
from search_r1.search.server.metrics import ServerMetrics
from search_r1.search.server.service import ServerSettings, Service

DISCONNECTED = 499
NAMED_ERRORS = 3
"""The number of failed queries that the answer to a failed request names with their causes."""
T = TypeVar("T")


def create_app(load: Callable[[], Retriever], settings: ServerSettings) -> FastAPI:
    """Makes the application.

    `load` makes the engine. It runs in a thread, after the server has begun to listen.
    """
    service = Service(load, settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(service.run())
        yield
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task

    app = FastAPI(title="Search-R1 retrieval", lifespan=lifespan)
    app.state.service = service
    app.add_middleware(BodyLimit, max_bytes=settings.max_body_bytes)
    app.add_middleware(Door, overload=service.overload, on_refusal=service.count_refusal)
    app.add_exception_handler(RequestValidationError, invalid)
    add_retrieve(app, service)
    add_health(app, service)
    return app


def problem(description: str) -> dict[str, Any]:
    """The entry of the API's description for an answer other than 200."""
    return {"model": Problem, "description": description}


PROBLEMS: dict[int | str, dict[str, Any]] = {
    400: problem("Undecodable body"),
    401: problem("Missing or wrong token"),
    413: problem("Body too large"),
    422: problem("Invalid request"),
    429: problem("Queue full"),
    500: problem("The engine failed"),
    503: problem("Engine loading"),
    504: problem("Out of time"),
}


def add_retrieve(app: FastAPI, service: Service) -> None:
    """Adds `/retrieve`. The limits of this server are part of the type of its request."""
    settings = service.settings
    metrics = service.metrics

    class LimitedRequest(RetrieveRequest):
        """A batch of queries, within this server's limits."""

        queries: Annotated[
            list[Annotated[str, StringConstraints(max_length=settings.max_query_chars)]],
            Field(max_length=settings.max_queries),
        ]
        """Any number of queries, none included."""

    @app.post("/retrieve", response_model=RetrieveResponse, responses=PROBLEMS)
    async def retrieve(body: LimitedRequest, request: Request) -> Response:
        """Passages for each query."""
        began = time.monotonic()
        status = 500
        try:
            check_token(request, settings.token)
            answer = await unless_disconnected(request, service.answer(body))
            response = to_response(answer, body, metrics)
            status = response.status_code
            return response
        except HTTPException as error:
            status = error.status_code
            metrics.errors.labels(kind=f"http_{status}").inc()
            raise
        finally:
            metrics.requests.labels(status=status).inc()
            metrics.seconds.observe(time.monotonic() - began)


def add_health(app: FastAPI, service: Service) -> None:
    """Adds `/health` and `/metrics`."""

    @app.get("/health", responses={503: {"description": "The engine is loading"}})
    async def health(response: Response) -> dict[str, Any]:
        """`ok` once the index is loaded."""
        if service.engine is None:
            response.status_code = 503
            return {"status": "loading"}
        retriever = service.engine.retriever
        return {"status": "ok", "retriever": retriever.name, "num_documents": len(retriever)}

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Prometheus text."""
        return Response(service.metrics.render(), media_type="text/plain; version=0.0.4")


def check_token(request: Request, token: str | None) -> None:
    """Raises HTTPException 401 unless the bearer token is right, or none is set."""
    given = request.headers.get("authorization", "").removeprefix("Bearer ")
    if token is not None and not hmac.compare_digest(given.encode(), token.encode()):
        raise HTTPException(401, "a bearer token is needed", {"WWW-Authenticate": "Bearer"})


async def unless_disconnected(request: Request, work: Awaitable[T]) -> T:
    """Awaits `work` and returns its result.

    When the client goes away first, cancels `work` and raises HTTPException 499.
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
    """Waits until the client has closed its connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def to_response(
    answer: list[Hits | EngineError], request: RetrieveRequest, metrics: ServerMetrics
) -> Response:
    """Makes the answer by the contract, and counts the queries that failed.

    It is a 500 when a query failed and the request did not have `allow_partial`.
    """
    errors = {i: hits for i, hits in enumerate(answer) if isinstance(hits, EngineError)}
    for error in errors.values():
        metrics.errors.labels(kind=error.kind).inc()
    if errors and not request.allow_partial:
        named = list(errors.items())[:NAMED_ERRORS]
        detail = "; ".join(f"query {i}: {error}" for i, error in named)
        return JSONResponse({"detail": detail}, status_code=500)
    result = [to_items(hits, request.return_scores) for hits in answer]
    body: dict[str, Any] = {"result": result}
    if request.allow_partial:
        body["errors"] = {str(i): f"{error.kind}: {error}" for i, error in errors.items()}
    return Response(to_json(body), media_type="application/json")


def to_items(hits: Hits | EngineError, with_scores: bool) -> list[dict[str, Any]]:
    """The hits of a query by the contract; empty for a query that failed."""
    if isinstance(hits, EngineError):
        return []
    if with_scores:
        return [{"document": document, "score": score} for document, score in hits]
    return [document for document, _ in hits]


async def invalid(_: Request, error: Exception) -> JSONResponse:
    """Answers 422 with the field that is wrong, without repeating the request."""
    assert isinstance(error, RequestValidationError)
    problems = [
        {"loc": list(map(str, e["loc"])), "msg": e["msg"], "type": e["type"]}
        for e in error.errors()
    ]
    return JSONResponse({"detail": problems}, status_code=422)
