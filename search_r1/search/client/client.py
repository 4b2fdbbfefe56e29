"""The asynchronous client, in which searches that run at the same time share requests.

A search that fails raises an error that says why. It never returns an empty list instead, so that
what the policy reads is always what the engine found.
"""

import asyncio
import logging
import random
from collections import Counter
from collections.abc import Sequence
from functools import partial

import httpx

from search_r1.search.addresses import direct
from search_r1.search.client.answers import Found, Passage, parse_response
from search_r1.search.client.attempts import Attempts
from search_r1.search.client.balancer import Balancer, Server
from search_r1.search.client.config import RetrieverConfig, authorization
from search_r1.search.client.errors import (
    BadAnswer,
    Closed,
    OutOfTime,
    Rejected,
    SearchError,
    ServerBusy,
    ServerFailed,
    Unreachable,
)
from search_r1.search.retry import backoff, seconds_to_wait

log = logging.getLogger(__name__)
MAX_CONNECTIONS = 64
MIN_BUSY_S = 0.5
"""A busy server is not asked again before this time, whatever it says."""
PROBE_TIMEOUT_S = 30.0
"""Longer than a server under load takes to refuse a request."""
CLOSED = "the client was closed while the search was under way"
Batch = asyncio.Task[list[Found]]
"""The task of a request that is under way, with all its attempts."""


class RetrievalClient:
    """Searches one server, or several replicas of one. Belongs to one event loop.

    `errors` counts failed attempts by kind, also those after which a retry succeeded.
    """

    def __init__(self, config: RetrieverConfig) -> None:
        self.config = config
        self.http = httpx.AsyncClient(
            limits=httpx.Limits(
                max_connections=MAX_CONNECTIONS, max_keepalive_connections=MAX_CONNECTIONS
            ),
            headers=authorization(),
            mounts=direct(*config.urls),
        )
        self.connections = asyncio.Semaphore(MAX_CONNECTIONS)
        self.balancer = Balancer(config.urls, config.backoff_s)
        self.errors: Counter[str] = Counter()
        self.waiting: list[str] = []
        self.running: dict[str, asyncio.Future[list[Passage]]] = {}
        self.flush: asyncio.TimerHandle | None = None
        self.tasks: set[Batch] = set()

    async def search(self, query: str) -> list[Passage]:
        """Returns the passages for `query`. A query that is already under way is not sent again.

        Half a surrogate pair, which a model may write but no request can carry, is searched as
        U+FFFD. Raises a SearchError when the time or the attempts are used up, or when the engine
        failed on the query.
        """
        loop = asyncio.get_running_loop()
        query = encodable(query)[: self.config.max_query_chars]
        future = self.running.get(query)
        if future is None:
            future = self.running[query] = loop.create_future()
            self.waiting.append(query)
            if len(self.waiting) >= self.config.max_batch_size:
                self._send_waiting()
            elif self.flush is None:
                self.flush = loop.call_later(self.config.batch_wait_s, self._send_waiting)
        return await asyncio.shield(future)

    def _send_waiting(self) -> None:
        if self.flush is not None:
            self.flush.cancel()
            self.flush = None
        batch = self.waiting
        self.waiting = []
        if batch:
            task = asyncio.get_running_loop().create_task(self._retrieve(batch))
            self.tasks.add(task)
            task.add_done_callback(partial(self._deliver, batch))

    def _deliver(self, queries: list[str], task: Batch) -> None:
        """Settles every query of a batch, also when its task failed or was never started."""
        self.tasks.discard(task)
        for query, found in zip(queries, outcome(task, len(queries)), strict=True):
            self._settle(query, found)

    def _settle(self, query: str, found: Found) -> None:
        """Gives the outcome to all that wait for `query`; the next caller starts a new search."""
        future = self.running.pop(query)
        if isinstance(found, SearchError):
            future.set_exception(type(found)(*found.args))
            future.exception()  # marks it as seen, because the caller may be gone
        else:
            future.set_result(found)

    async def _retrieve(self, queries: list[str]) -> list[Found]:
        """Sends a request, and repeats it while that may help, to another server if there is one.

        Waiting for a connection does not count as time of the search.
        """
        loop = asyncio.get_running_loop()
        attempts = Attempts(self.config)
        while True:
            async with self.connections:
                server = self.balancer.pick(loop.time())
                began = loop.time()
                try:
                    return await self._ask(server, queries)
                except (Rejected, BadAnswer) as error:
                    self.errors[error.kind] += 1
                    raise
                except SearchError as error:
                    self.errors[error.kind] += 1
                    last = error
                asked_s = loop.time() - began
            if self.balancer.any_is_busy:
                attempts.found_busy(asked_s, last)
                pause_s = attempts.pause_while_busy(self._busy_pause(last))
            else:
                attempts.failed(asked_s, last)
                pause_s = attempts.pause_after_failure(self._pause(attempts.failures))
            await asyncio.sleep(pause_s)

    def _pause(self, failures: int) -> float:
        """Seconds until the next attempt after so many failures in a row."""
        return self._unless_awake(backoff(self.config.backoff_s, failures))

    def _busy_pause(self, last: SearchError) -> float:
        """Seconds until the next attempt while a server is busy, as it asked for."""
        asked_s = last.retry_after_s if isinstance(last, ServerBusy) else 0.0
        return self._unless_awake(max(MIN_BUSY_S, asked_s * random.uniform(1.0, 1.1)))

    def _unless_awake(self, pause_s: float) -> float:
        """`pause_s`, or longer until a server has rested; 0 if another server is not resting."""
        now = asyncio.get_running_loop().time()
        resting_s = min(server.resting_until for server in self.balancer.servers) - now
        if resting_s <= 0 and len(self.balancer.servers) > 1:
            return 0.0
        return max(pause_s, resting_s)

    async def _ask(self, server: Server, queries: list[str]) -> list[Found]:
        """Sends one request to one server. Raises the SearchError that fits."""
        answer = await self._post(server, queries)
        now = asyncio.get_running_loop().time()
        problem = f"{server.url}: status {answer.status_code}: {answer.text[:200]}"
        if answer.status_code == 200:
            self.balancer.succeeded(server)
            found = parse_response(answer, len(queries), server.url)
            self.errors["engine"] += sum(isinstance(f, SearchError) for f in found)
            return found
        if answer.status_code == 429:
            asked_s = seconds_to_wait(answer.headers.get("retry-after", ""))
            wait_s = max(MIN_BUSY_S, self.config.backoff_s if asked_s is None else asked_s)
            self.balancer.refused(server, now, wait_s)
            raise ServerBusy(problem, wait_s)
        if answer.status_code >= 500:
            self.balancer.failed(server, now)
            raise ServerFailed(problem)
        raise Rejected(problem)

    async def _post(self, server: Server, queries: list[str]) -> httpx.Response:
        """Sends one request; returns the answer of any status.

        Raises the SearchError that fits when there is no answer.
        """
        clock = asyncio.get_running_loop().time
        body = {
            "queries": queries,
            "topk": self.config.topk,
            "return_scores": True,
            "allow_partial": True,
        }
        server.in_flight += 1
        try:
            return await self.http.post(server.url, json=body, timeout=self.config.timeout_s)
        except httpx.TimeoutException as error:
            self.balancer.failed(server, clock())
            raise OutOfTime(f"{server.url}: {type(error).__name__}") from error
        except httpx.DecodingError as error:
            raise BadAnswer(f"{server.url}: the answer cannot be decoded: {error}") from error
        except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
            raise Rejected(f"{server.url}: no address that can be asked: {error}") from error
        except httpx.HTTPError as error:
            self.balancer.failed(server, clock())
            raise Unreachable(f"{server.url}: {type(error).__name__} {error}".strip()) from error
        finally:
            server.in_flight -= 1

    def take_errors(self) -> dict[str, int]:
        """Returns the failed attempts by kind since the last call."""
        taken = {kind: n for kind, n in self.errors.items() if n}
        self.errors = Counter()
        return taken

    async def close(self) -> None:
        """Closes the connections; searches that still wait or run fail with `Closed`."""
        if self.flush is not None:
            self.flush.cancel()
            self.flush = None
        unsent = self.waiting
        self.waiting = []
        for query in unsent:
            self._settle(query, Closed(CLOSED))
        running = list(self.tasks)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        await self.http.aclose()


