"""The retrieval server over real HTTP: contract, limits, load, faults."""

import asyncio
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import httpx
import pytest

from search_r1.launch import free_port
from search_r1.search.server import limits
from search_r1.search.server.app import create_app
from search_r1.search.server.batching import BatchingEngine, Overloaded
from search_r1.search.server.latency import Latency
from search_r1.search.server.metrics import ServerMetrics
from search_r1.search.server.service import ServerSettings, Service
from tests.processes import PATIENCE_S, wait_for
from tests.retrieval import SERVER, retrieval_server, serving, wait_until_ready, write_corpus
from tests.search_r1.search.echo import ROWS, Engine, Gate, app


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("index")
    write_corpus(path, ROWS)
    return path


@pytest.fixture(scope="module")
def url(folder):
    with retrieval_server(folder, "--topk", "2") as (address, _):
        yield address


HTTP = httpx.Client(timeout=30)
IMPATIENT = httpx.Timeout(60, read=0.2)
"""Of clients that give up while their request is under way."""


def ask(base, *queries, **body):
    return HTTP.post(f"{base}/retrieve", json={"queries": list(queries), **body})


@pytest.mark.parametrize("num_queries", [0, 1, 2, 5])
def test_contract_with_and_without_scores(url, num_queries):
    """Two queries without scores broke the original: it took the second list for the scores."""
    queries = ["born in Torvel", "hills", "sails", "harbour", "the ?"][:num_queries]
    scored = httpx.post(url, json={"queries": queries, "topk": 3, "return_scores": True}).json()[
        "result"
    ]
    plain = httpx.post(url, json={"queries": queries, "topk": 3}).json()
    assert plain.keys() == {"result"} and len(scored) == len(plain["result"]) == num_queries
    assert [[hit["document"] for hit in hits] for hits in scored] == plain["result"]
    if num_queries:
        assert scored[0][0]["document"] == ROWS[1] and scored[0][0]["score"] > scored[0][1]["score"]
    if num_queries == 5:
        assert scored[4] == []  # a query without a word finds nothing, and breaks nothing


def test_topk_of_server_and_validation_naming_the_field(url):
    assert (
        len(httpx.post(url, json={"queries": ["Torvel Marin Keld born"]}).json()["result"][0]) == 2
    )
    for body, field in [
        ({"queries": "not a list"}, "queries"),
        ({"queries": ["a", 1]}, "1"),
        ({"queries": [], "topk": 0}, "topk"),
        ({}, "queries"),
        ({"queries": ["a"], "return_scores": "x"}, "return_scores"),
    ]:
        answer = httpx.post(url, json=body)
        assert answer.status_code == 422 and field in answer.json()["detail"][0]["loc"]
    assert (
        httpx.post(
            url, content=b"{broken", headers={"content-type": "application/json"}
        ).status_code
        == 422
    )
    assert httpx.post(url, content=b'{"queries": ["\\ud800"]}').status_code == 422


def test_health_and_metrics(url):
    base = url.removesuffix("/retrieve")
    assert httpx.get(f"{base}/health").json() == {
        "status": "ok",
        "retriever": "bm25",
        "num_documents": 4,
    }
    ask(base, "harbour"), ask(base, "harbour")
    text = httpx.get(f"{base}/metrics").text
    for name in (
        "queue_depth",
        "batch_size_bucket",
        "request_seconds_bucket",
        "engine_seconds_sum",
        "cache_hits_total",
    ):
        assert f"retrieval_{name}" in text
    assert float(text.split("\nretrieval_cache_hits_total ")[1].split("\n")[0]) >= 1


def test_limits_name_what_is_too_large():
    limits = {"max_queries": 3, "max_query_chars": 5, "max_body_bytes": 300}
    with serving(app(Engine(), **limits)) as base:
        wait_until_ready(f"{base}/health")
        answers = [ask(base, *"abcd"), ask(base, "a", "toolong"), ask(base, "x" * 400)]
        assert [a.status_code for a in answers] == [422, 422, 413]
        assert "at most 3" in answers[0].text and "300 bytes" in answers[2].text
        assert answers[1].json()["detail"][0]["loc"] == ["body", "queries", "1"]
        chunks = (b'{"queries": ["' + b"x" * 100 for _ in range(9))  # no Content-Length
        assert httpx.post(f"{base}/retrieve", content=chunks).status_code == 413


