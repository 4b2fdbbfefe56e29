"""The playground in a real browser: real processes, a real retrieval server, a scripted model."""

import json
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect

from search_r1.pages.play import Model, make_app, serving
from search_r1.pages.retriever_state import numbers_of
from tests.e2e.runs import ROOT
from tests.openai_server import Player
from tests.retrieval import serving as at_address
from tests.search_r1.pages.browser import PATIENCE_MS, needs_browser, started

SEARCH = "<think> t </think> <search> Ada Marin </search>"
ANSWER = "<think> u </think> <answer> Torvel </answer>"
OTHER = "<think> v </think> <answer> Zorbin </answer>"
BASE = "data/closed_world/base"
TOKEN = "secret"


def flags_for(endpoint: str, retriever: str) -> list[str]:
    """What the processes of the models are told."""
    return [
        "--endpoint",
        f"{endpoint}/v1",
        "experiment=nq_hotpotqa/grpo",
        f"retriever.url={retriever}",
        f"actor_rollout_ref.model.tokenizer_path={ROOT / BASE}",
        "actor_rollout_ref.rollout.endpoint.backoff_s=0.01",
        "trainer.experiment_name=play",
    ]


@pytest.fixture(scope="module")
def player():
    return Player(
        {"Ada Marin": [SEARCH, SEARCH, ANSWER, ANSWER, OTHER], "Bo Keld": [SEARCH, ANSWER]}
    )


@pytest.fixture(scope="module")
def models(player, retriever):
    """Two processes of models that a script plays."""
    with (
        at_address(player.app) as endpoint,
        serving(["scripted/one", "scripted/two"], flags_for(endpoint, retriever), ROOT) as models,
    ):
        yield models


@pytest.fixture(scope="module")
def address(models):
    """The page with both models."""
    with at_address(make_app(models, TOKEN)) as address:
        yield address


@pytest.fixture(scope="module")
def browser():
    with started() as browser:
        yield browser


@pytest.fixture
def page(browser, address):
    """The page, when its models are ready. It may ask its own server alone, and complain never."""
    page = browser.new_page()
    page.set_default_timeout(PATIENCE_MS)
    foreign: list[str] = []
    errors: list[str] = []
    page.on("request", lambda r: None if r.url.startswith(address) else foreign.append(r.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(f"{address}/?token={TOKEN}")
    for model in page.locator(".model-state").all():
        expect(model).to_have_text("ready", timeout=3 * PATIENCE_MS)
    yield page
    page.close()
    assert not foreign and not errors, (foreign, errors)


def ask(page, question: str, gold: str = "") -> None:
    page.get_by_label("Question").fill(question)
    page.get_by_label("Right answer").fill(gold)
    page.get_by_role("button", name="Ask", exact=True).click()


@needs_browser
def test_both_models_answer_and_what_they_found_can_be_edited(page):
    ask(page, "Where was Ada Marin born?", "Torvel")
    first = page.get_by_label("scripted/one")
    second = page.get_by_label("scripted/two")
    for model in (first, second):
        expect(model.locator(".answers")).to_be_visible(timeout=PATIENCE_MS)
    # the script goes on with each request, whichever model makes it
    column = first if first.locator(".passages").count() else second
    assert Axe().run(page).response["violations"] == []

    column.locator(".by-environment .link-button").first.click()
    page.get_by_label("Text").first.fill("Ada Marin was born in Nowhere.")
    page.get_by_role("button", name="Go on from here").click()
    expect(column.locator(".passage-text").first).to_have_text("Ada Marin was born in Nowhere.")
    expect(column.locator(".answers")).to_contain_text("Zorbin")

    column.locator(".by-policy .link-button").first.click()
    page.get_by_role("textbox", name="What the policy says").fill(
        "<think> I know </think> <answer> Oslo </answer>"
    )
    page.get_by_role("button", name="Go on from here").click()
    expect(column.locator(".answers")).to_contain_text("Oslo")
    expect(column.locator(".passages")).to_have_count(0)


@pytest.fixture
def known(address):
    """A client that knows the token."""
    with httpx.Client(base_url=address, trust_env=False, timeout=60) as client:
        client.get("/", params={"token": TOKEN})
        yield client


@needs_browser
def test_a_question_nobody_can_answer_fails_with_its_reason(page, known):
    """The page has waited until the models are ready."""
    answer = known.post("/models/0/ask", json={"question": "Unknown?"})
    assert "event: failed" in answer.text and "status 500" in answer.text
    assert known.post("/models/5/ask", json={}).status_code == 404
    assert known.post("/models/0/ask", json={"question": ""}).status_code == 422


def events_of(answer: httpx.Response) -> dict[str, dict]:
    """The last event of each kind."""
    blocks = [block.splitlines() for block in answer.text.strip().split("\n\n")]
    return {
        name.removeprefix("event: "): json.loads(data.removeprefix("data: "))
        for name, data in blocks
    }


def queries_of(retriever: str) -> float:
    """The queries that the retrieval server has answered."""
    metrics = httpx.get(retriever.removesuffix("/retrieve") + "/metrics", trust_env=False)
    return numbers_of(metrics.text)["retrieval_queries_total"]


@needs_browser
def test_who_follows_a_trajectory_asks_no_tool_again(page, known, retriever):
    """The page has waited until the models are ready."""
    first = events_of(known.post("/models/0/ask", json={"question": "Who is Bo Keld?"}))["ended"]
    searched = queries_of(retriever)
    turn, observation, _ = first["record"]["segments"]
    edited = {
        "question": "Who is Bo Keld?",
        "said": [turn["token_ids"], OTHER],
        "follows": first["name"],
    }
    second = events_of(known.post("/models/0/ask", json=edited))["ended"]
    shown = [segment["text"] for segment in second["record"]["segments"]]
    assert shown == [turn["text"], observation["text"], OTHER]
    assert queries_of(retriever) == searched


def test_other_sites_cannot_reach_it_under_a_name_of_theirs(address):
    answer = httpx.get(address, headers={"host": "evil.example"}, trust_env=False)
    assert answer.status_code == 400


def test_who_does_not_know_the_token_is_refused(address):
    with httpx.Client(base_url=address, trust_env=False) as client:
        assert client.get("/").status_code == 401
        assert client.get("/models").status_code == 401
        assert client.post("/models/0/ask", json={"question": "?"}).status_code == 401
        assert client.get("/?token=wrong").status_code == 401
        response = client.get(f"/?token={TOKEN}")
        assert response.status_code == 200
        assert "HttpOnly" in response.headers["set-cookie"]
        assert "SameSite=strict" in response.headers["set-cookie"]
        assert client.get("/models").status_code == 200


def test_a_model_that_has_ended_is_told(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    gone = Model("gone", Path(tmp_path, "none.sock"), process)
    with (
        at_address(make_app([gone], TOKEN)) as address,
        httpx.Client(base_url=address, trust_env=False) as client,
    ):
        client.get("/", params={"token": TOKEN})
        assert client.get("/models").json() == [{"name": "gone", "state": "ended"}]
        answer = client.post("/models/0/ask", json={"question": "?"})
        assert answer.status_code == 503 and answer.json() == {"detail": "gone: ended"}
