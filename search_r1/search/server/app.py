"""The HTTP side of a retrieval server: `/retrieve`, `/health` and `/metrics` over one engine.

Over a store of documents also `/open` and `/find`.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Annotated, Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import Field, StringConstraints
from pydantic_core import to_json

from search_r1.search.engine import EngineError, Hits, Retriever, settings_of
from search_r1.search.schema import (
    FindRequest,
    FindResponse,
    OpenRequest,
    OpenResponse,
    RetrieveRequest,
    RetrieveResponse,
)
from search_r1.search.server.handling import PROBLEMS, handle
from search_r1.search.server.limits import BodyLimit, Door
from search_r1.search.server.service import ServerSettings, Service
from search_r1.search.store import Store

NAMED_ERRORS = 3
"""Failed queries whose causes are given in the answer to a request that failed with them."""


def create_app(
    load: Callable[[], Retriever],
    settings: ServerSettings,
    load_documents: Callable[[], Store] | None = None,
) -> FastAPI:
    """Makes the application.

    `load` makes the engine, in a thread, after the server has begun to listen, and then
    `load_documents` the store.
    """
    service = Service(load, settings, load_documents)

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
    if load_documents is not None:
        add_open(app, service)
        add_find(app, service)
    add_health(app, service)
    return app


def add_retrieve(app: FastAPI, service: Service) -> None:
    """Adds `/retrieve`. The limits of this server are part of the type of its request."""
    settings = service.settings

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
        respond = partial(to_response, request=body, service=service)
        return await handle(service, request, partial(service.answer, body), respond)


def add_open(app: FastAPI, service: Service) -> None:
    """Adds `/open`, with the server's limits in the type of its request."""
    most = service.settings.max_query_chars

    class LimitedOpenRequest(OpenRequest):
        """A page of a document, within this server's limits."""

        document: Annotated[str, StringConstraints(max_length=most)]
        """Its name, as `document_id` has it."""

    @app.post("/open", response_model=OpenResponse, responses=PROBLEMS)
    async def open(body: LimitedOpenRequest, request: Request) -> Response:
        """A page of a document."""

        def read(store: Store) -> OpenResponse:
            return store.open(body.document, body.page)

        return await handle(service, request, partial(service.read, "open", read), to_json_response)


def add_find(app: FastAPI, service: Service) -> None:
    """Adds `/find`, with the server's limits in the type of its request."""
    most = service.settings.max_query_chars

    class LimitedFindRequest(FindRequest):
        """A text to look for in a document, within this server's limits."""

        document: Annotated[str, StringConstraints(max_length=most)]
        """Its name, as `document_id` has it."""
        text: Annotated[str, StringConstraints(max_length=most)]
        """In upper or lower case; words, with a space between them."""

    @app.post("/find", response_model=FindResponse, responses=PROBLEMS)
    async def find(body: LimitedFindRequest, request: Request) -> Response:
        """The sentences of a document that hold a text."""

        def read(store: Store) -> FindResponse:
            return store.find(body.document, body.text)

        return await handle(service, request, partial(service.read, "find", read), to_json_response)


def add_health(app: FastAPI, service: Service) -> None:
    """Adds `/health` and `/metrics`."""

    @app.get("/health", responses={503: {"description": "The engine is loading"}})
    async def health(response: Response) -> dict[str, Any]:
        """`ok` once the index is loaded."""
        if service.engine is None:
            response.status_code = 503
            return {"status": "loading"}
        retriever = service.engine.retriever
        documents = {"documents": service.reads.store.field} if service.reads else {}
        return {
            "status": "ok",
            "retriever": retriever.name,
            "num_documents": len(retriever),
            **settings_of(retriever),
            **documents,
        }

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Prometheus text."""
        return Response(service.metrics.render(), media_type="text/plain; version=0.0.4")


def to_response(
    answer: list[Hits | EngineError], request: RetrieveRequest, service: Service
) -> Response:
    """Makes the answer by the contract, and counts the queries that failed.

    It is a 500 when a query failed and the request did not have `allow_partial`.
    """
    errors = {i: hits for i, hits in enumerate(answer) if isinstance(hits, EngineError)}
    for error in errors.values():
        service.metrics.errors.labels(kind=error.kind).inc()
    if errors and not request.allow_partial:
        named = list(errors.items())[:NAMED_ERRORS]
        detail = "; ".join(f"query {i}: {error}" for i, error in named)
        return JSONResponse({"detail": detail}, status_code=500)
    name_of = service.name_of if request.name_documents else None
    result = [to_items(hits, request.return_scores, name_of) for hits in answer]
    body: dict[str, Any] = {"result": result}
    if request.allow_partial:
        body["errors"] = {str(i): f"{error.kind}: {error}" for i, error in errors.items()}
    return Response(to_json(body), media_type="application/json")


def to_items(
    hits: Hits | EngineError,
    with_scores: bool,
    name_of: Callable[[dict[str, Any]], str | None] | None = None,
) -> list[dict[str, Any]]:
    """The hits of a query as the contract has them; none of one that failed."""
    if isinstance(hits, EngineError):
        return []
    if not with_scores:
        return [document for document, _ in hits]
    items = [{"document": document, "score": score} for document, score in hits]
    if name_of is not None:
        for item in items:
            item["document_id"] = name_of(item["document"])
    return items


def to_json_response(answer: OpenResponse | FindResponse) -> Response:
    """The answer of the store as the contract has it."""
    return Response(to_json(answer), media_type="application/json")


async def invalid(_: Request, error: Exception) -> JSONResponse:
    """Answers 422 with the field that is wrong, without repeating the request."""
    assert isinstance(error, RequestValidationError)
    problems = [
        {"loc": list(map(str, e["loc"])), "msg": e["msg"], "type": e["type"]}
        for e in error.errors()
    ]
    return JSONResponse({"detail": problems}, status_code=422)
