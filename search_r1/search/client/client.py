"""The asynchronous client, in which searches that run at the same time share requests.

Documents are opened and searched by requests of their own, with the same attempts and replicas.

It never returns an empty list for a failure: what the policy reads is what the engine found, and a
search that fails raises an error that says why.
"""

import asyncio
import logging
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar
from urllib.parse import urljoin

import httpx

from search_r1.search.addresses import direct
from search_r1.search.client.answers import Found, M, Passage, parse_document, parse_response
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
from search_r1.search.noise import NO_NOISE, Noise
from search_r1.search.retry import backoff, seconds_to_wait
from search_r1.search.schema import MAX_PAGE, FindResponse, OpenResponse

log = logging.getLogger(__name__)
MAX_CONNECTIONS = 64
MIN_BUSY_S = 0.5
"""A busy server is not asked again before this time, whatever it says."""
PROBE_TIMEOUT_S = 30.0
"""Longer than a server under load takes to refuse a request."""
CLOSED = "the client was closed while the search was under way"
T = TypeVar("T")


@dataclass(frozen=True)
class Question(Generic[T]):
    """A request to whichever server is asked."""

    endpoint: str
    """The last part of its address; empty for that of the configuration."""
    body: dict[str, Any]
    read: Callable[[httpx.Response, str], list[T | SearchError]]
    """What an answer of status 200, from an address, says of each thing that was asked.

    Raises BadAnswer."""

    def address(self, server: Server) -> str:
        """Where a server takes it."""
        return endpoint_of(server.url, self.endpoint) if self.endpoint else server.url


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
        self.waiting: dict[Noise, list[str]] = {}
        """Queries that are to be sent, those of one noise together."""
        self.running: dict[tuple[str, Noise], asyncio.Future[list[Passage]]] = {}
        self.flush: asyncio.TimerHandle | None = None
        self.tasks: set[asyncio.Task[Any]] = set()
        """Requests that are under way, each with all its attempts."""

    async def search(self, query: str, noise: Noise = NO_NOISE) -> list[Passage]:
        """Returns the passages for `query`, which do not help where the `noise` falls on it.

        A query that is already under way with the same noise is not sent again. Only searches with
        the same noise share a request.

        Half a surrogate pair, which a model may write but no request can carry, is searched as
        U+FFFD. Raises a SearchError when the time or the attempts are used up, or when the engine
        failed on the query.
        """
        loop = asyncio.get_running_loop()
        query = self._short(query)
        future = self.running.get((query, noise))
        if future is None:
            future = self.running[query, noise] = loop.create_future()
            batch = self.waiting.setdefault(noise, [])
            batch.append(query)
            if len(batch) >= self.config.max_batch_size:
                self._send_waiting()
            elif self.flush is None:
                self.flush = loop.call_later(self.config.batch_wait_s, self._send_waiting)
        return await asyncio.shield(future)

    def _send_waiting(self) -> None:
        if self.flush is not None:
            self.flush.cancel()
            self.flush = None
        waiting = self.waiting
        self.waiting = {}
        for noise, batch in waiting.items():
            task = self._begin(self._search_for(batch, noise))
            task.add_done_callback(partial(self._deliver, batch, noise))

    def _search_for(self, queries: list[str], noise: Noise) -> Question[list[Passage]]:
        """The question of a batch of queries that ask for the same noise."""
        body: dict[str, Any] = {
            "queries": queries,
            "topk": self.config.topk,
            "return_scores": True,
            "allow_partial": True,
        }
        if self.config.show_documents:
            body["name_documents"] = True
        if noise != NO_NOISE:
            body |= {"noise": noise.share, "noise_seed": noise.seed}
        return Question("", body, partial(self._read_passages, len(queries)))

    def _read_passages(self, num_queries: int, answer: httpx.Response, url: str) -> list[Found]:
        """The outcome of each query; counts those on which the engine failed."""
        found = parse_response(answer, num_queries, url)
        self.errors["engine"] += sum(isinstance(f, SearchError) for f in found)
        return found

    async def open(self, document: str, page: int = 1) -> OpenResponse:
        """A page of a document, or in `error` why there is none. Raises a SearchError."""
        body = {"document": self._short(document), "page": min(page, MAX_PAGE)}
        return await self._ask_alone(Question("open", body, partial(read_one, OpenResponse)))

    async def find(self, document: str, text: str) -> FindResponse:
        """The sentences of a document that hold a text, or in `error` why there are none.

        Raises a SearchError.
        """
        body = {"document": self._short(document), "text": self._short(text)}
        return await self._ask_alone(Question("find", body, partial(read_one, FindResponse)))

    def _short(self, text: str) -> str:
        """A text as a request can carry it and no server refuses it."""
        return encodable(text)[: self.config.max_query_chars]

    async def _ask_alone(self, question: Question[T]) -> T:
        """The one thing that a question asks for. Raises a SearchError.

        Who is cancelled takes the request along.
        """
        task = self._begin(question)
        try:
            await asyncio.wait({task})
        finally:
            task.cancel()
        (found,) = outcome(task, 1)
        if isinstance(found, SearchError):
            raise found
        return found

    def _begin(self, question: Question[T]) -> "asyncio.Task[list[T | SearchError]]":
        """Starts a request, with all its attempts."""
        task = asyncio.get_running_loop().create_task(self._send(question))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    def _deliver(self, queries: list[str], noise: Noise, task: "asyncio.Task[list[Found]]") -> None:
        """Settles every query of a batch, also when the task failed or was never begun."""
        for query, found in zip(queries, outcome(task, len(queries)), strict=True):
            self._settle(query, noise, found)

    def _settle(self, query: str, noise: Noise, found: Found) -> None:
        """Gives the outcome to all that wait for `query`; the next caller starts a new search."""
        future = self.running.pop((query, noise))
        if isinstance(found, SearchError):
            future.set_exception(type(found)(*found.args))
            future.exception()  # marks it as seen, because the caller may be gone
        else:
            future.set_result(found)

    async def _send(self, question: Question[T]) -> list[T | SearchError]:
        """Sends a request, and again while that may help, to the next server if there is one.

        Waiting for a connection does not count as time of the search.
        """
        loop = asyncio.get_running_loop()
        attempts = Attempts(self.config)
        while True:
            async with self.connections:
                server = self.balancer.pick(loop.time())
                began = loop.time()
                try:
                    return await self._ask(server, question)
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

    async def _ask(self, server: Server, question: Question[T]) -> list[T | SearchError]:
        """Sends one request to one server. Raises the SearchError that fits."""
        url = question.address(server)
        answer = await self._post(server, url, question.body)
        now = asyncio.get_running_loop().time()
        problem = f"{url}: status {answer.status_code}: {answer.text[:200]}"
        if answer.status_code == 200:
            self.balancer.succeeded(server)
            return question.read(answer, url)
        if answer.status_code == 429:
            asked_s = seconds_to_wait(answer.headers.get("retry-after", ""))
            wait_s = max(MIN_BUSY_S, self.config.backoff_s if asked_s is None else asked_s)
            self.balancer.refused(server, now, wait_s)
            raise ServerBusy(problem, wait_s)
        if answer.status_code >= 500:
            self.balancer.failed(server, now)
            raise ServerFailed(problem)
        raise Rejected(problem)

    async def _post(self, server: Server, url: str, body: dict[str, Any]) -> httpx.Response:
        """Sends one request; returns the answer of any status.

        Raises the SearchError that fits when there is no answer.
        """
        clock = asyncio.get_running_loop().time
        server.in_flight += 1
        try:
            return await self.http.post(url, json=body, timeout=self.config.timeout_s)
        except httpx.TimeoutException as error:
            self.balancer.failed(server, clock())
            raise OutOfTime(f"{url}: {type(error).__name__}") from error
        except httpx.DecodingError as error:
            raise BadAnswer(f"{url}: the answer cannot be decoded: {error}") from error
        except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
            raise Rejected(f"{url}: no address that can be asked: {error}") from error
        except httpx.HTTPError as error:
            self.balancer.failed(server, clock())
            raise Unreachable(f"{url}: {type(error).__name__} {error}".strip()) from error
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
        self.waiting = {}
        for noise, batch in unsent.items():
            for query in batch:
                self._settle(query, noise, Closed(CLOSED))
        running = list(self.tasks)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        await self.http.aclose()


