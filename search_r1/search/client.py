"""The asynchronous client: searches that run at the same time share requests; a search that fails says why.

It never returns an empty list for a failure: what the policy reads is what the engine found.
"""

import asyncio
import random
from dataclasses import dataclass

import httpx
from pydantic import ValidationError

from search_r1.search.config import RetrieverConfig
from search_r1.search.schema import RetrieveResponse, ScoredDocument

PROBE_TIMEOUT_S = 10.0


class SearchError(Exception):
    """A search that failed for good: the message names server, cause and number of attempts."""


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


class RetrievalClient:
    """Searches one server. Belongs to one event loop."""

    def __init__(self, config: RetrieverConfig) -> None:
        self.config = config
        self.http = httpx.AsyncClient(limits=httpx.Limits(max_connections=64, max_keepalive_connections=64))
        self.waiting: dict[str, list[asyncio.Future[list[Passage]]]] = {}
        self.flush: asyncio.TimerHandle | None = None
        self.tasks: set[asyncio.Task[None]] = set()

    async def search(self, query: str) -> list[Passage]:
        """The passages for `query`. Raises SearchError when the deadline or the attempts are used up."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[list[Passage]] = loop.create_future()
        self.waiting.setdefault(query, []).append(future)
        if len(self.waiting) >= self.config.max_batch_size:
            self._send_waiting()
        elif self.flush is None:
            self.flush = loop.call_later(self.config.batch_wait_s, self._send_waiting)
        return await future

    def _send_waiting(self) -> None:
        if self.flush is not None:
            self.flush.cancel()
            self.flush = None
        batch, self.waiting = self.waiting, {}
        if batch:
            task = asyncio.get_running_loop().create_task(self._serve(batch))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)

    async def _serve(self, batch: dict[str, list[asyncio.Future[list[Passage]]]]) -> None:
        try:
            results = await self._retrieve(list(batch))
        except SearchError as error:
            for futures in batch.values():
                for future in futures:
                    if not future.done():
                        future.set_exception(SearchError(*error.args))
            return
        for passages, futures in zip(results, batch.values(), strict=True):
            for future in futures:
                if not future.done():
                    future.set_result(passages)

    async def _retrieve(self, queries: list[str]) -> list[list[Passage]]:
        """One request, repeated while that may help."""
        loop, config = asyncio.get_running_loop(), self.config
        deadline = loop.time() + config.timeout_s
        cause = "no time left"
        for attempt in range(config.max_retries + 1):
            left = deadline - loop.time()
            if left <= 0:
                raise SearchError(
                    f"{config.url}: no answer in {config.timeout_s:g} s ({attempt} attempts, last: {cause})"
                )
            try:
                answer = await self.http.post(
                    config.url, json={"queries": queries, "topk": config.topk, "return_scores": True}, timeout=left
                )
                if answer.status_code == 200:
                    return parse_response(answer, len(queries), config.url)
                cause = f"status {answer.status_code}: {answer.text[:200]}"
                if answer.status_code != 429 and answer.status_code < 500:
                    raise SearchError(f"{config.url}: {cause}")
            except httpx.TransportError as error:
                cause = f"{type(error).__name__} {error}".strip()
            pause = config.backoff_s * 2**attempt * random.uniform(0.5, 1.0)
            await asyncio.sleep(min(pause, max(0.0, deadline - loop.time())))
        raise SearchError(f"{config.url}: failed {config.max_retries + 1} times, last: {cause}")

    async def close(self) -> None:
        """Closes the connections."""
        await self.http.aclose()


def parse_response(answer: httpx.Response, num_queries: int, url: str) -> list[list[Passage]]:
    """The passages of each query. Raises SearchError when the answer is not of the contract."""
    try:
        lists = RetrieveResponse.model_validate(answer.json()).result
        scored = [[ScoredDocument.model_validate(item) for item in items] for items in lists]
    except (ValidationError, ValueError) as error:
        raise SearchError(f"{url}: the answer is not of the /retrieve contract: {error}") from error
    if len(scored) != num_queries:
        raise SearchError(f"{url}: {len(scored)} results for {num_queries} queries")
    return [[Passage.from_contents(s.document.id, s.document.contents, s.score) for s in items] for items in scored]


def check_server(url: str) -> str | None:
    """What is wrong with the server at `url`, None if it answers a probe query as the contract says."""
    cure = (
        "start one, for instance: python search_r1/search/retrieval_server.py --index_path INDEX/bm25 "
        "--corpus_path CORPUS.jsonl --retriever_name bm25"
    )
    try:
        answer = httpx.post(url, json={"queries": ["probe"], "topk": 1, "return_scores": True}, timeout=PROBE_TIMEOUT_S)
        answer.raise_for_status()
        parse_response(answer, 1, url)
    except (httpx.HTTPError, httpx.InvalidURL, SearchError) as error:
        return f"no retrieval server answers at {url} ({type(error).__name__}: {error}); {cure}"
    return None
