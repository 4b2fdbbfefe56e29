"""A language model in the place of a search engine (ZeroSearch, arXiv 2505.04588).

It searches nothing: for each query a model behind an OpenAI-compatible endpoint is asked to write
the passages, useful ones or, where noise is asked for, ones that do not help. The key is used only
in requests: it appears in no message, no log and no cache entry.
"""

import hashlib
import json
import os
import re
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from search_r1.search.addresses import direct
from search_r1.search.disk_cache import DiskCache
from search_r1.search.engine import EngineError, Hits
from search_r1.search.errors import RetrieverError
from search_r1.search.index.documents import contents
from search_r1.search.retry import backoff, seconds_to_wait

HOPELESS = frozenset({400, 401, 403, 404, 405, 413, 422})
"""HTTP statuses that the same request would get again, so that it is not retried."""
NO_LISTING = frozenset({404, 405, 501})
"""HTTP statuses of an endpoint that does not list its models."""
MAX_WAIT_S = 60.0
"""The longest time in seconds that is waited when the endpoint asks to wait."""
PASSAGE = re.compile(r"<passage>(.*?)</passage>", re.DOTALL)
END_OF_THOUGHT = "</think>"
QUOTED_CHARS = 200
"""Characters of an answer that an error message quotes."""

USEFUL_PROMPT = """\
You stand in for a search engine over an encyclopedia. Write the {topk} passages that it finds \
for the query below. They hold what the query asks for, and say it as an encyclopedia does: plain \
sentences, with names, places and dates in full.

Each passage stands between <passage> and </passage>. Its first line is the title of its article, \
and two to four sentences follow on the next line. Write the passages and nothing else.

Query: {query}"""
NOISY_PROMPT = """\
You stand in for a bad search engine over an encyclopedia. Write the {topk} passages that it finds \
for the query below. They look like results, since they share words or the topic with the query, \
but are of no help: they are about a namesake, a neighbouring topic or a side issue. None of them \
holds what the query asks for.

Each passage stands between <passage> and </passage>. Its first line is the title of its article, \
and two to four sentences follow on the next line. Write the passages and nothing else.

Query: {query}"""
PLACES = ("{topk}", "{query}")
"""What a prompt must hold; the number of passages and the query are written there."""


class SimulatorError(EngineError):
    """The endpoint could not be reached, or failed, even after retries.

    `wait_s`: the seconds that it asks to wait, None where it does not say.
    """

    kind = "simulator"

    def __init__(self, message: str, wait_s: float | None = None) -> None:
        super().__init__(message)
        self.wait_s = wait_s


class RequestRefused(SimulatorError):
    """The key, the model or the request is wrong; a retry does not help."""

    kind = "refused"


class MalformedAnswer(SimulatorError):
    """The model wrote something else than the passages that it was asked for."""

    kind = "malformed"


