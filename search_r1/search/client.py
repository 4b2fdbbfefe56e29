"""The asynchronous client: searches that run at the same time share requests; a search that fails
says why.

It never returns an empty list for a failure: what the policy reads is what the engine found.
"""

import asyncio
import logging
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import httpx
from pydantic import ValidationError

from search_r1.search.addresses import direct
from search_r1.search.balancer import Balancer, Server
from search_r1.search.config import RetrieverConfig, authorization
from search_r1.search.schema import RetrieveResponse, ScoredDocument

log = logging.getLogger(__name__)
MAX_CONNECTIONS = 64
MIN_BUSY_S = 0.5
"""A busy server is not asked again sooner, whatever it says."""
PROBE_TIMEOUT_S = 30.0
"""More than a server under load takes to refuse."""
CLOSED = "the client was closed while the search was under way"


class SearchError(Exception):
    """A search that failed for good: the message names server, cause and number of attempts; `kind`
    is for counting."""

    kind = "other"


class Unreachable(SearchError):
    """No connection, or one that broke."""

    kind = "connection"


class OutOfTime(SearchError):
    """The deadline passed."""

    kind = "timeout"


class ServerBusy(SearchError):
    """429: the queue was full; the server asks to come again after `retry_after_s`."""

    kind = "overloaded"

    def __init__(self, message: str, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ServerFailed(SearchError):
    """5xx."""

    kind = "server"


class Rejected(SearchError):
    """Another 4xx: the request is wrong, repeating it is of no use."""

    kind = "rejected"


class BadAnswer(SearchError):
    """An answer that is not of the contract."""

    kind = "contract"


class EngineFailed(SearchError):
    """The engine could not do this very query."""

    kind = "engine"


class Closed(SearchError):
    """The client was closed before there was an answer."""

    kind = "closed"


@dataclass(frozen=True)
class Passage:
    """A retrieved passage; the title keeps its literal quotes."""

    id: str
    title: str
    text: str
    score: float

    @classmethod
    def from_contents(cls, id: object, contents: str, score: float) -> "Passage":
        """Splits `contents` at its first line break."""
        title, _, text = contents.partition("\n")
        return cls(str(id), title, text, score)


Found = list[Passage] | SearchError


class RetrievalClient:
    """Searches one server or several replicas of one. Belongs to one event loop.

    `errors` counts failed attempts by kind, those that a retry made good included.
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
        self.tasks: set[asyncio.Task[list[Found]]] = set()

    async def search(self, query: str) -> list[Passage]:
        """The passages for `query`; one that is already being searched is not sent again.

        Half a surrogate pair, which a model may write and which no request can carry, is searched
        as U+FFFD. Raises a SearchError when the deadline or the attempts are used up, or the engine
        could not do it.
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

    def _deliver(self, queries: list[str], task: "asyncio.Task[list[Found]]") -> None:
        """Settles every query of a batch, whatever became of the task, also if it was cancelled
        before it began."""
        self.tasks.discard(task)
        for query, found in zip(queries, outcome(task, len(queries)), strict=True):
            self._settle(query, found)

    def _settle(self, query: str, found: Found) -> None:
        """Hands the result to all who wait for `query`; who asks again from now on starts a new
        search."""
        future = self.running.pop(query)
        if isinstance(found, SearchError):
            future.set_exception(type(found)(*found.args))
            future.exception()  # whoever asked may be gone
        else:
            future.set_result(found)

    async def _retrieve(self, queries: list[str]) -> list[Found]:
        """One request, repeated while that may help, at the next server if there is one.

        Only failures use up attempts and `timeout_s`. What is waited for a connection, or because a
        server is busy, does not: a retriever that is slower than the engines is no failure.
        """
        loop = asyncio.get_running_loop()
        config = self.config
        left_s = config.timeout_s
        patience_s = config.busy_timeout_s
        failures = 0
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
                left_s = config.timeout_s
                failures = 0
                patience_s -= asked_s
                if patience_s <= 0:
                    raise ServerBusy(
                        f"busy for {config.busy_timeout_s:g} s, last: {last}"
                    ) from last
                pause_s = min(patience_s, self._busy_pause(last))
                patience_s -= pause_s
            else:
                failures += 1
                left_s -= asked_s
                if left_s <= 0:
                    took = (
                        f"no answer in {config.timeout_s:g} s ({failures} attempts, last: {last})"
                    )
                    raise OutOfTime(took) from last
                if failures > config.max_retries:
                    raise type(last)(f"search failed {failures} times, last: {last}") from last
                pause_s = min(left_s, self._pause(failures))
                left_s -= pause_s
            await asyncio.sleep(pause_s)

    def _pause(self, failures: int) -> float:
        """Seconds until the next attempt after so many failures in a row."""
        return self._unless_awake(
            self.config.backoff_s * 2 ** (failures - 1) * random.uniform(0.5, 1.0)
        )

    def _busy_pause(self, last: SearchError) -> float:
        """Seconds until the next attempt while a server is busy: what it asked for."""
        asked_s = last.retry_after_s if isinstance(last, ServerBusy) else 0.0
        return self._unless_awake(max(MIN_BUSY_S, asked_s * random.uniform(1.0, 1.1)))

    def _unless_awake(self, pause_s: float) -> float:
        """`pause_s`, and at least till a server wakes up; nothing while another server is awake."""
        now = asyncio.get_running_loop().time()
        resting_s = min(server.resting_until for server in self.balancer.servers) - now
        if resting_s <= 0 and len(self.balancer.servers) > 1:
            return 0.0
        return max(pause_s, resting_s)

    async def _ask(self, server: Server, queries: list[str]) -> list[Found]:
        """One request to one server. Raises the SearchError that fits."""
        clock = asyncio.get_running_loop().time
        body = {
            "queries": queries,
            "topk": self.config.topk,
            "return_scores": True,
            "allow_partial": True,
        }
        server.in_flight += 1
        try:
            answer = await self.http.post(server.url, json=body, timeout=self.config.timeout_s)
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
        status = answer.status_code
        problem = f"{server.url}: status {answer.status_code}: {answer.text[:200]}"
        if status == 200:
            self.balancer.succeeded(server)
            found = parse_response(answer, len(queries), server.url)
            self.errors["engine"] += sum(isinstance(f, SearchError) for f in found)
            return found
        if status == 429:
            wait_s = max(MIN_BUSY_S, retry_after(answer, self.config.backoff_s))
            self.balancer.refused(server, clock(), wait_s)
            raise ServerBusy(problem, wait_s)
        if status >= 500:
            self.balancer.failed(server, clock())
            raise ServerFailed(problem)
        raise Rejected(problem)

    def take_errors(self) -> dict[str, int]:
        """Failed attempts by kind since the last call."""
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


def outcome(task: "asyncio.Task[list[Found]]", num_queries: int) -> Sequence[Found]:
    """What a finished task says of each of its queries. An error that was not foreseen is logged
    and becomes theirs."""
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
    """`query` with each lone surrogate as U+FFFD, and the two halves of a pair as the character
    they stand for."""
    return query.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def retry_after(answer: httpx.Response, default: float) -> float:
    """Seconds that a 429 asks to wait."""
    value = answer.headers.get("retry-after", "")
    return float(value) if value.isdecimal() else default


def parse_response(answer: httpx.Response, num_queries: int, url: str) -> list[Found]:
    """The passages of each query, or why it failed. Raises BadAnswer when the answer is not of the
    contract."""
    try:
        response = RetrieveResponse.model_validate(answer.json())
        scored = [
            [ScoredDocument.model_validate(item) for item in items] for items in response.result
        ]
    except (ValidationError, ValueError) as error:
        raise BadAnswer(f"{url}: the answer is not of the /retrieve contract: {error}") from error
    if len(scored) != num_queries:
        raise BadAnswer(f"{url}: {len(scored)} results for {num_queries} queries")
    errors = response.errors or {}
    return [
        EngineFailed(f"{url}: {errors[i]}")
        if i in errors
        else [Passage.from_contents(s.document.id, s.document.contents, s.score) for s in items]
        for i, items in enumerate(scored)
    ]


def check_server(url: str) -> str | None:
    """What is wrong with the server at `url`, None if it answers a probe query as the contract
    says."""
    cure = (
        "start one, for instance: python search_r1/search/retrieval_server.py --index_path "
        "INDEX/bm25 "
        "--corpus_path CORPUS.jsonl --retriever_name bm25"
    )
    body = {"queries": ["probe"], "topk": 1, "return_scores": True}
    try:
        with httpx.Client(
            mounts=direct(url), headers=authorization(), timeout=PROBE_TIMEOUT_S
        ) as client:
            answer = client.post(url, json=body)
        if answer.status_code == 429:
            return None  # busy with the searches of others, and well
        answer.raise_for_status()
        parse_response(answer, 1, url)
    except (httpx.HTTPError, httpx.InvalidURL, SearchError) as error:
        return f"no retrieval server answers at {url} ({type(error).__name__}: {error}); {cure}"
    return None
