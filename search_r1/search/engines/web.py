"""Web search by SerpAPI, Google Custom Search or Brave.

Requests have a rate limit, retries and a cache on disk. Keys are used only in requests: they appear
in no message, no log and no cache entry.
"""

import hashlib
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from search_r1.search.addresses import direct
from search_r1.search.disk_cache import DiskCache
from search_r1.search.engine import EngineError, Hits
from search_r1.search.engines.web_pages import WebPages, text_at
from search_r1.search.extras import require
from search_r1.search.index.documents import contents
from search_r1.search.index.html import title_and_text
from search_r1.search.retry import backoff, seconds_to_wait

MAX_QUERY_CHARS = 400
MAX_QUERY_WORDS = 50
"""Brave's limits, which are the tightest of the three providers."""
MAX_WAIT_S = 60.0
"""The longest time in seconds that is waited when a provider asks to wait."""
SERPAPI_QUERY_KEYS = {"yahoo": "p", "yandex": "text", "naver": "query", "ebay": "_nkw"}
NO_RESULTS = "hasn't returned any results"


class WebError(EngineError):
    """The provider could not be reached, or failed, even after retries."""

    kind = "web"


class QuotaError(WebError):
    """The searches of the account are used up; a retry does not help."""

    kind = "quota"


class KeyRefused(WebError):
    """The key is wrong or has no permission to search."""

    kind = "key"


class RateLimited(WebError):
    """There were too many requests at once. The provider asks to wait `wait_s` seconds."""

    kind = "rate_limit"

    def __init__(self, message: str, wait_s: float | None = None) -> None:
        super().__init__(message)
        self.wait_s = wait_s


@dataclass(frozen=True)
class Page:
    """A search result of a provider."""

    title: str
    snippet: str
    url: str = ""


@dataclass(frozen=True)
class Provider:
    """How to ask a provider, and how to read its answer."""

    name: str
    url: str
    parameters: Callable[[str, int], dict[str, Any]]
    """Makes the parameters of a request from a query and a number of results."""
    parse: Callable[[dict[str, Any], int], list[Page]]
    """Reads a number of results from the body of an answer."""
    headers: dict[str, str] = field(default_factory=dict, repr=False)


def serpapi(key: str, engine: str = "google", url: str = "https://serpapi.com/search") -> Provider:
    """SerpAPI with one of its engines: google, bing, duckduckgo, yahoo, yandex, baidu."""
    name = SERPAPI_QUERY_KEYS.get(engine, "q")
    return Provider(
        f"serpapi-{engine}",
        url,
        lambda q, n: {"engine": engine, name: q, "num": n, "api_key": key},
        parse_serpapi,
    )


def google(
    key: str, cse_id: str, url: str = "https://customsearch.googleapis.com/customsearch/v1"
) -> Provider:
    """Google's Custom Search JSON API, which gives at most 10 results."""
    return Provider(
        "google",
        url,
        lambda q, n: {"q": q, "num": min(n, 10), "key": key, "cx": cse_id},
        parse_google,
    )


def brave(key: str, url: str = "https://api.search.brave.com/res/v1/web/search") -> Provider:
    """Brave's web search, which gives at most 20 results."""
    return Provider(
        "brave",
        url,
        lambda q, n: {"q": q, "count": min(n, 20)},
        parse_brave,
        {"X-Subscription-Token": key},
    )


def parse_serpapi(body: dict[str, Any], topk: int) -> list[Page]:
    """The first `topk` of the answer box, the organic results and the related questions."""
    pages: list[Page] = []
    box = body.get("answer_box") or {}
    if answer := box.get("answer") or box.get("snippet"):
        pages.append(Page(box.get("title") or "Answer", str(answer), box.get("link", "")))
    for item in [*body.get("organic_results", []), *body.get("related_questions", [])]:
        title = item.get("title") or item.get("question") or ""
        pages.append(Page(title, item.get("snippet") or "", item.get("link", "")))
    return [page for page in pages if page.snippet][:topk]


def parse_google(body: dict[str, Any], topk: int) -> list[Page]:
    """The first `topk` items."""
    items = body.get("items", [])[:topk]
    return [
        Page(item.get("title", ""), item.get("snippet", ""), item.get("link", "")) for item in items
    ]


def parse_brave(body: dict[str, Any], topk: int) -> list[Page]:
    """The first `topk` results of the web, with their extra snippets."""
    pages: list[Page] = []
    for item in (body.get("web") or {}).get("results", [])[:topk]:
        snippets = [item.get("description", ""), *item.get("extra_snippets", [])]
        pages.append(Page(item.get("title", ""), "\n".join(snippets), item["url"]))
    return pages


