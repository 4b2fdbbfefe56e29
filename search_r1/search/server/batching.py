"""The queue in front of the engine: it makes batches of the queries of many clients."""

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
from typing import NamedTuple

from search_r1.search.engine import EngineError, Hits, Retriever, Simulator
from search_r1.search.noise import NO_NOISE, Noise
from search_r1.search.server.metrics import ServerMetrics

log = logging.getLogger(__name__)
Answer = asyncio.Future[Hits | EngineError]
"""The future that a caller waits for."""
MIN_RETRY_S = 1.0
"""The least number of seconds after which a refused caller is asked to come again."""


class Asked(NamedTuple):
    """A query as the engine is asked it."""

    text: str
    is_noisy: bool
    """Whether it is to get passages that do not help."""


Key = tuple[Asked, int]
"""What hits are kept under: a query as it is asked, and topk."""


class Overloaded(Exception):
    """The queue is full: the caller should come again after `retry_after_s`."""

    def __init__(self, retry_after_s: float) -> None:
        super().__init__(f"the queue is full, come again in {retry_after_s:.1f} s")
        self.retry_after_s = retry_after_s


def retry_after_s(wait_s: float) -> float:
    """After how many seconds a caller that was refused should come again.

    It is drawn from the time that the queue will take, so that not all come at once.
    """
    return random.uniform(MIN_RETRY_S, max(2 * MIN_RETRY_S, wait_s))


@dataclass
class Waiting:
    """A query in the queue. It is queued once, however many callers ask it."""

    number: int
    """The number of the query in the order of arrival."""
    futures: list[Answer] = field(default_factory=list)
    """The futures of its callers; each gets the hits or an EngineError."""


class BatchingEngine:
    """Collects queries into batches of one topk, with up to `max_batch_size` queries each.

    If the engine is idle, a batch waits `batch_wait_s` for more queries. One thread of its own
    calls the engine. Equal queries that wait are searched once. If a query breaks the engine, only
    this query fails: the others of its batch are searched again one by one. A query whose caller
    has gone, or ran out of time, leaves the queue at once.

    The queue is full when a further query would wait for more than `max_wait_s` at the pace of the
    last batches, or, while no pace is known, when one batch is waiting. It never holds more than
    `max_queue` queries, which limits the memory.
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
        self.waiting: dict[int, dict[Asked, Waiting]] = {}
        """The queue: by topk, then by query, in the order of arrival."""
        self.num_waiting = 0
        self.arrivals = itertools.count()
        self.arrived = asyncio.Event()
        self.pace = Pace()

    async def search(
        self, queries: Sequence[str], topk: int, noise: Noise = NO_NOISE
    ) -> list[Hits | EngineError]:
        """Returns the hits of each query, which do not help where the noise falls on it.

        Noise is only for an engine that simulates.

        Raises Overloaded at once when the queue has no room for all of them.
        """
        asked = [Asked(query, noise.falls_on(query)) for query in queries]
        kept = [self.cache.get((query, topk)) for query in asked]
        missing = [query for query, hits in zip(asked, kept, strict=True) if hits is None]
        self.metrics.cached.inc(len(asked) - len(missing))
        if missing and (self.is_full() or self.num_waiting + len(missing) > self.max_queue):
            raise self.overloaded()
        found = iter(await self.wait_for(missing, topk))
        return [next(found) if hits is None else hits for hits in kept]

    async def wait_for(self, queries: Sequence[Asked], topk: int) -> list[Hits | EngineError]:
        """Puts queries into the queue and returns their hits, when they are found.

        A caller that went away, or ran out of time, cancels this: its queries leave the queue.
        """
        futures = [self.enqueue(query, topk) for query in queries]
        try:
            return await asyncio.gather(*futures)
        except asyncio.CancelledError:
            for query, future in zip(queries, futures, strict=True):
                self.withdraw(query, topk, future)
            raise

    def enqueue(self, query: Asked, topk: int) -> Answer:
        """Puts a query into the queue; returns the future of its hits."""
        future: Answer = asyncio.get_running_loop().create_future()
        group = self.waiting.setdefault(topk, {})
        if query not in group:
            group[query] = Waiting(next(self.arrivals))
        group[query].futures.append(future)
        self.num_waiting += 1
        self.metrics.queue.set(self.num_waiting)
        self.arrived.set()
        return future

    def withdraw(self, query: Asked, topk: int, future: Answer) -> None:
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
        """Seconds that the queue will take at the pace of the last batches."""
        return self.num_waiting * self.pace.seconds_per_query

    def is_full(self) -> bool:
        """Whether a further query would have to wait too long.

        While the pace is not known, one batch may wait.
        """
        if self.num_waiting >= self.max_queue:
            return True
        if not self.pace.is_known and math.isfinite(self.max_wait_s):
            return self.num_waiting >= self.max_batch_size
        return self.wait_s > self.max_wait_s

    def overloaded(self) -> Overloaded:
        """Why a further query is refused."""
        return Overloaded(retry_after_s(self.wait_s))

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
                served = sum(len(futures) for futures in batch.values())
                self.pace.add(served, time.monotonic() - began)

    def next_batch(self) -> dict[Key, list[Answer]]:
        """Takes a batch out of the queue: the queries of one topk that have waited longest."""
        batch: dict[Key, list[Answer]] = {}
        if self.waiting:
            topk = min(self.waiting, key=self.first_number)
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

    def first_number(self, topk: int) -> int:
        """The arrival of the query that has waited longest among those of one topk."""
        return next(iter(self.waiting[topk].values())).number

    def search_batch(self, keys: list[Key]) -> list[Hits | EngineError]:
        """Searches a batch; runs in the engine's thread."""
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
    """The seconds that a query takes, as a decaying average over batches of a busy engine.

    Batches of an idle engine are not counted: they are small, and the first one may take long.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.queries = 0.0

    def add(self, queries: int, seconds: float) -> None:
        """Counts a batch; the weight of every earlier batch falls by a tenth."""
        self.seconds = 0.9 * self.seconds + seconds
        self.queries = 0.9 * self.queries + queries

    @property
    def is_known(self) -> bool:
        """Whether a batch has been counted."""
        return self.queries > 0

    @property
    def seconds_per_query(self) -> float:
        """The average; 0 before the first batch."""
        return self.seconds / self.queries if self.queries else 0.0


class EngineCrash(EngineError):
    """An engine raised an error of its own."""

    kind = "crash"


def attempt(retriever: Retriever, queries: list[Asked], topk: int) -> list[Hits | EngineError]:
    """Calls the engine and returns its results. What it raises becomes the error of all queries."""
    try:
        results = list(ask(retriever, queries, topk))
    except EngineError as error:
        return [error] * len(queries)
    except Exception as error:
        if len(queries) == 1:
            log.exception("engine failed", extra={"engine": retriever.name})
        return [EngineCrash(f"{type(error).__name__}: {error}")] * len(queries)
    if len(results) != len(queries):
        return [EngineCrash(f"{len(results)} results for {len(queries)} queries")] * len(queries)
    return results


def ask(retriever: Retriever, queries: Sequence[Asked], topk: int) -> Sequence[Hits | EngineError]:
    """What the engine finds, or writes if it simulates."""
    texts = [query.text for query in queries]
    if isinstance(retriever, Simulator):
        return retriever.simulate(texts, [query.is_noisy for query in queries], topk)
    return retriever.search(texts, topk)


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