def outcome(task: Batch, num_queries: int) -> Sequence[Found]:
    """The outcome of each query of a finished task.

    An unexpected error is logged, and becomes the outcome of all its queries.
    """
    if task.cancelled():
        return [Closed(CLOSED)] * num_queries
    error = task.exception()
    if error is None:
        return task.result()
    if not isinstance(error, SearchError):
        cause = f"unexpected {type(error).__name__}: {error}"
        log.error("searches failed: %s", cause, exc_info=error)
        error = SearchError(cause)
    return [error] * num_queries


def encodable(query: str) -> str:
    """`query` with each lone surrogate as U+FFFD.

    The two halves of a pair become the character that they stand for.
    """
    return query.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def check_server(url: str) -> str | None:
    """Sends the server at `url` a probe query.

    Returns None if it answers by the contract, else what is wrong and how to start a server.
    """
    cure = (
        "start one, for instance: python search_r1/search/retrieval_server.py --index_path "
        "INDEX/bm25 --corpus_path CORPUS.jsonl --retriever_name bm25"
    )
    body = {"queries": ["probe"], "topk": 1, "return_scores": True}
    try:
        with httpx.Client(
            mounts=direct(url), headers=authorization(), timeout=PROBE_TIMEOUT_S
        ) as client:
            answer = client.post(url, json=body)
        if answer.status_code == 429:
            return None  # it works, and is only busy with other searches
        answer.raise_for_status()
        parse_response(answer, 1, url)
    except (httpx.HTTPError, httpx.InvalidURL, SearchError) as error:
        return f"no retrieval server answers at {url} ({type(error).__name__}: {error}); {cure}"
    return None