def test_a_token_is_asked_for():
    with serving(app(Engine(), token="secret")) as base:
        wait_until_ready(f"{base}/health")
        body = {"queries": ["a"]}
        wrong = [
            httpx.post(f"{base}/retrieve", json=body, headers=h)
            for h in ({}, {"Authorization": "Bearer no"})
        ]
        right = httpx.post(
            f"{base}/retrieve", json=body, headers={"Authorization": "Bearer secret"}
        )
        assert [a.status_code for a in [*wrong, right]] == [
            401,
            401,
            200,
        ] and "secret" not in wrong[0].text


def test_not_ready_before_the_engine_is_loaded():
    loaded = threading.Event()

    def load():
        loaded.wait()
        return Engine()

    with serving(create_app(load, ServerSettings())) as base:
        assert httpx.get(f"{base}/health").status_code == 503
        early = ask(base, "a")
        assert early.status_code == 503 and early.headers["retry-after"]
        loaded.set()
        wait_until_ready(f"{base}/health")
        assert ask(base, "a").status_code == 200


def test_requests_share_engine_calls_from_one_thread():
    engine = Gate()
    with serving(app(engine, max_batch_size=50)) as base, ThreadPoolExecutor(40) as pool:
        wait_until_ready(f"{base}/health")
        coming = pool.map(lambda i: ask(base, f"q{i % 20}", topk=1 + i % 2), range(40))
        wait_for(lambda: figure(base, "queries_total") == 40)
        engine.opened.set()
        answers = list(coming)
        assert [a.json()["result"][0][0]["contents"] for a in answers] == [
            f'"T"\nq{i % 20}' for i in range(40)
        ]
        assert [len(a.json()["result"][0]) for a in answers] == [1 + i % 2 for i in range(40)]
    assert len(engine.calls) < 20 and len(engine.threads) == 1
    assert all(len(set(queries)) == len(queries) for queries, _ in engine.calls)


def test_a_full_queue_answers_429_and_loses_nothing():
    engine = Gate()
    with (
        serving(app(engine, max_batch_size=3, max_queue=3)) as base,
        ThreadPoolExecutor(16) as pool,
    ):
        wait_until_ready(f"{base}/health")
        coming = pool.map(lambda i: ask(base, f"q{i}"), range(12))
        wait_for(lambda: figure(base, 'requests_total{status="429"}') >= 6)
        engine.opened.set()
        answers = list(coming)
        busy = [a for a in answers if a.status_code == 429]
        assert busy and all(a.headers["retry-after"].isdigit() for a in busy)
        assert {a.status_code for a in answers} == {200, 429} and len(answers) - len(busy) >= 3


async def test_a_refusal_costs_no_reading():
    """A body that cannot be decoded is refused like any other, and after the rush it is an error
    again."""
    engine = Gate()
    broken = b'{"queries": ["'
    with serving(app(engine, max_batch_size=2, max_queue=2)) as base:
        wait_until_ready(f"{base}/health")
        async with httpx.AsyncClient(timeout=60) as http:
            let_in = [asyncio.create_task(http.post(f"{base}/retrieve", json={"queries": ["a"]}))]
            while not engine.calls:
                await asyncio.sleep(0.01)
            let_in += [
                asyncio.create_task(http.post(f"{base}/retrieve", json={"queries": [q]}))
                for q in "bc"
            ]
            while (await queue_depth(http, base)) < 2:
                await asyncio.sleep(0.01)
            refused = await asyncio.gather(
                *(http.post(f"{base}/retrieve", content=broken) for _ in range(50))
            )
            assert {answer.status_code for answer in refused} == {429}
            assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)
            engine.opened.set()
            assert [answer.status_code for answer in await asyncio.gather(*let_in)] == [200] * 3
            assert (await http.post(f"{base}/retrieve", content=broken)).status_code == 422
            text = (await http.get(f"{base}/metrics")).text
            assert 'retrieval_requests_total{status="429"} 50.0' in text


async def queue_depth(http, base):
    """Queries that wait, by the server's own count."""
    return value_of((await http.get(f"{base}/metrics")).text, "queue_depth")


def figure(base, name):
    """A figure of the server's metrics; 0 where it has not been counted yet."""
    return value_of(HTTP.get(f"{base}/metrics").text, name)


def value_of(text, name):
    _, _, following = text.partition(f"\nretrieval_{name} ")
    return float(following.split("\n")[0] or 0)


