"""Web search against local servers that speak each provider's documented protocol, errors
included."""

import time

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse

from search_r1.launch import free_port
from search_r1.search.engine import EngineError
from search_r1.search.engines.web import (
    MAX_QUERY_CHARS,
    Pace,
    WebRetriever,
    brave,
    google,
    serpapi,
    shorten,
)
from search_r1.search.errors import RetrieverError
from search_r1.search.index.html import title_and_text
from search_r1.search.serp_search_server import load, parse_arguments
from tests.retrieval import serving, wait_until_ready

KEY = "the-secret-key"


class Web:
    """The three providers and a web site. `answers`: what to say instead, in turn; `asked`:
    (parameters, headers)."""

    def __init__(self):
        self.answers = []
        self.asked = []
        self.app = FastAPI()
        self.app.add_api_route("/search", self.serpapi)
        self.app.add_api_route("/customsearch/v1", self.google)
        self.app.add_api_route("/res/v1/web/search", self.brave)
        self.app.add_api_route("/page", self.page)
        self.app.add_api_route("/broken", self.broken)

    def instead(self, request):
        self.asked.append((dict(request.query_params), dict(request.headers)))
        if not self.answers:
            return None
        status, body, headers = self.answers.pop(0)
        return JSONResponse(body, status, headers)

    def serpapi(self, request: Request):
        if answer := self.instead(request):
            return answer
        if request.query_params.get("api_key") != KEY:
            return JSONResponse(
                {
                    "error": "Invalid API key. Your API key should be here: https://serpapi.com/manage-api-key"
                },
                401,
            )
        query = request.query_params.get("q") or request.query_params.get("p")
        return {
            "search_metadata": {"status": "Success"},
            "answer_box": {
                "type": "organic_result",
                "title": "Box",
                "answer": f"about {query}",
                "link": "http://box",
            },
            "organic_results": [
                {
                    "position": i,
                    "title": f"<b>R{i}</b>",
                    "link": f"http://r{i}",
                    "snippet": f"result {i}",
                }
                for i in range(1, 6)
            ],
            "related_questions": [{"question": "Why?", "snippet": "because", "link": "http://why"}],
        }

    def google(self, request: Request):
        if answer := self.instead(request):
            return answer
        if request.query_params.get("key") != KEY or request.query_params.get("cx") != "cse":
            error = {
                "code": 400,
                "message": "API key not valid.",
                "errors": [{"reason": "badRequest"}],
                "status": "INVALID_ARGUMENT",
            }
            return JSONResponse({"error": error}, 400)
        count = int(request.query_params["num"])
        return {
            "items": [
                {"title": f"G{i}", "link": f"{request.base_url}page?{i}", "snippet": f"g {i}"}
                for i in range(count)
            ]
        }

    def brave(self, request: Request):
        if answer := self.instead(request):
            return answer
        if request.headers.get("x-subscription-token") != KEY:
            error = {
                "code": "SUBSCRIPTION_TOKEN_INVALID",
                "detail": "The provided subscription token is invalid.",
                "status": 422,
            }
            return JSONResponse({"type": "ErrorResponse", "error": error}, 422)
        results = [
            {
                "title": "B",
                "url": f"{request.base_url}broken",
                "description": "the <strong>best</strong> &amp; only",
                "extra_snippets": ["more"],
            }
        ]
        return {"type": "search", "web": {"type": "search", "results": results}}

    def page(self):
        return HTMLResponse(
            "<html><head><title>A page</title><style>p "
            "{}</style></head><body><nav>Home</nav><script>x()</script>"
            "<h1>Head</h1><p>First&nbsp;line of "
            "<i>text</i>.</p><p>Second.</p><footer>Legal</footer></body></html>"
        )

    def broken(self):
        return JSONResponse({}, 404)


@pytest.fixture
def web():
    fake = Web()
    with serving(fake.app) as base:
        fake.base = base
        yield fake


def retriever(provider, **kwargs):
    return WebRetriever(provider, requests_per_s=1000, backoff_s=0.01, **kwargs)


