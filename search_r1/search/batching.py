"""From many clients' requests to engine batches: one queue, one owner thread, one cache."""

import asyncio
import itertools
import logging
import math
import random
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from search_r1.search.engine import EngineError, Hits, Retriever
from search_r1.search.server_metrics import ServerMetrics

log = logging.getLogger(__name__)
Key = tuple[str, int]
Answer = asyncio.Future[Hits | EngineError]
"""What a caller waits for."""
MIN_RETRY_S = 1.0
"""Nobody who was refused is asked to come again sooner."""


class Overloaded(Exception):
    """The queue is full: the caller should come again after `retry_after_s`."""

    def __init__(self, retry_after_s: float) -> None:
        super().__init__(f"the queue is full, come again in {retry_after_s:.1f} s")
        self.retry_after_s = retry_after_s


@dataclass
class Waiting:
    """A query that waits, once however many ask it; each future gets its hits or an EngineError."""

    number: int
    """Of its arrival."""
    futures: list[Answer] = field(default_factory=list)


class BatchingEngine:
    """Gathers queries into batches of one topk, up to `max_batch_size`, waiting `batch_wait_s` for
    company.

    The engine is called from a thread of its own, never from two at a time. Equal queries that wait
    are searched once. A query that breaks the engine fails alone: the others of its batch are
    searched again one by one. A query whose caller has gone, or ran out of time, leaves the queue
    at once.

    The queue is full for whom it could not serve within `max_wait_s`, at the pace of the last
    batches (before one is known, for more than a batch), and in any case above `max_queue` queries,
    which bounds the memory.
    """

    def __init__(
        self,
        retriever: Retriever,
        metrics: ServerMetrics,
        max_batch_size: int = 256,
        batch_wait_s: float = 0.0,
        max_queue: int = 1 << 18,
        cache_size: int = 10000,
        max_wait_s: float = math.inf,
    ) -> None:
        self.retriever = retriever
        self.metrics = metrics
        self.max_batch_size = max_batch_size
        self.batch_wait_s = batch_wait_s
        self.max_queue = max_queue
        self.max_wait_s = max_wait_s
        self.cache = Cache(cache_size)
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine")
        self.waiting: dict[int, dict[str, Waiting]] = {}
        """By topk and query, in the order of arrival."""
        self.num_waiting = 0
        self.arrivals = itertools.count()
        self.arrived = asyncio.Event()
        self.pace = Pace()

    async def search(self, queries: Sequence[str], topk: int) -> list[Hits | EngineError]:
        """Hits of each query. Raises Overloaded at once when the queue has no room for all of
        them."""
        results: list[Hits | EngineError | None] = [
            self.cache.get((query, topk)) for query in queries
        ]
        missing = [i for i, hits in enumerate(results) if hits is None]
        self.metrics.cached.inc(len(queries) - len(missing))
        if missing and (self.is_full() or self.num_waiting + len(missing) > self.max_queue):
            raise Overloaded(self.retry_after_s())
        futures = [self.enqueue(queries[i], topk) for i in missing]
        try:
            found = await asyncio.gather(*futures)
        except (
            asyncio.CancelledError
        ):  # a caller that went away or ran out of time: its queries need no search
            for i, future in zip(missing, futures, strict=True):
                self.withdraw(queries[i], topk, future)
            raise
        for i, hits in zip(missing, found, strict=True):
            results[i] = hits
        return [hits for hits in results if hits is not None]

    def enqueue(self, query: str, topk: int) -> Answer:
        """Lets a query wait for the engine; its future."""
        future: Answer = asyncio.get_running_loop().create_future()
        group = self.waiting.setdefault(topk, {})
        if query not in group:
            group[query] = Waiting(next(self.arrivals))
        group[query].futures.append(future)
        self.num_waiting += 1
        self.metrics.queue.set(self.num_waiting)
        self.arrived.set()
        return future

    def withdraw(self, query: str, topk: int, future: Answer) -> None:
        """Takes a query out of the queue, if it is still there and nobody else asks it."""
        group = self.waiting.get(topk, {})
        entry = group.get(query)
        if entry is None or future not in entry.futures:
            return
        entry.futures.remove(future)
        if not entry.futures:
            del group[query]
        if not group:
            del self.waiting[topk]
        self.num_waiting -= 1
        self.metrics.queue.set(self.num_waiting)

    @property
    def wait_s(self) -> float:
        """How long the queue will take, as far as one can tell."""
        return self.num_waiting * self.pace.seconds_per_query

    def is_full(self) -> bool:
        """Whether a further query would have to wait too long. One batch may wait while the pace is
        not known."""
        if self.num_waiting >= self.max_queue:
            return True
        if not self.pace.is_known and math.isfinite(self.max_wait_s):
            return self.num_waiting >= self.max_batch_size
        return self.wait_s > self.max_wait_s

    def retry_after_s(self) -> float:
        """When to come again: any moment until the present queue is done, so that not all come at
        the same one."""
        return random.uniform(MIN_RETRY_S, max(2 * MIN_RETRY_S, self.wait_s))

    async def run(self) -> None:
        """Serves the queue until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            await self.arrived.wait()
            if self.batch_wait_s > 0 and self.num_waiting < self.max_batch_size:
                await asyncio.sleep(self.batch_wait_s)
            began = time.monotonic()
            batch = self.next_batch()
            is_busy = bool(self.waiting) or len(batch) == self.max_batch_size
            if batch:
                results = await loop.run_in_executor(self.thread, self.search_batch, list(batch))
                self.deliver(batch, results)
            if is_busy:
                self.pace.add(
                    sum(len(futures) for futures in batch.values()), time.monotonic() - began
                )

    def next_batch(self) -> dict[Key, list[Answer]]:
        """The longest waiting queries of one topk."""
        batch: dict[Key, list[Answer]] = {}
        if self.waiting:
            topk = min(self.waiting, key=lambda k: next(iter(self.waiting[k].values())).number)
            group = self.waiting[topk]
            for query in list(itertools.islice(group, self.max_batch_size)):
                batch[query, topk] = group.pop(query).futures
            if not group:
                del self.waiting[topk]
        self.num_waiting -= sum(len(futures) for futures in batch.values())
        self.metrics.queue.set(self.num_waiting)
        if not self.waiting:
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

    def deliver(
        self, batch: dict[Key, list[Answer]], results: Sequence[Hits | EngineError]
    ) -> None:
        """Sets the futures and fills the cache; failures are not cached."""
        for (key, futures), hits in zip(batch.items(), results, strict=True):
            if not isinstance(hits, EngineError):
                self.cache.put(key, hits)
            for future in futures:
                if not future.done():
                    future.set_result(hits)


class Pace:
    """Seconds that a query takes in full batches, or while others wait, over the last ones.

    An idle engine's batches say little: they are small, and the first one may take long.
    """

    def __init__(self) -> None:
        self.seconds = self.queries = 0.0

    def add(self, queries: int, seconds: float) -> None:
        """A batch; every one before it counts a tenth less."""
        self.seconds = 0.9 * self.seconds + seconds
        self.queries = 0.9 * self.queries + queries

    @property
    def is_known(self) -> bool:
        """Whether there was a batch."""
        return self.queries > 0

    @property
    def seconds_per_query(self) -> float:
        """0 before the first batch."""
        return self.seconds / self.queries if self.queries else 0.0


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
        self.size = size
        self.entries = OrderedDict[Key, Hits]()

    def get(self, key: Key) -> Hits | None:
        hits = self.entries.get(key)
        if hits is not None:
            self.entries.move_to_end(key)
        return hits

    def put(self, key: Key, hits: Hits) -> None:
        self.entries[key] = hits
        if len(self.entries) > self.size:
            self.entries.popitem(last=False)
