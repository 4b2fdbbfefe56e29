"""Pages of the web, from a local provider and a local site, through the server and the tools."""

import asyncio
import json
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, PlainTextResponse

from search_r1.rewards.compose import SearchReward
from search_r1.search.engines.web_pages import WebPages
from search_r1.search.serp_search_server import load, load_documents, parse_arguments
from search_r1.search.serve import settings_of
from search_r1.search.server.app import create_app
from search_r1.search.store import StoreLimits, Unreadable
from tests.configs import composed
from tests.retrieval import serving, wait_until_ready
from tests.search_r1.agent.scripted import Engine, check_growing
from tests.templates import make_family_tokenizer
from verl.agent import Source
from verl.trainer.config import build_agent, build_reward, validate
from verl.utils.reward import score

STORY = "Ada Marin was born in Torvel. " + "She sailed for years. " * 120 + "She died in Ostrel."
ROW = {
    "data_source": "web",
    "reward_model": {"ground_truth": {"target": ["Torvel town"]}},
    "extra_info": {"question": "Where was Ada Marin born?"},
}


@dataclass
class Web:
    """A provider in Brave's form, and the site that its results lead to."""

    app: FastAPI = field(default_factory=FastAPI)
    read: list[str] = field(default_factory=list)
    """Paths of the pages that were fetched."""
    is_down: bool = False

    def __post_init__(self):
        self.app.add_api_route("/search", self.search)
        self.app.add_api_route("/ada", self.story)
        self.app.add_api_route("/scan", self.scan)
        self.app.add_api_route("/secret", self.secret)

    def search(self, request: Request):
        results = [
            {"title": "Ada", "url": f"{request.base_url}ada", "description": "About Ada Marin."},
            {"title": "Scan", "url": f"{request.base_url}scan", "description": "A scan."},
        ]
        return {"web": {"results": results}}

    def story(self):
        self.read.append("/ada")
        if self.is_down:
            return PlainTextResponse("later", 503)
        return HTMLResponse(f"<title>Ada</title><nav>Menu</nav><p>{STORY}</p>")

    def scan(self):
        self.read.append("/scan")
        return PlainTextResponse("%PDF", media_type="application/pdf")

    def secret(self):
        self.read.append("/secret")
        return HTMLResponse("<p>nobody found me</p>")


@pytest.fixture
def web():
    made = Web()
    with serving(made.app) as base:
        made.base = base
        yield made


def arguments(web, cache, *more):
    command = ["--provider", "brave", "--brave_api_key", "k", "--search_url", f"{web.base}/search"]
    return parse_arguments([*command, "--cache", str(cache), "--documents", "id", *more])


@contextmanager
def retriever(web, cache, *more):
    """The address of a server as its command line makes it."""
    args = arguments(web, cache, *more)
    app = create_app(lambda: load(args), settings_of(args), lambda: load_documents(args))
    with serving(app) as base:
        wait_until_ready(f"{base}/health")
        yield f"{base}/retrieve"


def test_pages_that_a_search_has_found_are_opened_and_no_other(web, tmp_path):
    args = arguments(web, tmp_path / "web.sqlite", "--page_chars", "100")
    engine, pages = load(args), load_documents(args)
    address = f"{web.base}/ada"
    assert pages.open(address, 1).error == "unknown_document", "nothing has been found yet"
    (hits,) = engine.search(["Ada"], 3)
    assert [pages.name_of(document) for document, _ in hits] == [address, f"{web.base}/scan"]
    opened = pages.open(address, 1)
    assert opened.error is None and opened.title == '"Ada"' and opened.pages > 20
    assert opened.text.startswith("Ada Marin was born in Torvel.") and "Menu" not in opened.text
    assert [passage.id for passage in opened.passages] == [address]
    (match,) = pages.find(address, "DIED IN").matches
    assert match.text == "She died in Ostrel." and match.page == opened.pages
    assert web.read == ["/ada"], "it is fetched once"
    assert pages.open(f"{web.base}/secret", 1).error == "unknown_document"
    assert pages.find("file:///etc/hostname", "a").error == "unknown_document"
    assert web.read == ["/ada"], "what no search has found is not asked for"


def test_what_was_found_and_read_outlives_the_process_and_other_processes_see_it(web, tmp_path):
    args = arguments(web, tmp_path / "web.sqlite")
    load(args).search(["Ada"], 3)
    assert load_documents(args).open(f"{web.base}/ada", 1).error is None
    again = load_documents(args)
    assert again.open(f"{web.base}/ada", 1).error is None and web.read == ["/ada"]
    kept = load(args)
    (hits,) = kept.search(["Ada"], 3)
    assert hits, "a result that is kept can be opened too"