@dataclass(frozen=True)
class SimulatorSettings:
    """Which model is asked, and how. Times are in seconds."""

    url: str
    """Base address, such as http://127.0.0.1:8001/v1."""
    model: str
    key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the key, where one is needed."""
    temperature: float = 0.8
    passage_tokens: int = 300
    """Most tokens of an answer, for each passage."""
    max_retries: int = 2
    """Further attempts after errors, time-outs and answers that cannot be read."""
    timeout_s: float = 20.0
    """Of one request."""
    backoff_s: float = 0.5
    concurrency: int = 64
    """Queries that are written for at the same time."""


@dataclass(frozen=True)
class Prompts:
    """What the model is asked for a query, with `PLACES`."""

    useful: str = USEFUL_PROMPT
    noisy: str = NOISY_PROMPT

    def ask(self, query: str, is_noisy: bool, topk: int) -> str:
        """The prompt for a query."""
        prompt = self.noisy if is_noisy else self.useful
        return prompt.replace("{topk}", str(topk)).replace("{query}", query)


class SimulatedRetriever:
    """An engine whose passages a language model writes.

    With `cache` the passages are kept in that file, and equal prompts are answered from it.
    """

    name = "simulated"

    def __init__(
        self, settings: SimulatorSettings, prompts: Prompts, cache: Path | None = None
    ) -> None:
        """Raises RetrieverError when the endpoint does not answer or lacks the model."""
        self.simulator = settings
        self.prompts = prompts
        self.base = settings.url.rstrip("/")
        self.http = httpx.Client(
            timeout=settings.timeout_s,
            headers=authorization(settings.key_env),
            mounts=direct(settings.url),
            limits=httpx.Limits(max_connections=settings.concurrency),
        )
        check_endpoint(self.http, settings)
        self.pool = ThreadPoolExecutor(settings.concurrency, thread_name_prefix="simulated")
        self.cache = DiskCache(cache) if cache is not None else None

    def __len__(self) -> int:
        return 0

    def search(self, queries: Sequence[str], topk: int) -> list[Hits | EngineError]:
        """Lets the model write useful passages for all queries."""
        return self.simulate(queries, [False] * len(queries), topk)

    def simulate(
        self, queries: Sequence[str], noisy: Sequence[bool], topk: int
    ) -> list[Hits | EngineError]:
        """Lets the model write passages, each query of which succeeds or fails on its own."""
        return list(self.pool.map(self._passages_for, queries, noisy, [topk] * len(queries)))

    def _passages_for(self, query: str, is_noisy: bool, topk: int) -> Hits | EngineError:
        """The passages for one query; none for a query without a word."""
        query = " ".join(query.split())
        if not query:
            return []
        body = self._body(query, is_noisy, topk)
        key = json.dumps(body, sort_keys=True)
        if self.cache is not None and (kept := self.cache.get(key)) is not None:
            return [(document, score) for document, score in kept]
        try:
            passages = self._ask(body, topk)
        except SimulatorError as error:
            return error
        hits: Hits = [
            (to_document(passage, is_noisy), 1.0 / rank) for rank, passage in enumerate(passages, 1)
        ]
        if self.cache is not None:
            self.cache.put(key, hits)
        return hits

    def _body(self, query: str, is_noisy: bool, topk: int) -> dict[str, Any]:
        """The request for the passages of a query."""
        prompt = self.prompts.ask(query, is_noisy, topk)
        return {
            "model": self.simulator.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": self.simulator.temperature,
            "max_tokens": topk * self.simulator.passage_tokens,
        }

    def _ask(self, body: dict[str, Any], topk: int) -> list[str]:
        """Returns the `contents` of the passages that the model wrote.

        Raises RequestRefused immediately, and other SimulatorErrors after retries.
        """
        failures = 0
        while True:
            try:
                return self._ask_once(body, topk)
            except RequestRefused:
                raise
            except SimulatorError as error:
                failures += 1
                if failures > self.simulator.max_retries:
                    raise
                asked_s = error.wait_s
            time.sleep(asked_s or backoff(self.simulator.backoff_s, failures))

    def _ask_once(self, body: dict[str, Any], topk: int) -> list[str]:
        """Sends one request and reads its answer. Raises a SimulatorError."""
        try:
            answer = self.http.post(f"{self.base}/chat/completions", json=body)
        except httpx.HTTPError as error:
            raise SimulatorError(f"{self.base}: {type(error).__name__} {error}".strip()) from error
        if answer.status_code == 200:
            return read_passages(text_of(answer), topk)
        message = f"{self.base}: status {answer.status_code}: {answer.text[:QUOTED_CHARS]}"
        if answer.status_code in HOPELESS:
            raise RequestRefused(message)
        asked_s = seconds_to_wait(answer.headers.get("retry-after", ""))
        raise SimulatorError(message, None if asked_s is None else min(asked_s, MAX_WAIT_S))


def authorization(key_env: str) -> dict[str, str]:
    """The header with the key from an environment variable; empty where that is not set."""
    key = os.environ.get(key_env)
    return {"Authorization": f"Bearer {key}"} if key else {}


def check_endpoint(http: httpx.Client, settings: SimulatorSettings) -> None:
    """Asks the endpoint for its models.

    Raises RetrieverError when it does not answer, refuses the key or lists other models. One that
    does not list its models is not refused.
    """
    url = settings.url
    try:
        answer = http.get(f"{url.rstrip('/')}/models")
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise RetrieverError(
            f"--simulated_url {url} does not answer ({type(error).__name__} {error}); start the "
            "model's server first, for instance: vllm serve MODEL --port 8001"
        ) from error
    if answer.status_code in NO_LISTING:
        return
    if answer.status_code in (401, 403):
        raise RetrieverError(
            f"--simulated_url {url} refuses the key in ${settings.key_env} (status "
            f"{answer.status_code})"
        )
    names = model_names(answer)
    if settings.model not in names:
        raise RetrieverError(
            f"--simulated_model {settings.model}: {url} has no such model, only "
            f"{', '.join(names) or 'none'}"
        )


def model_names(answer: httpx.Response) -> list[str]:
    """The models that an endpoint lists. Raises RetrieverError when that is no list of models."""
    try:
        answer.raise_for_status()
        return [str(model["id"]) for model in answer.json()["data"]]
    except (httpx.HTTPStatusError, ValueError, KeyError, TypeError) as error:
        raise RetrieverError(
            f"--simulated_url: {answer.url} is not the list of models of an OpenAI-compatible "
            f"endpoint (status {answer.status_code}: {answer.text[:QUOTED_CHARS]}); the address "
            "ends with /v1 at most servers"
        ) from error


def text_of(answer: httpx.Response) -> str:
    """What the model wrote. Raises MalformedAnswer when the body is no chat completion."""
    try:
        text = answer.json()["choices"][0]["message"]["content"]
        text.encode()  # half of a surrogate pair could not be sent on
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise MalformedAnswer(
            f"no chat completion with a text ({error!r}): {answer.text[:QUOTED_CHARS]!r}"
        ) from error
    return text


def read_passages(text: str, topk: int) -> list[str]:
    """The `contents` of the first `topk` passages of an answer.

    What stands around the passages, such as a thought or a greeting, is left out. Raises
    MalformedAnswer when there are fewer, or one of them lacks its title or its text.

    >>> read_passages("Here: <passage>\\nOslo\\nOslo lies\\nin Norway.\\n</passage>", 1)
    ['"Oslo"\\nOslo lies in Norway.']
    """
    said = text.rpartition(END_OF_THOUGHT)[2]
    blocks = PASSAGE.findall(said)[:topk]
    if len(blocks) < topk:
        raise MalformedAnswer(
            f"the model wrote {len(blocks)} of {topk} passages between <passage> and </passage>: "
            f"{said[:QUOTED_CHARS]!r} (cut off? --simulated_passage_tokens allows more)"
        )
    return [read_passage(block) for block in blocks]


def read_passage(block: str) -> str:
    """The `contents` of a passage. Raises MalformedAnswer without a title or a text."""
    title, _, text = block.strip().partition("\n")
    title = " ".join(title.replace('"', "").split())
    text = " ".join(text.split())
    if not title or not text or "<passage>" in block:
        raise MalformedAnswer(
            f"a passage is not a title, a line break and a text: {block[:QUOTED_CHARS]!r}"
        )
    return contents(title, text)


def to_document(passage: str, is_noisy: bool) -> dict[str, Any]:
    """The document of a passage; its id says what was asked for, and is the same for one text."""
    digest = hashlib.sha256(passage.encode()).hexdigest()[:16]
    kind = "noisy" if is_noisy else "useful"
    return {"id": f"{kind}-{digest}", "contents": passage}


def prompt_of(path: Path | None, default: str, flag: str) -> str:
    """The prompt of a file, or the default one without a file.

    Raises RetrieverError when the file cannot be read, or lacks one of `PLACES`.
    """
    if path is None:
        return default
    try:
        prompt = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RetrieverError(f"{flag} {path}: {error}") from error
    if missing := [place for place in PLACES if place not in prompt]:
        raise RetrieverError(
            f"{flag} {path}: a prompt must hold {' and '.join(PLACES)}, this one lacks "
            f"{' and '.join(missing)}"
        )
    return prompt