async def test_the_queue_is_full_when_it_would_take_too_long_and_callers_return_one_by_one():
    engine = BatchingEngine(Engine(), ServerMetrics(), max_wait_s=20.0, cache_size=0)
    under_way = [asyncio.create_task(engine.search([f"q{i}" for i in range(30)], 3))]
    await asyncio.sleep(0)
    assert not engine.is_full(), "nothing is known about its pace, and a batch may wait"
    engine.num_waiting += engine.max_batch_size
    assert engine.is_full(), "so many may be more than it can serve in time"
    engine.num_waiting -= engine.max_batch_size
    engine.pace.add(queries=10, seconds=10.0)
    assert engine.wait_s == 30.0 and engine.is_full()
    times = set()
    for _ in range(200):
        with pytest.raises(Overloaded) as refused:
            await engine.search(["more"], 3)
        times.add(round(refused.value.retry_after_s))
    assert times <= set(range(1, 31)) and len(times) > 20
    engine.pace.add(queries=256, seconds=1.0)
    under_way.append(asyncio.create_task(engine.search(["more"], 3)))
    await asyncio.sleep(0)
    assert engine.num_waiting == 31, "a faster engine lets in more"
    for task in under_way:
        task.cancel()
    await asyncio.wait(under_way)
    assert engine.num_waiting == 0 and engine.waiting == {} and engine.wait_s == 0.0


async def test_a_full_batch_tells_the_pace_also_when_nobody_else_waits():
    """Else a fast engine, whose queue is empty after every batch, would refuse as if nothing were
    known of it."""
    engine = BatchingEngine(
        Engine(), ServerMetrics(), max_batch_size=4, max_wait_s=20.0, cache_size=0
    )
    serving_task = asyncio.create_task(engine.run())
    await engine.search(["a", "b"], 3)
    assert not engine.pace.is_known
    await engine.search(["a", "b", "c", "d"], 3)
    await asyncio.sleep(0)
    assert engine.pace.is_known
    serving_task.cancel()


async def test_who_finds_room_when_it_is_his_turn_is_let_in(monkeypatch):
    monkeypatch.setattr(limits, "MAX_TURN_S", 0.0)
    reasons = [Overloaded(3.0), Overloaded(2.0), Overloaded(3.0), None, None]
    entered = []

    async def inside(scope, receive, send):
        entered.append(scope)

    async def receive():
        raise AssertionError("a refusal reads nothing")

    sent = []

    async def send(message):
        sent.append(message)

    door = limits.Door(inside, lambda _: reasons.pop(0), lambda: sent.append("counted"))
    scope = {"type": "http", "method": "POST", "path": "/retrieve"}
    await door(scope, receive, send)
    assert entered == [] and sent[0] == "counted" and sent[1]["status"] == 429
    assert (b"retry-after", b"2") in sent[1]["headers"]
    await door(scope, receive, send)
    await door(scope, receive, send)
    await door({"type": "http", "method": "GET"}, receive, send)
    assert len(entered) == 3 and len(sent) == 3 and reasons == []


async def test_however_many_wait_to_be_refused_the_next_one_waits_no_longer_than_the_maximum():
    """The line must not run ahead of the clock: after a rush everybody would wait for minutes."""
    door = limits.Door(lambda *_: None, lambda _: None, lambda: None)
    crowd = 3 * int(limits.MAX_TURN_S * limits.REFUSALS_PER_S)
    waiting = [asyncio.create_task(door.turn("/retrieve")) for _ in range(crowd)]
    await asyncio.sleep(0)
    assert door.last_turn <= asyncio.get_running_loop().time() + limits.MAX_TURN_S
    for task in waiting:
        task.cancel()
    await asyncio.wait(waiting)


def test_a_query_that_breaks_the_engine_fails_alone():
    engine = Gate()
    with serving(app(engine)) as base, ThreadPoolExecutor(8) as pool:
        wait_until_ready(f"{base}/health")
        queries = ["warm up", "a", "poison", "b", "sour", "c"]
        first = pool.submit(ask, base, queries[0])
        wait_for(lambda: engine.calls)
        coming = pool.map(lambda q: ask(base, q), queries[1:])
        wait_for(lambda: figure(base, "queue_depth") == 5)  # they become one batch
        engine.opened.set()
        answers = dict(zip(queries, [first.result(), *coming], strict=True))
        assert {q for q, a in answers.items() if a.status_code == 500} == {"poison", "sour"}
        assert "bitter" in answers["poison"].text and "not this one" in answers["sour"].text
        whole = ask(base, "a", "poison", "b", "sour")
        assert whole.status_code == 500 and "query 1" in whole.text and "query 3" in whole.text
        part = ask(base, "a", "poison", "b", "sour", allow_partial=True).json()
        assert [len(hits) for hits in part["result"]] == [3, 0, 3, 0] and part["errors"].keys() == {
            "1",
            "3",
        }
        text = httpx.get(f"{base}/metrics").text
        assert (
            'retrieval_errors_total{kind="crash"}' in text
            and 'retrieval_errors_total{kind="engine"}' in text
        )