def test_a_cache_from_before_pages_could_be_opened_serves_them_too(web, tmp_path):
    command = ["--provider", "brave", "--brave_api_key", "k", "--search_url", f"{web.base}/search"]
    before = parse_arguments([*command, "--cache", str(tmp_path / "web.sqlite")])
    load(before).search(["Ada"], 3)
    args = arguments(web, tmp_path / "web.sqlite")
    pages = load_documents(args)
    assert pages.open(f"{web.base}/ada", 1).error == "unknown_document"
    load(args).search(["Ada"], 3)
    assert pages.open(f"{web.base}/ada", 1).error is None


def test_a_page_that_cannot_be_read_is_an_answer_and_is_asked_for_again(web, tmp_path):
    args = arguments(web, tmp_path / "web.sqlite")
    load(args).search(["Ada"], 3)
    pages = load_documents(args)
    assert pages.open(f"{web.base}/scan", 1).error == "unreadable"
    assert pages.find(f"{web.base}/scan", "x").error == "unreadable"
    web.is_down = True
    assert pages.open(f"{web.base}/ada", 1).error == "unreadable"
    web.is_down = False
    assert pages.open(f"{web.base}/ada", 1).error is None
    broken = WebPages(tmp_path / "broken.sqlite")
    broken.add([{"id": "http://[broken", "contents": '"B"\nb'}, {"id": "ab12", "contents": "b"}])
    with pytest.raises(Unreadable):
        broken.read("http://[broken")
    assert broken.read("ab12") is None, "a result without an address is no page"


def test_a_long_page_is_cut_and_says_so(web, tmp_path):
    args = arguments(web, tmp_path / "web.sqlite")
    load(args).search(["Ada"], 3)
    pages = WebPages(args.cache, StoreLimits(max_document_chars=50))
    opened = pages.open(f"{web.base}/ada", 1)
    assert opened.cut and opened.text == f"{STORY[:50]}\n"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--documents", "title", "--cache", "c"], "a page is named by its address: id"),
        (["--documents", "id"], "--documents needs --cache FILE"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(capsys, flags, said):
    with pytest.raises(SystemExit):
        parse_arguments(["--provider", "brave", *flags])
    assert said in capsys.readouterr().err


def call(tool, **given):
    return f"<tool_call>\n{json.dumps({'name': tool, 'arguments': given})}\n</tool_call><|im_end|>"


def test_the_recipe_searches_opens_and_finds_on_the_web_and_is_paid_f1(web, tmp_path):
    """The shipped experiment with a tokenizer of Qwen2.5's form and played turns."""
    tokenizer = make_family_tokenizer(tmp_path, "qwen2.5-tools")
    address = f"{web.base}/ada"
    with retriever(web, tmp_path / "web.sqlite") as url:
        raw = composed(
            "grpo",
            "experiment=deepresearcher/qwen2.5-7b-instruct-grpo",
            f"retriever.url={url}",
        )
        config = validate(raw)
        agent = build_agent(config, tokenizer)
        reward = build_reward(config, tokenizer)
        assert isinstance(reward, SearchReward) and reward.preflight(agent) == []
        assert agent.preflight() == []
        turns = [
            call("search", query="Ada Marin"),
            call("open", document=address),
            call("find", document=address, text="died"),
            call("open", document=f"{web.base}/scan"),
            "<answer> Torvel </answer>",
        ]

        async def rolled():
            engine = Engine(tokenizer, turns)
            trajectory = await agent.run([], ROW, engine)
            await agent.close()
            check_growing(trajectory, engine)
            return trajectory

        trajectory = asyncio.run(rolled())
    asyncio.run(score(reward, trajectory, ROW))
    assert trajectory.reward["score"] == pytest.approx(2 / 3)
    shown = [
        tokenizer.decode(s.token_ids) for s in trajectory.segments if s.source is Source.OBSERVATION
    ]
    assert f"Document: {address}" in shown[0] and "About Ada Marin." in shown[0]
    assert "page 1 of 2\nAda Marin was born in Torvel." in shown[1]
    assert "She died in Ostrel." in shown[2]
    assert f"{web.base}/scan' cannot be read." in shown[3]
    assert trajectory.info["tools"]["open"]["errors"] == {"unreadable": 1}

    silent = asyncio.run(agent.run([], ROW, Engine(tokenizer, ["I do not know"] * 11)))
    asyncio.run(score(reward, silent, ROW))
    assert silent.reward["score"] == -1.0
