"""The server of the page of runs: who sees it, when it looks at the runs, how it ends."""

import asyncio
import re
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest

from search_r1.pages.access import Access
from search_r1.pages.cost import Prices
from search_r1.pages.watch import Feed, Watch, main, make_app
from search_r1.pages.watched_run import Message
from tests.processes import PATIENCE_S, wait_for
from tests.retrieval import serving
from tests.search_r1.pages.made_runs import append, make_run, step_line

ACCESS = Access("a test", "secret")


@pytest.fixture
def runs(tmp_path):
    return [make_run(tmp_path / name, [0.1, 0.2]) for name in ("a", "b")]


def test_who_does_not_know_the_token_sees_nothing(runs):
    app = make_app(Feed(Watch(runs, Prices()), 0.05), ACCESS)
    with serving(app) as address, httpx.Client(base_url=address, trust_env=False) as client:
        assert client.get("/").status_code == client.get("/events").status_code == 401
        assert client.get("/", headers={"host": "evil.example"}).status_code == 400
        assert client.get("/?token=secret").status_code == 200
        with client.stream("GET", "/events") as answer:
            assert answer.status_code == 200
            assert next(answer.iter_lines()).startswith('data: [{"kind":"rows","run":0,"from":-1')


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="no run folder"):
        main([str(tmp_path)])


def test_looks_need_a_pause(runs, capsys):
    with pytest.raises(SystemExit):
        main([str(runs[0]), "--every", "0"])
    assert "--every 0: expected at least 0.1 seconds" in capsys.readouterr().err


@asynccontextmanager
async def following(watch: Watch) -> AsyncIterator[Feed]:
    """A feed that looks at the runs when a page is opened, and not again by itself."""
    feed = Feed(watch, 3600)
    task = asyncio.create_task(feed.follow())
    try:
        yield feed
    finally:
        task.cancel()


async def test_nobody_looks_at_the_runs_without_an_open_page(runs, monkeypatch):
    watch = Watch(runs, Prices())
    looks: list[int] = []
    poll = watch.poll
    monkeypatch.setattr(watch, "poll", lambda: (looks.append(1), poll())[1])
    async with following(watch) as feed:
        assert not feed.pages and not looks
        events = feed.events()
        assert "rows" in await anext(events)
        assert len(looks) == 1 and len(feed.pages) == 1
        await events.aclose()
        assert not feed.pages


async def test_a_page_that_is_closed_during_a_look_takes_nothing_from_others(runs, monkeypatch):
    watch = Watch(runs, Prices())
    poll = watch.poll
    began, goes_on = threading.Event(), threading.Event()

    def slow() -> list[Message]:
        began.set()
        assert goes_on.wait(60)
        return poll()

    monkeypatch.setattr(watch, "poll", slow)
    goes_on.set()
    async with following(watch) as feed:
        first = feed.events()
        await anext(first)
        began.clear()
        goes_on.clear()
        append(runs[0], step_line(3, 0.5))
        second = asyncio.create_task(anext(feed.events()))
        assert await asyncio.to_thread(began.wait, 60)
        second.cancel()
        goes_on.set()
        assert '"step":3' in await anext(first)
        assert not feed.newcomers


async def test_a_page_that_does_not_read_is_let_go(runs, monkeypatch):
    monkeypatch.setattr("search_r1.pages.watch.MOST_WAITING", 2)
    async with following(Watch(runs, Prices())) as feed:
        events = feed.events()
        await anext(events)
        for step in (3, 4, 5):
            append(runs[0], step_line(step, 0.5))
            feed._tell(feed.watch.poll())
        assert not feed.pages
        assert len([event async for event in events]) == 2


def test_a_folder_that_cannot_be_read_is_told_and_hides_no_other(runs):
    watch = Watch(runs, Prices())
    watch.poll()
    metrics = runs[0] / "metrics.jsonl"
    kept = metrics.read_text()
    metrics.unlink()
    metrics.mkdir()
    append(runs[1], step_line(3, 0.5))
    told = watch.poll()
    (status,) = [m for m in told if m["run"] == 0 and m["kind"] == "status"]
    assert "the folder cannot be read: IsADirectoryError" in status["problems"][0]
    assert [m["run"] for m in told if m["kind"] == "rows"] == [1]
    assert not [m for m in watch.poll() if m["run"] == 0], "told once"
    metrics.rmdir()
    metrics.write_text(kept)
    assert [m["problems"] for m in watch.poll() if m["kind"] == "status"] == [[]]


def test_the_command_serves_until_it_is_interrupted_and_ends_without_a_word(runs):
    command = [sys.executable, "-m", "search_r1.cli", "watch", *map(str, runs)]
    server = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert server.stdout is not None
    found = re.fullmatch(
        r"Runs: (http://127\.0\.0\.1:\d+/)(\?token=\S+)\n", server.stdout.readline()
    )
    assert found
    with httpx.Client(base_url=found[1], trust_env=False, timeout=60) as client:

        def page() -> int:
            try:
                return client.get(found[2]).status_code
            except httpx.TransportError:
                return 0

        wait_for(lambda: page() == 200)
        with client.stream("GET", "/events") as answer:
            assert next(answer.iter_lines()).startswith("data: ")
            server.send_signal(signal.SIGINT)
            output, errors = server.communicate(timeout=PATIENCE_S)
    assert (server.returncode, output, errors) == (0, "", "")
