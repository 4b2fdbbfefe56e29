"""The HTTP side of the retrieval server: `/retrieve`, `/health`, `/metrics` over one engine."""

import asyncio
import hmac
import logging
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import Field, StringConstraints, create_model
from pydantic_core import to_json

from search_r1.search.batching import BatchingEngine, Overloaded
from search_r1.search.engine import EngineError, Hits, Retriever
from search_r1.search.experiments import Latency
from search_r1.search.limits import BodyLimit, Door
from search_r1.search.manifest import CorpusError
from search_r1.search.schema import Problem, RetrieveRequest, RetrieveResponse
from search_r1.search.server_metrics import ServerMetrics

log = logging.getLogger(__name__)
LOADING_RETRY_S = 2
WAIT_SHARE = 0.5
"""A request is refused when it would have to wait longer than this share of its deadline: the
estimate may be wrong."""
REPORT_EVERY_S = 60.0
DISCONNECTED = 499
PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem, "description": text}
    for status, text in {
        400: "Undecodable body",
        401: "Missing or wrong token",
        413: "Body too large",
        422: "Invalid request",
        429: "Queue full",
        500: "The engine failed",
        503: "Engine loading",
        504: "Out of time",
    }.items()
}


@dataclass(frozen=True)
class ServerSettings:
    """What a server is told beside its engine. Times in seconds."""

    topk: int = 3
    max_batch_size: int = 256
    batch_wait_s: float = 0.0
    max_queue: int = 1 << 18
    cache_size: int = 10000
    request_timeout_s: float = 60.0
    max_body_bytes: int = 16 << 20
    max_queries: int = 4096
    max_query_chars: int = 8192
    token: str | None = None
    latency: Latency | None = None


class Service:
    """The engine, once it is loaded, and what is counted."""

    def __init__(self, load: Callable[[], Retriever], settings: ServerSettings) -> None:
        self.load = load
        self.settings = settings
        self.metrics = ServerMetrics()
        self.stop: Callable[[], None] = partial(signal.raise_signal, signal.SIGTERM)
        self.engine: BatchingEngine | None = None
        self.failed = False
        self.served = 0

    async def run(self) -> None:
        """Loads the engine, then serves its queue; a failure of either ends the server with a
        status other than 0."""
        began = time.monotonic()
        try:
            retriever = await asyncio.to_thread(self.load)
        except (CorpusError, EngineError, OSError, ImportError) as error:
            log.error("not started: %s", error)
            self.give_up()
            return
        except Exception as error:
            log.exception(
                "not started: unexpected %s while loading the engine: %s",
                type(error).__name__,
                error,
            )
            self.give_up()
            return
        s = self.settings
        self.engine = BatchingEngine(
            retriever,
            self.metrics,
            s.max_batch_size,
            s.batch_wait_s,
            s.max_queue,
            s.cache_size,
            max_wait_s=WAIT_SHARE * s.request_timeout_s,
        )
        fields = {
            "engine": retriever.name,
            "documents": len(retriever),
            "seconds": round(time.monotonic() - began, 2),
        }
        log.info("ready", extra=fields)
        try:
            await asyncio.gather(self.engine.run(), self.report())
        except Exception as error:
            log.exception(
                "ended: unexpected %s while serving the queue: %s", type(error).__name__, error
            )
            self.give_up()

    def give_up(self) -> None:
        """Ends the server as one that failed: without an engine it would only keep its clients
        waiting."""
        self.failed = True
        self.stop()

    async def report(self) -> None:
        """A line a minute about what was served, none when nothing was."""
        while True:
            served = self.served
            await asyncio.sleep(REPORT_EVERY_S)
            if self.served > served:
                log.info(
                    "served", extra={"queries": self.served - served, "seconds": REPORT_EVERY_S}
                )

    async def answer(self, request: RetrieveRequest) -> list[Hits | EngineError]:
        """The hits of each query. Raises HTTPException when the engine is not ready, too busy or
        too slow."""
        if self.engine is None:
            raise HTTPException(503, "the engine is loading", {"Retry-After": str(LOADING_RETRY_S)})
        s = self.settings
        self.metrics.queries.inc(len(request.queries))
        self.served += len(request.queries)
        if not request.queries:
            return []
        try:
            async with asyncio.timeout(s.request_timeout_s):
                if s.latency is not None:
                    await asyncio.sleep(max(s.latency.draw() for _ in request.queries))
                return await self.engine.search(request.queries, request.topk or s.topk)
        except Overloaded as error:
            raise HTTPException(
                429, str(error), {"Retry-After": f"{error.retry_after_s:.0f}"}
            ) from error
        except TimeoutError as error:
            raise HTTPException(504, f"no result within {s.request_timeout_s:g} s") from error

    def overload(self) -> Overloaded | None:
        """Why a further request would be refused, None if there is room for it."""
        if self.engine is None or not self.engine.is_full():
            return None
        return Overloaded(self.engine.retry_after_s())

    def count_refusal(self) -> None:
        """Counts a request that was refused before it was read."""
        self.metrics.errors.labels(kind="http_429").inc()
        self.metrics.requests.labels(status=429).inc()