def test_a_slow_engine_meets_the_deadline_and_lives_on():
    engine = Gate()
    with serving(app(engine, request_timeout_s=0.3)) as base:
        wait_until_ready(f"{base}/health")
        late = ask(base, "a")
        assert late.status_code == 504 and "0.3 s" in late.text
        engine.opened.set()
        wait_for(lambda: figure(base, "engine_seconds_count") == 1)
        wait_for(lambda: ask(base, "b").status_code == 200)


def test_a_client_that_goes_away_costs_no_search():
    engine = Gate()
    with serving(app(engine, max_batch_size=1)) as base:
        wait_until_ready(f"{base}/health")
        with ThreadPoolExecutor(4) as pool:
            pool.submit(ask, base, "long")
            wait_for(lambda: engine.calls)
            with pytest.raises(httpx.ReadTimeout):
                HTTP.post(f"{base}/retrieve", json={"queries": ["gone"]}, timeout=IMPATIENT)
            wait_for(lambda: figure(base, 'requests_total{status="499"}') == 1)
            following = pool.submit(ask, base, "next")
            engine.opened.set()
            assert following.result().status_code == 200
    assert [queries for queries, _ in engine.calls] == [["long"], ["next"]]


@pytest.mark.parametrize("latency", [None, Latency(300, 400)], ids=["queued", "delayed on purpose"])
async def test_hundreds_of_clients_that_give_up_cost_no_search(latency):
    engine = Gate()
    with serving(app(engine, max_batch_size=800, latency=latency)) as base:
        wait_until_ready(f"{base}/health")
        async with httpx.AsyncClient(timeout=60, limits=httpx.Limits()) as http:
            long = asyncio.create_task(http.post(f"{base}/retrieve", json={"queries": ["long"]}))
            while not engine.calls:
                await asyncio.sleep(0.01)

            async def give_up(i):
                queries = [f"{i} {j}" for j in range(5)]
                with pytest.raises(httpx.ReadTimeout):
                    await http.post(
                        f"{base}/retrieve", json={"queries": queries}, timeout=IMPATIENT
                    )

            await asyncio.gather(*(give_up(i) for i in range(150)))
            while (
                'retrieval_requests_total{status="499"} 150.0'
                not in (await http.get(f"{base}/metrics")).text
            ):
                await asyncio.sleep(0.01)
            assert await queue_depth(http, base) == 0
            following = asyncio.create_task(
                http.post(f"{base}/retrieve", json={"queries": ["next"]})
            )
            engine.opened.set()
            assert [answer.status_code for answer in await asyncio.gather(long, following)] == [
                200,
                200,
            ]
    assert [queries for queries, _ in engine.calls] == [["long"], ["next"]]


async def test_clients_that_give_up_are_noticed_by_every_worker(folder):
    delayed = ["--inject_latency_ms", "60000", "--inject_latency_p99_ms", "60001", "--workers", "2"]
    with retrieval_server(folder, *delayed) as (address, _):
        base = address.removesuffix("/retrieve")

        async def give_up(i):
            with suppress(httpx.ReadTimeout):  # the other worker may still be loading, and says so
                await http.post(address, json={"queries": [f"harbour {i}"]}, timeout=IMPATIENT)

        async with httpx.AsyncClient(timeout=60, limits=httpx.Limits()) as http:
            await asyncio.gather(*(give_up(i) for i in range(40)))
            while True:
                text = (await http.get(f"{base}/metrics")).text
                ended = re.findall(r'retrieval_requests_total{status="(?:499|503)"} (\S+)', text)
                if sum(map(float, ended)) == 40:
                    break
                await asyncio.sleep(0.01)
        assert "retrieval_batch_size_count 0.0" in text and 'status="499"' in text


def test_shutdown_drains(folder):
    flags = ["--inject_latency_ms", "3000", "--inject_latency_p99_ms", "3001"]
    with retrieval_server(folder, *flags) as (address, process), ThreadPoolExecutor(1) as pool:
        pending = pool.submit(httpx.post, address, json={"queries": ["harbour"]}, timeout=30)
        base = address.removesuffix("/retrieve")
        wait_for(lambda: figure(base, "queries_total") == 1)
        process.send_signal(signal.SIGTERM)
        assert pending.result().json()["result"][0][0] == ROWS[0]
        assert process.wait(10) == -signal.SIGTERM  # uvicorn ends by the signal once it has drained