def endpoint_of(url: str, endpoint: str) -> str:
    """The address of another endpoint of the server whose /retrieve is at `url`.

    >>> [endpoint_of(f"http://a:1/{path}", "open") for path in ("retrieve", "b/retrieve/")]
    ['http://a:1/open', 'http://a:1/b/open']
    """
    return urljoin(url.rstrip("/"), endpoint)


def read_one(model: type[M], answer: httpx.Response, url: str) -> list[M | SearchError]:
    """The answer to a question that asks for one thing. Raises BadAnswer."""
    return [parse_document(answer, model, url)]


def outcome(
    task: "asyncio.Task[list[T | SearchError]]", num_queries: int
) -> Sequence[T | SearchError]:
    """What a finished task says of each of its queries.

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
    problem = probe(url, body, lambda answer: parse_response(answer, 1, url))
    return problem and f"no retrieval server answers at {url} ({problem}); {cure}"


def check_documents(url: str) -> str | None:
    """Asks the server whose /retrieve is at `url` for a document.

    Returns what is wrong with it, None if it answers as the contract says.
    """
    address = endpoint_of(url, "open")
    problem = probe(
        address, {"document": "probe"}, lambda answer: parse_document(answer, OpenResponse, address)
    )
    return problem and (
        f"no documents are served at {address} ({problem}); start the server with --documents id, "
        "or another field that names documents"
    )


def check_noise(url: str) -> str | None:
    """Asks the server at `url` for noise.

    Returns what is wrong with it, None if it answers by the contract.
    """
    body = {"queries": ["probe"], "topk": 1, "return_scores": True, "noise": 1.0}
    problem = probe(url, body, lambda answer: parse_response(answer, 1, url))
    return problem and (
        f"{url} gives no noise ({problem}); start a server with --retriever_name simulated "
        "(docs/retriever.md), or set the shares of retriever.noise to 0"
    )


def probe(url: str, body: dict[str, Any], read: Callable[[httpx.Response], object]) -> str | None:
    """What is wrong with a server that is asked once; None for a right answer."""
    try:
        with httpx.Client(
            mounts=direct(url), headers=authorization(), timeout=PROBE_TIMEOUT_S
        ) as client:
            answer = client.post(url, json=body)
        if answer.status_code == 429:
            return None  # it works, and is only busy with other searches
        if answer.status_code != 200:
            return f"status {answer.status_code}: {answer.text[:200]}"
        read(answer)
    except (httpx.HTTPError, httpx.InvalidURL, SearchError) as error:
        return f"{type(error).__name__}: {error}"
    return None