def create_app(load: Callable[[], Retriever], settings: ServerSettings) -> FastAPI:
    """The application; `load` makes the engine, in a thread, after the server has begun to
    listen."""
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

    async def retrieve(body: RetrieveRequest, request: Request) -> Response:
        """Passages for each query."""
        began = time.monotonic()
        status = 500
        try:
            check_token(request, settings.token)
            answer = await unless_disconnected(request, service.answer(body))
            response = to_response(answer, body, service.metrics)
            status = response.status_code
            return response
        except HTTPException as error:
            status = error.status_code
            service.metrics.errors.labels(kind=f"http_{status}").inc()
            raise
        finally:
            service.metrics.requests.labels(status=status).inc()
            service.metrics.seconds.observe(time.monotonic() - began)

    retrieve.__annotations__["body"] = limited_request(settings)
    app.post("/retrieve", response_model=RetrieveResponse, responses=PROBLEMS)(retrieve)

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

    return app


def limited_request(settings: ServerSettings) -> type[RetrieveRequest]:
    """The request with the server's limits, so that its description and its validation are one."""
    query = Annotated[str, StringConstraints(max_length=settings.max_query_chars)]
    queries: Any = (list[query], Field(max_length=settings.max_queries))
    return create_model("RetrieveRequest", __base__=RetrieveRequest, queries=queries)


def check_token(request: Request, token: str | None) -> None:
    """Raises HTTPException 401 unless the bearer token is right; without a token set, everybody may
    ask."""
    given = request.headers.get("authorization", "").removeprefix("Bearer ")
    if token is not None and not hmac.compare_digest(given.encode(), token.encode()):
        raise HTTPException(401, "a bearer token is needed", {"WWW-Authenticate": "Bearer"})


async def unless_disconnected(request: Request, work: Awaitable[Any]) -> Any:
    """The result of `work`, which is cancelled when the client goes away."""
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


def to_response(
    answer: list[Hits | EngineError], request: RetrieveRequest, metrics: ServerMetrics
) -> Response:
    """The answer as the contract has it; 500 when a query failed and the caller did not ask for the
    others."""
    errors = {i: hits for i, hits in enumerate(answer) if isinstance(hits, EngineError)}
    for error in errors.values():
        metrics.errors.labels(kind=error.kind).inc()
    if errors and not request.allow_partial:
        detail = "; ".join(f"query {i}: {error}" for i, error in list(errors.items())[:3])
        return JSONResponse({"detail": detail}, status_code=500)
    body: dict[str, Any] = {
        "result": [
            []
            if isinstance(hits, EngineError)
            else [item(hit, request.return_scores) for hit in hits]
            for hits in answer
        ]
    }
    if request.allow_partial:
        body["errors"] = {str(i): f"{error.kind}: {error}" for i, error in errors.items()}
    return Response(to_json(body), media_type="application/json")


def item(hit: tuple[dict[str, Any], float], with_score: bool) -> dict[str, Any]:
    """A hit as the contract has it."""
    document, score = hit
    return {"document": document, "score": score} if with_score else document


async def invalid(_: Request, error: Exception) -> JSONResponse:
    """422 that names the field and does not repeat the request."""
    assert isinstance(error, RequestValidationError)
    problems = [
        {"loc": [str(part) for part in e["loc"]], "msg": e["msg"], "type": e["type"]}
        for e in error.errors()
    ]
    return JSONResponse({"detail": problems}, status_code=422)