class WebRetriever:
    """An engine that searches the web, `workers` queries at a time.

    With `cache` results are kept in that file, and equal searches are answered from it.
    """

    def __init__(
        self,
        provider: Provider,
        cache: Path | None = None,
        fetch_pages: bool = False,
        max_page_chars: int = 2000,
        requests_per_s: float = 5.0,
        max_retries: int = 4,
        timeout_s: float = 10.0,
        backoff_s: float = 0.5,
        workers: int = 16,
        pages: WebPages | None = None,
    ) -> None:
        """`pages` is told of all pages that are found, so that they can be opened."""
        require("web", "web search")
        self.provider = provider
        self.name = provider.name
        self.fetch_pages = fetch_pages
        self.max_page_chars = max_page_chars
        self.max_retries = max_retries
        self.backoff_s = backoff_s
        self.http = httpx.Client(
            timeout=timeout_s, follow_redirects=True, mounts=direct(provider.url)
        )
        self.pool = ThreadPoolExecutor(workers, thread_name_prefix="web")
        self.pace = Pace(requests_per_s)
        self.cache = DiskCache(cache) if cache is not None else None
        self.pages = pages

    def __len__(self) -> int:
        return 0

    def search(self, queries: Sequence[str], topk: int) -> list[Hits | EngineError]:
        """Searches all queries, each of which succeeds or fails on its own."""
        return list(self.pool.map(lambda query: self._search(shorten(query), topk), queries))

    def _search(self, query: str, topk: int) -> Hits | EngineError:
        hits = self._found(query, topk) if query else []
        if self.pages is not None and not isinstance(hits, EngineError):
            self.pages.add(document for document, _ in hits)
        return hits

    def _found(self, query: str, topk: int) -> Hits | EngineError:
        """What the cache holds for a query, or else the provider finds."""
        key = f"{self.name}\n{self.fetch_pages}\n{topk}\n{query}"
        if self.cache is not None and (kept := self.cache.get(key)) is not None:
            return [(document, score) for document, score in kept]
        try:
            body = self._ask(query, topk)
        except EngineError as error:
            return error
        pages = self.provider.parse(body, topk)
        hits: Hits = [(self._document(page), 1.0 / rank) for rank, page in enumerate(pages, 1)]
        if self.cache is not None:
            self.cache.put(key, hits)
        return hits

    def _ask(self, query: str, topk: int) -> dict[str, Any]:
        """Returns the provider's answer.

        Raises QuotaError and KeyRefused immediately, and other errors after retries.
        """
        failures = 0
        while True:
            self.pace.wait()
            try:
                return self._ask_once(query, topk)
            except (QuotaError, KeyRefused):
                raise
            except WebError as error:
                failures += 1
                if failures > self.max_retries:
                    raise
                asked_s = error.wait_s if isinstance(error, RateLimited) else None
            time.sleep(asked_s or backoff(self.backoff_s, failures))

    def _ask_once(self, query: str, topk: int) -> dict[str, Any]:
        """Sends one request to the provider and returns its answer. Raises a WebError."""
        try:
            answer = self.http.get(
                self.provider.url,
                params=self.provider.parameters(query, topk),
                headers=self.provider.headers,
            )
        except httpx.HTTPError as error:  # the message of httpx may hold the address with the key
            raise WebError(f"{self.name}: {type(error).__name__}") from None
        return check(answer, self.name)

    def _document(self, page: Page) -> dict[str, Any]:
        """Makes a document of a page, with its text if that is fetched, or else its snippet."""
        title = title_and_text(page.title)[1] or page.url
        text = title_and_text(page.snippet)[1]
        if self.fetch_pages and page.url:
            text = text_at(self.http, page.url)[: self.max_page_chars] or text
        return {
            "id": page.url or hashlib.sha256(text.encode()).hexdigest()[:16],
            "contents": contents(title, text),
        }


def shorten(query: str) -> str:
    """The query on one line, cut to what the providers accept."""
    return " ".join(query.split()[:MAX_QUERY_WORDS])[:MAX_QUERY_CHARS]


def check(answer: httpx.Response, name: str) -> dict[str, Any]:
    """The body of a successful answer.

    Raises the QuotaError, KeyRefused, RateLimited or WebError that the answer describes.
    """
    try:
        body = answer.json()
    except ValueError:
        body = {}
    body = body if isinstance(body, dict) else {}
    error = body.get("error")
    reason, text = describe(error)
    if answer.status_code == 200 and (error is None or NO_RESULTS in text):
        return body
    message = f"{name}: status {answer.status_code}, {text or 'no explanation'}"
    is_quota_used = "dailyLimit" in reason or reason == "QUOTA_LIMITED"
    if is_quota_used or "run out of searches" in text or "per day" in text:
        raise QuotaError(message)
    if answer.status_code == 429 or "rateLimit" in reason or "RATE_LIMITED" in reason:
        raise RateLimited(message, reset_of(answer))
    if answer.status_code in (400, 401, 403, 422):
        raise KeyRefused(message)
    raise WebError(message)


def describe(error: object) -> tuple[str, str]:
    """(machine-readable reason, text) of the error object of any of the three providers."""
    if isinstance(error, dict):
        details = error.get("errors") or [{}]
        reason = details[0].get("reason") or str(error.get("code") or "")
        return reason, str(error.get("message") or error.get("detail") or "")[:300]
    return "", str(error or "")[:300]


def reset_of(answer: httpx.Response) -> float | None:
    """The seconds that the provider asks to wait, None if it does not say.

    They stand in Retry-After, or in the first (shortest) window of Brave's own header.
    """
    windows = answer.headers.get("x-ratelimit-reset", "")
    asked_s = seconds_to_wait(answer.headers.get("retry-after") or windows.split(",")[0])
    return None if asked_s is None else min(asked_s, MAX_WAIT_S)


class Pace:
    """Lets callers pass at most `per_s` times a second."""

    def __init__(self, per_s: float) -> None:
        self.interval = 1 / per_s
        self.next = 0.0
        self.lock = threading.Lock()

    def wait(self) -> None:
        """Sleeps until the caller may pass."""
        with self.lock:
            now = time.monotonic()
            start = max(now, self.next)
            self.next = start + self.interval
        time.sleep(start - now)