def test_workers_share_the_index_and_sum_their_metrics(folder):
    with retrieval_server(folder, "--workers", "2", "--cache_size", "0") as (address, _):
        base = address.removesuffix("/retrieve")

        def patient(i):
            while (
                answer := ask(base, f"harbour {i}")
            ).status_code == 503:  # the other worker is still loading
                time.sleep(0.05)
            return answer

        with ThreadPoolExecutor(16) as pool:
            answers = list(pool.map(patient, range(60)))
        assert all(a.json()["result"][0][0] == ROWS[0] for a in answers)
        text = httpx.get(f"{base}/metrics").text
        assert "retrieval_queries_total 60.0" in text


@pytest.mark.parametrize("workers", ["1", "2"])
def test_what_cannot_be_loaded_ends_the_server_with_its_cause(tmp_path, workers):
    command = [
        sys.executable,
        str(SERVER),
        "--index_path",
        str(tmp_path / "none"),
        "--corpus_path",
        "c.jsonl",
    ]
    done = subprocess.run(
        [*command, "--port", str(free_port()), "--workers", workers],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (
        done.returncode == 1 and "no index here" in done.stderr and "index_builder" in done.stderr
    )
    assert "Traceback" not in done.stderr


def test_an_unexpected_failure_to_load_ends_the_server_with_its_traceback(tmp_path):
    """A server of a module of its own, whose engine breaks; it must not say "loading" for ever."""
    engine = (
        "from search_r1.search.retrieval_server import parse_arguments\ndef load(args): raise "
        "RuntimeError('bitter')\n"
    )
    (tmp_path / "broken_engine.py").write_text(engine)
    start = (
        f"import sys; sys.path.append({str(tmp_path)!r})\nfrom search_r1.search.serve import "
        "serve\n"
    )
    start += f"sys.exit(serve('broken_engine', ['--port', '{free_port()}']))"
    done = subprocess.run(
        [sys.executable, "-c", start], capture_output=True, text=True, timeout=PATIENCE_S
    )
    line = json.loads(done.stderr.splitlines()[0])
    assert done.returncode == 1 and line["event"] == (
        "not started: unexpected RuntimeError while loading the engine: bitter"
    )
    assert "in load" in line["traceback"]


async def test_an_unexpected_failure_of_the_queue_ends_the_server(monkeypatch, caplog):
    async def broken(engine):
        raise RuntimeError("bitter")

    monkeypatch.setattr(BatchingEngine, "run", broken)
    service = Service(Engine, ServerSettings())
    stops = []
    service.stop = lambda: stops.append("stopped")
    await asyncio.wait_for(service.run(), 60)
    assert service.failed and stops == ["stopped"] and "bitter" in caplog.text


def test_logs_are_json_lines_without_queries(folder):
    port = free_port()
    command = [
        sys.executable,
        str(SERVER),
        "--index_path",
        str(folder / "bm25"),
        "--port",
        str(port),
    ]
    server = subprocess.Popen(
        [*command, "--corpus_path", str(folder / "corpus.jsonl")], stderr=subprocess.PIPE, text=True
    )
    wait_until_ready(f"http://127.0.0.1:{port}/health", server)
    ask(f"http://127.0.0.1:{port}", "my private question")
    server.terminate()
    _, output = server.communicate(timeout=PATIENCE_S)
    ready = json.loads(output.splitlines()[0])
    assert ready["event"] == "ready" and ready["engine"] == "bm25" and ready["documents"] == 4
    assert "private" not in output


def test_malformed_http_is_refused_and_the_server_lives_on(url):
    host, port = url.removeprefix("http://").removesuffix("/retrieve").split(":")
    for garbage in (
        b"\x00\xff garbage\r\n\r\n",
        b"POST /retrieve HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
    ):
        with socket.create_connection((host, int(port)), timeout=5) as s:
            s.sendall(garbage)
            assert b"400" in s.recv(4096).split(b"\r\n")[0]
    assert httpx.post(url, json={"queries": ["harbour"]}).status_code == 200


async def test_hundreds_of_clients_lose_nothing(url):
    """Each its own connection; every answer is the right one."""
    queries = ["harbour", "hills", "sails", "Ada"]
    wanted = {"harbour": "0", "hills": "3", "sails": "2", "Ada": "1"}

    async def one(i):
        async with httpx.AsyncClient(timeout=60) as http:
            answer = await http.post(url, json={"queries": [queries[i % 4]]})
            return answer.json()["result"][0][0]["id"] == wanted[queries[i % 4]]

    assert all(await asyncio.gather(*(one(i) for i in range(300))))
