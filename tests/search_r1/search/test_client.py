"""The client over real HTTP: sharing, replicas, retries, deadlines, and what it calls a failure."""

import asyncio
from contextlib import ExitStack

import httpx
import pytest
from fastapi import FastAPI, Response

from search_r1.launch import free_port
from search_r1.search.client import RetrievalClient, SearchError, check_server
from search_r1.search.client.client import MAX_CONNECTIONS, encodable
from search_r1.search.client.config import RetrieverConfig
from search_r1.search.client.errors import ServerBusy
from tests.retrieval import retrieval_server, serving, write_corpus
from tests.search_r1.search.echo import ROWS, Engine, Gate, app


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("index")
    write_corpus(path, ROWS)
    return path


@pytest.fixture(scope="module")
def url(folder):
    with retrieval_server(folder) as (address, _):
        yield address


async def until(condition):
    """Returns when the condition holds; fails after a time that nothing here takes."""
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)


def client(url, **kwargs):
    return RetrievalClient(RetrieverConfig(url=url, **kwargs))


def scripted(*answers):
    """A server that gives these answers in turn, the last one for ever; and the list of what it was
    asked."""
    asked = []
    scripted_app = FastAPI()

    @scripted_app.post("/retrieve")
    async def retrieve(body: dict) -> Response:
        asked.append(body["queries"])
        status, text, headers = answers[min(len(asked), len(answers)) - 1]
        return Response(text, status_code=status, headers=headers, media_type="application/json")

    return scripted_app, asked


GOOD = (200, '{"result": [[{"document": {"id": "7", "contents": "T\\nx"}, "score": 1.5}]]}', {})


async def test_concurrent_searches_share_requests(url):
    c = client(url, batch_wait_s=0.05)
    sent = []
    post = c.http.post

    async def counting(address, **kwargs):
        sent.append(kwargs["json"]["queries"])
        return await post(address, **kwargs)

    c.http.post = counting
    results = await asyncio.gather(*(c.search(q) for q in ["Torvel", "hills", "Torvel", "sails"]))
    assert sent == [["Torvel", "hills", "sails"]]
    assert results[0] == results[2] and results[1][0].title == '"Marna"' and results[1][0].id == "3"
    await c.close()


async def test_a_query_in_flight_is_not_sent_again():
    engine = Gate()
    with serving(app(engine)) as base:
        c = client(f"{base}/retrieve", batch_wait_s=0.0)
        first = asyncio.create_task(c.search("a"))
        await until(lambda: engine.calls)
        second = asyncio.create_task(c.search("a"))
        await asyncio.sleep(0)  # the second search has begun
        first.cancel()  # who asked first may leave, the others still get their passages
        engine.opened.set()
        assert (await second)[0].text == "a"
        await c.close()
    assert [queries for queries, _ in engine.calls] == [["a"]]


async def test_a_long_query_is_cut(url):
    c = client(url, max_query_chars=6)
    assert (await c.search("Torvel and much more"))[0].id == (await c.search("Torvel"))[0].id
    await c.close()


async def test_a_dead_server_is_an_error_with_its_cause():
    c = client("http://127.0.0.1:9/retrieve", max_retries=2, backoff_s=0.01)
    with pytest.raises(SearchError, match=r"3 times.*127.0.0.1:9.*ConnectError") as caught:
        await c.search("x")
    assert caught.value.kind == "connection" and c.errors == {"connection": 3}
    await c.close()


async def test_the_deadline_ends_a_slow_search(folder):
    with retrieval_server(
        folder, "--inject_latency_ms", "5000", "--inject_latency_p99_ms", "6000"
    ) as (slow, _):
        c = client(slow, timeout_s=0.5)
        with pytest.raises(SearchError, match=r"0\.5 s") as caught:
            await c.search("x")
        assert caught.value.kind == "timeout"
        await c.close()


@pytest.mark.parametrize(
    ("answer", "kind", "attempts"),
    [
        ((500, '{"detail": "broken"}', {}), "server", 3),
        ((422, '{"detail": "no"}', {}), "rejected", 1),
        ((401, '{"detail": "token"}', {}), "rejected", 1),
        ((200, '{"result": "x"}', {}), "contract", 1),
        ((200, '{"result": []}', {}), "contract", 1),
        ((200, "not json", {}), "contract", 1),
        ((200, '{"result": [[]], "errors": {"0": "quota: all used"}}', {}), "engine", 1),
    ],
)
async def test_failures_are_typed_and_counted_and_retried_where_that_may_help(
    answer, kind, attempts
):
    scripted_app, asked = scripted(answer)
    with serving(scripted_app) as base:
        c = client(f"{base}/retrieve", max_retries=2, backoff_s=0.01)
        with pytest.raises(SearchError) as caught:
            await c.search("x")
        assert caught.value.kind == kind and len(asked) == attempts and c.errors == {kind: attempts}
        await c.close()


