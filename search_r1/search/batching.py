"""From many clients' requests to engine batches: one queue, one owner thread, one cache."""

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from search_r1.search.engine import EngineError, Hits, Retriever
from search_r1.search.server_metrics import ServerMetrics

log = logging.getLogger(__name__)
Key = tuple[str, int]


class Overloaded(Exception):
    """The queue is full: the caller should come again after `retry_after_s`."""

    def __init__(self, retry_after_s: float) -> None:
        super().__init__(f"the queue is full, come again in {retry_after_s:.1f} s")
        self.retry_after_s = retry_after_s


@dataclass(frozen=True)
class Job:
    """A query that waits; the future gets its hits or an EngineError."""

    key: Key
    future: "asyncio.Future[Hits | EngineError]"


class BatchingEngine:
    """Gathers queries into batches of one topk, up to `max_batch_size`, waiting `batch_wait_s` for company.

    The engine is called from a thread of its own, never from two at a time. Equal queries of a batch are searched once.
    A query that breaks the engine fails alone: the others of its batch are searched again one by one.
    """

    def __init__(
        self,
        retriever: Retriever,
        metrics: ServerMetrics,
        max_batch_size: int = 256,
        batch_wait_s: float = 0.0,
        max_queue: int = 16384,
        cache_size: int = 10000,
    ) -> None:
        self.retriever, self.metrics = retriever, metrics
        self.max_batch_size, self.batch_wait_s, self.max_queue = max_batch_size, batch_wait_s, max_queue
        self.cache = Cache(cache_size)
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine")
        self.jobs: list[Job] = []
        self.arrived = asyncio.Event()
        self.seconds_per_query = 0.0

    async def search(self, queries: Sequence[str], topk: int) -> list[Hits | EngineError]:
        """Hits of each query. Raises Overloaded at once when the queue has no room for all of them."""
        results: list[Hits | EngineError | None] = [self.cache.get((query, topk)) for query in queries]
        missing = [i for i, hits in enumerate(results) if hits is None]
        self.metrics.cached.inc(len(queries) - len(missing))
        if len(self.jobs) + len(missing) > self.max_queue:
            raise Overloaded(max(0.1, self.seconds_per_query * len(self.jobs)))
        loop = asyncio.get_running_loop()
        jobs = [Job((queries[i], topk), loop.create_future()) for i in missing]
        self.jobs += jobs
        self.metrics.queue.set(len(self.jobs))
        self.arrived.set()
        try:
            found = await asyncio.gather(*(job.future for job in jobs))
        finally:  # a caller that went away or ran out of time: its queries need no search
            for job in jobs:
                job.future.cancel()
        for i, hits in zip(missing, found, strict=True):
            results[i] = hits
        return [hits for hits in results if hits is not None]

    async def run(self) -> None:
        """Serves the queue until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            await self.arrived.wait()
            if self.batch_wait_s > 0 and len(self.jobs) < self.max_batch_size:
                await asyncio.sleep(self.batch_wait_s)
            batch = self.next_batch()
            if batch:
                began = time.monotonic()
                results = await loop.run_in_executor(self.thread, self.search_batch, list(batch))
                self.seconds_per_query = (time.monotonic() - began) / len(batch)
                self.deliver(batch, results)

    def next_batch(self) -> dict[Key, list[Job]]:
        """The longest waiting queries of one topk, equal ones together; those whose caller went away are dropped."""
        batch: dict[Key, list[Job]] = {}
        rest: list[Job] = []
        for job in self.jobs:
            if job.future.done():
                continue
            fits = not batch or (job.key[1] == next(iter(batch))[1] and len(batch) < self.max_batch_size)
            if job.key in batch or fits:
                batch.setdefault(job.key, []).append(job)
            else:
                rest.append(job)
        self.jobs = rest
        self.metrics.queue.set(len(rest))
        if not rest:
            self.arrived.clear()
        return batch

    def search_batch(self, keys: list[Key]) -> list[Hits | EngineError]:
        """Runs in the engine's thread."""
        self.metrics.batch_size.observe(len(keys))
        with self.metrics.engine_seconds.time():
            results = attempt(self.retriever, [query for query, _ in keys], keys[0][1])
            if len(keys) > 1 and all(isinstance(hits, EngineCrash) for hits in results):
                results = [attempt(self.retriever, [query], topk)[0] for query, topk in keys]
        return results

    def deliver(self, batch: dict[Key, list[Job]], results: Sequence[Hits | EngineError]) -> None:
        """Sets the futures and fills the cache; failures are not cached."""
        for (key, jobs), hits in zip(batch.items(), results, strict=True):
            if not isinstance(hits, EngineError):
                self.cache.put(key, hits)
            for job in jobs:
                if not job.future.done():
                    job.future.set_result(hits)


class EngineCrash(EngineError):
    """An engine raised something of its own."""

    kind = "crash"


def attempt(retriever: Retriever, queries: list[str], topk: int) -> list[Hits | EngineError]:
    """The engine's results; whatever it raises belongs to the queries, the server lives on."""
    try:
        results = list(retriever.search(queries, topk))
    except EngineError as error:
        return [error] * len(queries)
    except Exception as error:
        if len(queries) == 1:
            log.exception("engine failed", extra={"engine": retriever.name})
        return [EngineCrash(f"{type(error).__name__}: {error}")] * len(queries)
    if len(results) != len(queries):
        return [EngineCrash(f"{len(results)} results for {len(queries)} queries")] * len(queries)
    return results


class Cache:
    """The hits of the `size` most recently asked queries."""

    def __init__(self, size: int) -> None:
        self.size, self.entries = size, OrderedDict[Key, Hits]()

    def get(self, key: Key) -> Hits | None:
        hits = self.entries.get(key)
        if hits is not None:
            self.entries.move_to_end(key)
        return hits

    def put(self, key: Key, hits: Hits) -> None:
        self.entries[key] = hits
        if len(self.entries) > self.size:
            self.entries.popitem(last=False)
