"""The engine behind the HTTP server: loaded in a thread, then fed from a queue.

Beside it the store of documents, if there is one.
"""

import asyncio
import logging
import signal
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from fastapi import HTTPException

from search_r1.search.engine import EngineError, Hits, Retriever, Simulator
from search_r1.search.errors import RetrieverError
from search_r1.search.noise import Noise
from search_r1.search.schema import FindResponse, OpenResponse, RetrieveRequest
from search_r1.search.server.batching import BatchingEngine, Overloaded
from search_r1.search.server.latency import Latency
from search_r1.search.server.metrics import ServerMetrics
from search_r1.search.server.reads import ReadFailed, Reads
from search_r1.search.store import Store

log = logging.getLogger(__name__)
T = TypeVar("T")
A = TypeVar("A", OpenResponse, FindResponse)
LOADING_RETRY_S = 2
READ_PATHS = ("/open", "/find")
WAIT_SHARE = 0.5
"""A request is refused if it would have to wait longer than this share of its deadline. It is not
the whole deadline, because the estimate of the wait may be wrong."""
REPORT_EVERY_S = 60.0
CANNOT_LOAD = (RetrieverError, EngineError, OSError, ImportError)
"""Exceptions by which `load` says that the engine cannot be loaded. Any other one is a bug."""


@dataclass(frozen=True)
class ServerSettings:
    """The settings of a server, other than those of its engine. Times are in seconds."""

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
    """The engine, once it is loaded, and the metrics of the server."""

    def __init__(
        self,
        load: Callable[[], Retriever],
        settings: ServerSettings,
        load_documents: Callable[[], Store] | None = None,
    ) -> None:
        self.load = load
        self.load_documents = load_documents
        self.settings = settings
        self.metrics = ServerMetrics()
        self.stop: Callable[[], None] = partial(signal.raise_signal, signal.SIGTERM)
        self.engine: BatchingEngine | None = None
        self.reads: Reads | None = None
        """The store, loaded before the engine is named ready."""
        self.failed = False
        self.served = 0

    async def run(self) -> None:
        """Loads the engine, then serves its queue.

        A failure of either ends the server with a status other than 0.
        """
        began = time.monotonic()
        try:
            retriever = await asyncio.to_thread(self.load)
            if self.load_documents is not None:
                self.reads = self.limited(await asyncio.to_thread(self.load_documents))
        except CANNOT_LOAD as error:
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
        self.engine = self.batched(retriever)
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

    def batched(self, retriever: Retriever) -> BatchingEngine:
        """Puts a queue with the configured limits in front of the engine."""
        s = self.settings
        return BatchingEngine(
            retriever,
            self.metrics,
            s.max_batch_size,
            s.batch_wait_s,
            s.max_queue,
            s.cache_size,
            max_wait_s=WAIT_SHARE * s.request_timeout_s,
        )

    def limited(self, store: Store) -> Reads:
        """The store with its line, by the settings."""
        s = self.settings
        max_wait_s = WAIT_SHARE * s.request_timeout_s
        return Reads(store, self.metrics, s.max_batch_size, s.max_queue, max_wait_s)

    def give_up(self) -> None:
        """Ends the server as failed, because without an engine its clients would wait in vain."""
        self.failed = True
        self.stop()

    async def report(self) -> None:
        """Logs every minute how many queries were served, if there were any."""
        while True:
            served = self.served
            await asyncio.sleep(REPORT_EVERY_S)
            if self.served > served:
                log.info(
                    "served", extra={"queries": self.served - served, "seconds": REPORT_EVERY_S}
                )

    async def answer(self, request: RetrieveRequest) -> list[Hits | EngineError]:
        """Searches the queries of a request; returns the hits of each.

        Raises HTTPException when the engine is not ready, too busy or too slow, or is asked for
        noise that it cannot make.
        """
        if self.engine is None:
            raise loading()
        noise = Noise(request.noise or 0.0, request.noise_seed)
        if noise.share > 0 and not isinstance(self.engine.retriever, Simulator):
            raise no_noise(self.engine.retriever.name)
        self.metrics.queries.inc(len(request.queries))
        self.served += len(request.queries)
        if not request.queries:
            return []
        topk = request.topk or self.settings.topk
        search = partial(self.engine.search, request.queries, topk, noise)
        return await self.in_time(search, len(request.queries))

    async def read(self, endpoint: str, read: Callable[[Store], A]) -> A:
        """What `read` returns of the store; counts it under the endpoint.

        Raises HTTPException when the store is not ready, too busy, too slow or broken.
        """
        if self.reads is None or self.engine is None:
            raise loading()
        try:
            answer = await self.in_time(partial(self.reads.run, read), 1)
        except ReadFailed as error:
            self.metrics.errors.labels(kind=error.kind).inc()
            raise HTTPException(500, str(error)) from error
        self.metrics.reads.labels(endpoint=endpoint, outcome=answer.error or "ok").inc()
        return answer

    def name_of(self, passage: dict[str, Any]) -> str | None:
        """The name of a passage's document; None without a store."""
        return self.reads.store.name_of(passage) if self.reads is not None else None

    async def in_time(self, work: Callable[[], Awaitable[T]], num_delays: int) -> T:
        """The result of `work`, after the longest of so many delays of an experiment.

        Raises HTTPException where there is no room for it, or it takes too long.
        """
        s = self.settings
        try:
            async with asyncio.timeout(s.request_timeout_s):
                if s.latency is not None:
                    await asyncio.sleep(max(s.latency.draw() for _ in range(num_delays)))
                return await work()
        except Overloaded as error:
            raise HTTPException(
                429, str(error), {"Retry-After": f"{error.retry_after_s:.0f}"}
            ) from error
        except TimeoutError as error:
            raise HTTPException(504, f"no result within {s.request_timeout_s:g} s") from error

    def overload(self, path: str) -> Overloaded | None:
        """Why a further request to `path` would be refused, None if there is room for it."""
        queue = self.reads if path in READ_PATHS else self.engine
        return queue.overloaded() if queue is not None and queue.is_full() else None

    def count_refusal(self) -> None:
        """Counts a request that was refused before it was read."""
        self.metrics.errors.labels(kind="http_429").inc()
        self.metrics.requests.labels(status=429).inc()


def loading() -> HTTPException:
    """The answer while engine and store are not there yet."""
    return HTTPException(503, "the engine is loading", {"Retry-After": str(LOADING_RETRY_S)})


def no_noise(engine: str) -> HTTPException:
    """The answer to a request for noise from an engine that only searches."""
    return HTTPException(
        409,
        f"noise: the engine {engine} searches and cannot write noise; only --retriever_name "
        "simulated can. Ask for noise 0, or leave it out",
    )