async def test_a_retry_makes_good_and_is_counted():
    scripted_app, asked = scripted((503, "{}", {}), (429, "{}", {"Retry-After": "0"}), GOOD)
    with serving(scripted_app) as base:
        c = client(f"{base}/retrieve", backoff_s=0.01)
        assert (await c.search("x"))[0].id == "7" and len(asked) == 3
        assert c.errors == {"server": 1, "overloaded": 1, "engine": 0}
        await c.close()


async def test_a_busy_server_is_asked_again_when_it_says():
    c = client("http://a/retrieve")
    two = client(["http://a/retrieve", "http://b/retrieve"])
    pauses = [c._busy_pause(ServerBusy("full", 10.0)) for _ in range(20)]
    assert all(10 <= pause <= 11 for pause in pauses) and len(set(pauses)) == 20
    assert two._busy_pause(ServerBusy("full", 10.0)) == 0, "another replica is awake"
    await c.close()
    await two.close()


async def test_waiting_for_a_busy_server_is_neither_an_attempt_nor_time_of_the_search():
    refusals = [(429, "{}", {"Retry-After": "1"})] * 3
    scripted_app, asked = scripted(*refusals, GOOD)
    with serving(scripted_app) as base:
        c = client(f"{base}/retrieve", timeout_s=2.0, max_retries=0)
        assert (await c.search("x"))[0].id == "7" and len(asked) == 4
        assert c.errors["overloaded"] == 3
        await c.close()


@pytest.mark.parametrize("headers", [{"Retry-After": "1"}, {"Retry-After": "0"}, {}])
async def test_a_server_that_stays_busy_is_given_up_after_few_requests(headers):
    scripted_app, asked = scripted((429, "{}", headers))
    with serving(scripted_app) as base:
        c = client([f"{base}/retrieve"], busy_timeout_s=2.5, backoff_s=0.0)
        with pytest.raises(SearchError, match=r"2\.5 s.*429") as caught:
            await c.search("x")
        assert caught.value.kind == "overloaded" and 2 <= len(asked) <= 7
        await c.close()


async def test_a_dead_replica_beside_a_busy_one_fails_nothing():
    refusals = [(429, "{}", {"Retry-After": "1"})] * 3
    scripted_app, asked = scripted(*refusals, GOOD)
    with serving(scripted_app) as base:
        dead = f"http://127.0.0.1:{free_port()}/retrieve"
        c = client([dead, f"{base}/retrieve"], max_retries=1, backoff_s=0.01)
        assert (await c.search("x"))[0].id == "7" and len(asked) == 4
        await c.close()


async def test_no_more_requests_are_sent_than_there_are_connections():
    """Else they would wait for a connection within HTTP, where waiting is time of the search."""
    engine = Gate()
    with serving(app(engine, max_batch_size=1)) as base:
        c = client(f"{base}/retrieve", max_batch_size=1, timeout_s=60.0)
        (server,) = c.balancer.servers
        running = [asyncio.create_task(c.search(f"q{i}")) for i in range(200)]
        await until(lambda: engine.calls and server.in_flight == MAX_CONNECTIONS)
        assert len(c.tasks) == 200
        engine.opened.set()
        found = await asyncio.gather(*running)
        assert [hits[0].text for hits in found] == [f"q{i}" for i in range(200)]
        await c.close()


async def test_the_wait_for_a_connection_is_not_time_of_the_search(monkeypatch):
    loop = asyncio.get_running_loop()
    clock = loop.time
    scripted_app, asked = scripted((500, "{}", {}), GOOD)
    with serving(scripted_app) as base:
        c = client(f"{base}/retrieve", timeout_s=60.0, backoff_s=0.0)
        c.connections = asyncio.Semaphore(1)
        async with c.connections:
            search = asyncio.create_task(c.search("x"))
            await until(lambda: c.connections._waiters)
            monkeypatch.setattr(loop, "time", lambda: clock() + 1000.0)
        assert (await search)[0].id == "7" and len(asked) == 2
        await c.close()


async def test_only_the_failed_query_of_a_shared_request_fails():
    with serving(app(Engine())) as base:
        c = client(f"{base}/retrieve", batch_wait_s=0.05)
        found = await asyncio.gather(
            *(c.search(q) for q in ["a", "poison", "b"]), return_exceptions=True
        )
        assert isinstance(found[1], SearchError) and "bitter" in str(found[1])
        assert [found[0][0].text, found[2][0].text] == ["a", "b"]
        await c.close()


async def test_half_a_surrogate_pair_is_searched_as_a_replacement_character():
    """Models write broken text; JSON cannot carry it, and one such query must not cost its
    neighbours theirs."""
    with serving(app(Engine())) as base:
        c = client(f"{base}/retrieve", batch_wait_s=0.05)
        async with asyncio.timeout(60):
            found = await asyncio.gather(*(c.search(q) for q in ["a", "x\ud83d", "b"]))
        assert [hits[0].text for hits in found] == ["a", "x\ufffd", "b"]
        await c.close()
    assert (
        encodable("\ud83d\ude00") == "\U0001f600"
        and encodable("\udc00a\ud800b\ufeff") == "\ufffda\ufffdb\ufeff"
    )


