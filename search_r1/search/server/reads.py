"""Reads of documents, which wait in a line of their own beside the queue of searches."""

import asyncio
import logging
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from search_r1.search.engine import EngineError
from search_r1.search.server.batching import Overloaded, Pace, retry_after_s
from search_r1.search.server.metrics import ServerMetrics
from search_r1.search.store import Store

log = logging.getLogger(__name__)
T = TypeVar("T")


class ReadFailed(EngineError):
    """A document could not be read."""

    kind = "read"


class Reads:
    """Reads documents in threads of its own, as many at a time as the store says.

    There is no room for a further read when it would wait for more than `max_wait_s` at the pace of
    the last ones; while no pace is known, when `max_unpaced` wait. In any case at most
    `max_waiting` wait. A read whose caller has gone, or ran out of time, leaves the line at once.
    """

    def __init__(
        self,
        store: Store,
        metrics: ServerMetrics,
        max_unpaced: int = 256,
        max_waiting: int = 1 << 18,
        max_wait_s: float = math.inf,
    ) -> None:
        self.store = store
        self.metrics = metrics
        self.max_unpaced = max_unpaced
        self.max_waiting = max_waiting
        self.max_wait_s = max_wait_s
        self.threads = ThreadPoolExecutor(store.num_threads, thread_name_prefix="documents")
        self.num_waiting = 0
        self.pace = Pace()

    async def run(self, read: Callable[[Store], T]) -> T:
        """What `read` returns of the store.

        Raises Overloaded at once when there is no room, ReadFailed for whatever `read` raises.
        """
        if self.is_full():
            raise self.overloaded()
        self.add_waiting(1)
        try:
            return await asyncio.get_running_loop().run_in_executor(self.threads, self.timed, read)
        finally:
            self.add_waiting(-1)

    def timed(self, read: Callable[[Store], T]) -> T:
        """Reads, and takes the time; runs in a thread. Raises ReadFailed."""
        began = time.monotonic()
        try:
            with self.metrics.read_seconds.time():
                return read(self.store)
        except Exception as error:
            log.exception("document could not be read")
            raise ReadFailed(f"{type(error).__name__}: {error}") from error
        finally:
            self.pace.add(1, time.monotonic() - began)

    def add_waiting(self, count: int) -> None:
        """Counts reads that came or went."""
        self.num_waiting += count
        self.metrics.reads_waiting.set(self.num_waiting)

    @property
    def wait_s(self) -> float:
        """How long all that wait will take, at the pace of the last reads."""
        return self.num_waiting * self.pace.seconds_per_query / self.store.num_threads

    def is_full(self) -> bool:
        """Whether there is no room for a further read."""
        if self.num_waiting >= self.max_waiting:
            return True
        if not self.pace.is_known and math.isfinite(self.max_wait_s):
            return self.num_waiting >= self.max_unpaced
        return self.wait_s > self.max_wait_s

    def overloaded(self) -> Overloaded:
        """Why there is no room."""
        return Overloaded(retry_after_s(self.wait_s))