def test_serpapi(web):
    engine = retriever(serpapi(KEY, "google", f"{web.base}/search"))
    (hits,) = engine.search(["who is it"], 3)
    contents = ['"Box"\nabout who is it', '"R1"\nresult 1', '"R2"\nresult 2']
    assert [d["contents"] for d, _ in hits] == contents and hits[0][0]["id"] == "http://box"
    assert hits[0][1] > hits[1][1] > hits[2][1]
    assert web.asked[0][0] == {"engine": "google", "q": "who is it", "num": "3", "api_key": KEY}


@pytest.mark.parametrize(("engine", "name"), [("bing", "q"), ("yahoo", "p"), ("yandex", "text")])
def test_serpapi_engines_name_the_query_their_own_way(web, engine, name):
    retriever(serpapi(KEY, engine, f"{web.base}/search")).search(["x"], 1)
    assert web.asked[0][0]["engine"] == engine and web.asked[0][0][name] == "x"


def test_google_and_brave(web):
    (hits,) = retriever(google(KEY, "cse", f"{web.base}/customsearch/v1")).search(["x"], 20)
    assert len(hits) == 10 and hits[0][0]["contents"] == '"G0"\ng 0'
    (hits,) = retriever(brave(KEY, f"{web.base}/res/v1/web/search")).search(["x"], 3)
    assert hits[0][0]["contents"] == '"B"\nthe best & only\nmore'


def test_pages_become_text_and_unreachable_ones_keep_their_snippet(web):
    (hits,) = retriever(google(KEY, "cse", f"{web.base}/customsearch/v1"), fetch_pages=True).search(
        ["x"], 1
    )
    assert hits[0][0]["contents"] == '"G0"\nHead\nFirst line of text.\nSecond.'
    (hits,) = retriever(brave(KEY, f"{web.base}/res/v1/web/search"), fetch_pages=True).search(
        ["x"], 1
    )
    assert hits[0][0]["contents"].startswith('"B"\nthe best')


QUOTA = {
    "error": {
        "code": 403,
        "message": "Daily limit exceeded",
        "errors": [{"reason": "dailyLimitExceeded"}],
    }
}
PER_DAY = {
    "error": {
        "code": 429,
        "message": "Quota exceeded for quota metric 'Queries' and limit 'Queries per day'",
        "errors": [{"reason": "rateLimitExceeded"}],
    }
}
BRAVE_BUSY = {
    "type": "ErrorResponse",
    "error": {"code": "RATE_LIMITED", "detail": "Request rate limit exceeded", "status": 429},
}


@pytest.mark.parametrize(
    ("answer", "kind", "attempts"),
    [
        ((403, QUOTA, {}), "quota", 1),
        ((429, PER_DAY, {}), "quota", 1),
        ((429, {"error": "Your account has run out of searches."}, {}), "quota", 1),
        ((401, {"error": "Invalid API key."}, {}), "key", 1),
        ((429, BRAVE_BUSY, {}), "rate_limit", 3),
        ((500, {"error": "Something went wrong"}, {}), "web", 3),
        ((200, {"error": "Google is not reachable"}, {}), "web", 3),
    ],
)
def test_errors_are_typed_and_retried_where_that_may_help(web, answer, kind, attempts):
    web.answers = [answer] * attempts
    found = retriever(serpapi(KEY, "google", f"{web.base}/search"), max_retries=2).search(["x"], 3)[
        0
    ]
    assert isinstance(found, EngineError) and found.kind == kind and len(web.asked) == attempts
    assert KEY not in str(found)


def test_no_results_are_no_error(web):
    web.answers = [(200, {"error": "Google hasn't returned any results for this query."}, {})]
    assert retriever(serpapi(KEY, "google", f"{web.base}/search")).search(["x"], 3) == [[]]


def test_a_rate_limit_is_waited_for(web):
    web.answers = [(429, BRAVE_BUSY, {"X-RateLimit-Reset": "1, 1419704"})]
    began = time.monotonic()
    (hits,) = retriever(brave(KEY, f"{web.base}/res/v1/web/search")).search(["x"], 3)
    assert hits and time.monotonic() - began >= 1