async def test_an_unexpected_error_fails_every_query_of_the_request_and_is_not_kept(caplog):
    with serving(app(Engine())) as base:
        c = client(f"{base}/retrieve", batch_wait_s=0.05)
        post = c.http.post

        async def broken(*args, **kwargs):
            raise ZeroDivisionError("not foreseen")

        c.http.post = broken
        async with asyncio.timeout(60):
            found = await asyncio.gather(*(c.search(q) for q in ["a", "b"]), return_exceptions=True)
            assert all(
                isinstance(error, SearchError) and "not foreseen" in str(error) for error in found
            )
            c.http.post = post
            assert (await c.search("a"))[0].text == "a"
        await c.close()
    assert "ZeroDivisionError" in caplog.text and "in broken" in caplog.text


async def test_closing_fails_what_waits_and_what_runs():
    engine = Gate()
    with serving(app(engine)) as base:
        c = client(f"{base}/retrieve", batch_wait_s=60, max_batch_size=2)
        running = [asyncio.create_task(c.search(q)) for q in "ab"]
        await until(lambda: engine.calls)
        # c and d are sent together and not searched yet, e waits for another query
        running += [asyncio.create_task(c.search(q)) for q in "cde"]
        await until(lambda: len(c.running) == 5)
        await c.close()
        async with asyncio.timeout(60):
            found = await asyncio.gather(*running, return_exceptions=True)
        engine.opened.set()
    assert [type(error).__name__ for error in found] == ["Closed"] * 5
    assert not c.running and not c.tasks and c.flush is None


async def test_an_answer_that_cannot_be_decoded_and_an_address_that_cannot_be_asked_are_typed():
    scripted_app, asked = scripted((200, "no gzip", {"Content-Encoding": "gzip"}))
    with serving(scripted_app) as base:
        for url, kind in [(f"{base}/retrieve", "contract"), ("http://[::1/retrieve", "rejected")]:
            c = client(url, backoff_s=0.01)
            async with asyncio.timeout(60):
                with pytest.raises(SearchError) as caught:
                    await c.search("x")
            assert caught.value.kind == kind and c.errors == {kind: 1}
            await c.close()
    assert len(asked) == 1


async def test_replicas_share_the_load_and_a_dead_one_is_left_alone():
    engines = [Engine(lag=0.02), Engine(lag=0.02)]
    dead = f"http://127.0.0.1:{free_port()}/retrieve"
    with serving(app(engines[0])) as a, serving(app(engines[1])) as b:
        c = client(
            [f"{a}/retrieve", dead, f"{b}/retrieve"], max_batch_size=1, max_retries=3, backoff_s=60
        )
        async with asyncio.timeout(30):  # the others answer at once: nobody waits for the dead one
            found = await asyncio.gather(*(c.search(f"q{i}") for i in range(40)))
        assert [hits[0].text for hits in found] == [f"q{i}" for i in range(40)]
        assert c.errors["connection"] <= 14
        assert all(sum(len(q) for q, _ in e.calls) >= 10 for e in engines)
        await c.close()


async def test_a_killed_server_is_found_again_in_mid_load(folder):
    """kill -9 while hundreds of searches run; the second server takes the port of the first. No
    passage is wrong."""
    wanted = {"harbour": "0", "hills": "3", "sails": "2", "Ada": "1"}
    latency = ["--inject_latency_ms", "50", "--inject_latency_p99_ms", "100", "--cache_size", "0"]
    with retrieval_server(folder, *latency) as (address, process):
        c = client(address, max_retries=30, backoff_s=0.1, max_batch_size=4)

        async def one(i):
            await asyncio.sleep(i * 0.005)
            query = [*wanted][i % 4]
            return wanted[query] == (await c.search(f"{query} {'the ' * (i // 4)}"))[0].id

        tasks = [asyncio.create_task(one(i)) for i in range(300)]
        await until(lambda: sum(task.done() for task in tasks) >= 20)
        assert not all(task.done() for task in tasks)
        process.kill()
        process.wait()
        with ExitStack() as stack:  # searches go on while it starts, and find nobody
            await asyncio.to_thread(
                stack.enter_context, retrieval_server(folder, port=httpx.URL(address).port)
            )
            assert all(await asyncio.gather(*tasks))
        assert c.errors["connection"] > 0
        await c.close()


async def test_the_token_of_the_environment_is_sent(monkeypatch):
    monkeypatch.setenv("SEARCH_R1_RETRIEVER_TOKEN", "secret")
    with serving(app(Engine(), token="secret")) as base:
        c = client(f"{base}/retrieve")
        assert (await c.search("a"))[0].text == "a" and check_server(f"{base}/retrieve") is None
        await c.close()


def test_check_server_names_address_and_cure(url):
    assert check_server(url) is None
    problem = check_server("http://127.0.0.1:9/retrieve")
    assert problem and "127.0.0.1:9" in problem and "retrieval_server.py" in problem


@pytest.mark.parametrize("url", ["127.0.0.1:8000", [], ["http://a/retrieve", "b"]])
def test_addresses_are_checked(url):
    with pytest.raises(ValueError, match="http"):
        RetrieverConfig(url=url)
