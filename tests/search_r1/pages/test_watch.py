"""The server of the page of runs: who sees it, when it looks at the runs, how it ends."""

import re
import signal
import subprocess
import sys

import httpx
import pytest

from search_r1.pages.access import Access
from search_r1.pages.cost import Prices
from search_r1.pages.watch import Feed, Watch, main, make_app
from tests.processes import wait_for
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


async def test_nobody_looks_at_the_runs_without_an_open_page(runs, monkeypatch):
    watch = Watch(runs, Prices())
    looks: list[int] = []
    poll = watch.poll
    monkeypatch.setattr(watch, "poll", lambda: (looks.append(1), poll())[1])
    feed = Feed(watch, 0.0)
    assert not feed.pages and not looks
    events = feed.events()
    assert "rows" in await anext(events)
    assert len(looks) == 1 and len(feed.pages) == 1
    await events.aclose()
    assert not feed.pages


async def test_a_page_that_does_not_read_is_let_go(runs, monkeypatch):
    monkeypatch.setattr("search_r1.pages.watch.MOST_WAITING", 2)
    feed = Feed(Watch(runs, Prices()), 0.0)
    events = feed.events()
    await anext(events)
    for step in (3, 4, 5):
        append(runs[0], step_line(step, 0.5))
        await feed._look()
    assert not feed.pages
    assert len([event async for event in events]) == 2


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
            output, errors = server.communicate(timeout=60)
    assert (server.returncode, output, errors) == (0, "", "")