def test_an_unreachable_provider_is_an_error_without_the_key():
    engine = retriever(
        serpapi(KEY, "google", f"http://127.0.0.1:{free_port()}/search"), max_retries=1
    )
    found = engine.search(["x"], 3)[0]
    assert isinstance(found, EngineError) and "ConnectError" in str(found) and KEY not in str(found)
    assert KEY not in repr(brave(KEY))


def test_the_cache_outlives_the_process_and_holds_no_key(web, tmp_path):
    def fresh():
        return retriever(
            serpapi(KEY, "google", f"{web.base}/search"), cache=tmp_path / "cache.sqlite"
        )

    first = fresh().search(["x"], 3)
    assert fresh().search(["x"], 3) == first and len(web.asked) == 1
    fresh().search(["x"], 2)
    assert len(web.asked) == 2 and KEY.encode() not in (tmp_path / "cache.sqlite").read_bytes()


def test_failures_are_not_cached(web, tmp_path):
    engine = retriever(
        serpapi(KEY, "google", f"{web.base}/search"), cache=tmp_path / "c.sqlite", max_retries=0
    )
    web.answers = [(500, {}, {})]
    assert (
        isinstance(engine.search(["x"], 3)[0], EngineError) and len(engine.search(["x"], 3)[0]) == 3
    )


def test_queries_are_cut():
    assert len(shorten("word " * 100).split()) == 50 and len(shorten("x" * 1000)) == MAX_QUERY_CHARS
    assert shorten(" a\n b ") == "a b"


def test_requests_keep_the_pace():
    pace = Pace(50)
    began = time.monotonic()
    for _ in range(6):
        pace.wait()
    assert time.monotonic() - began >= 0.1


def test_html():
    title, text = title_and_text(
        "<title>T &amp; U</title><body>a<br>b<div>c<p>d</div><aside>e</aside><script>f</script>"
    )
    assert title == "T & U" and text.split() == ["a", "b", "c", "d"]
    assert title_and_text("plain < text") == ("", "plain < text")
    assert title_and_text(b"")[1] == ""


def test_the_published_command_line(web):
    """As its users write it, with a query through the whole server."""
    import subprocess
    import sys
    from pathlib import Path

    script = Path(__file__).parents[3] / "search_r1" / "search" / "serp_search_server.py"
    port = free_port()
    command = [
        sys.executable,
        str(script),
        "--search_url",
        f"{web.base}/search",
        "--topk",
        "3",
        "--serp_api_key",
        KEY,
    ]
    server = subprocess.Popen([*command, "--port", str(port)], stderr=subprocess.PIPE, text=True)
    try:
        wait_until_ready(f"http://127.0.0.1:{port}/health", server)
        answer = httpx.post(
            f"http://127.0.0.1:{port}/retrieve", json={"queries": ["one", "two"]}, timeout=20
        )
        assert [len(hits) for hits in answer.json()["result"]] == [3, 3]
        web.answers = [(401, {"error": "Invalid API key."}, {})]
        refused = httpx.post(
            f"http://127.0.0.1:{port}/retrieve", json={"queries": ["three"]}, timeout=20
        )
        assert refused.status_code == 500 and "Invalid API key" in refused.text
    finally:
        server.terminate()
        assert KEY not in server.communicate()[1]


def test_a_missing_key_is_named(monkeypatch):
    for name in ("SERPAPI_API_KEY", "GOOGLE_API_KEY", "GOOGLE_CSE_ID", "BRAVE_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(RetrieverError, match="--serp_api_key"):
        load(parse_arguments([]))
    with pytest.raises(RetrieverError, match="--google_api_key and --google_cse_id"):
        load(parse_arguments(["--provider", "google"]))
    monkeypatch.setenv("BRAVE_API_KEY", KEY)
    assert load(parse_arguments(["--provider", "brave"])).name == "brave"
