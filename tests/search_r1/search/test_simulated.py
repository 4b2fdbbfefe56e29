"""The engine whose passages a model writes: what it asks, reads and refuses, over real HTTP."""

import asyncio
import math
from dataclasses import replace

import httpx
import pytest
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from pydantic import ValidationError

from search_r1.search.client import RetrievalClient, RetrieverConfig, check_noise, check_server
from search_r1.search.client.config import NoiseConfig
from search_r1.search.engines.load import load
from search_r1.search.engines.simulated import read_passages
from search_r1.search.errors import RetrieverError
from search_r1.search.noise import Noise
from search_r1.search.retrieval_server import parse_arguments
from search_r1.search.schema import RetrieveRequest
from search_r1.search.server.app import create_app
from search_r1.search.server.service import ServerSettings
from tests.retrieval import serving, wait_until_ready
from tests.search_r1.search.echo import Engine, app

KEY = "the-secret-key"
GOOD = "Gladly! <passage>\nTorvel\nTorvel lies\nin Marna.\n</passage>"


class Model:
    """An endpoint whose model says `text`.

    `answers`: what to answer first instead, in turn; `bodies`, `keys`: what was asked.
    """

    def __init__(self):
        self.reset()
        self.app = FastAPI()
        self.app.add_api_route("/v1/models", self.models)
        self.app.add_api_route("/v1/chat/completions", self.chat, methods=["POST"])

    def reset(self):
        self.text = GOOD
        self.answers = []
        self.bodies = []
        self.keys = []
        self.listing = JSONResponse({"data": [{"id": "writer"}, {"id": "other"}]})

    async def models(self):
        return self.listing

    async def chat(self, request: Request):
        self.bodies.append(await request.json())
        self.keys.append(request.headers.get("authorization"))
        if self.answers:
            return self.answers.pop(0)
        message = {"role": "assistant", "content": self.text}
        return {"choices": [{"message": message, "finish_reason": "stop"}]}

    @property
    def prompts(self):
        return [body["messages"][0]["content"] for body in self.bodies]


@pytest.fixture(scope="module")
def endpoint():
    made = Model()
    with serving(made.app) as base:
        made.url = f"{base}/v1"
        yield made


@pytest.fixture
def model(endpoint):
    endpoint.reset()
    return endpoint


def arguments(url, *flags):
    simulated = ["--simulated_url", url, "--simulated_model", "writer"]
    return parse_arguments(["--retriever_name", "simulated", *simulated, *flags])


def engine(model, *flags):
    made = load(arguments(model.url, *flags))
    made.simulator = replace(made.simulator, backoff_s=0.01)
    return made


def block(i):
    return f"<passage>\nT{i}\nText {i}.\n</passage>"


# The engine


def test_useful_and_noisy_passages_have_prompts_of_their_own(model):
    model.text = "".join(map(block, range(3)))
    found = engine(model).simulate(["where is {topk}"] * 2, [False, True], 2)
    for hits, kind in zip(found, ("useful", "noisy"), strict=True):
        assert [document["contents"] for document, _ in hits] == ['"T0"\nText 0.', '"T1"\nText 1.']
        assert [score for _, score in hits] == [1.0, 0.5]
        assert all(document["id"].startswith(f"{kind}-") for document, _ in hits)
    useful, noisy = sorted(model.prompts, key=lambda prompt: "no help" in prompt)
    assert "hold what the query asks for" in useful and "are of no help" in noisy
    for prompt in model.prompts:
        assert "Write the 2 passages" in prompt and prompt.endswith("Query: where is {topk}")
    assert {(b["model"], b["max_tokens"], b["temperature"]) for b in model.bodies} == {
        ("writer", 600, 0.8)
    }
    assert found[0] == engine(model).search(["where is {topk}"], 2)[0], "ids are stable"


def test_prompts_are_taken_from_files_and_must_have_their_places(model, tmp_path):
    good = tmp_path / "good.txt"
    good.write_text("Invent {topk} about {query}!")
    engine(model, "--simulated_noisy_prompt", str(good)).simulate(["a"] * 2, [False, True], 1)
    assert sum(prompt == "Invent 1 about a!" for prompt in model.prompts) == 1
    bad = tmp_path / "bad.txt"
    bad.write_text("Invent {topk}")
    with pytest.raises(RetrieverError, match=r"--simulated_useful_prompt .*bad.txt.* lacks .query"):
        engine(model, "--simulated_useful_prompt", str(bad))
    with pytest.raises(RetrieverError, match=r"--simulated_useful_prompt .*none.txt.*No such file"):
        engine(model, "--simulated_useful_prompt", str(tmp_path / "none.txt"))


def test_what_was_written_is_kept_on_disk(model, tmp_path):
    flags = ("--simulated_cache", str(tmp_path / "cache.sqlite"))
    first = engine(model, *flags).simulate(["a", "a"], [False, True], 1)
    again = engine(model, *flags).simulate(["a", "a"], [False, True], 1)
    assert first == again and len(model.bodies) == 2
    engine(model, *flags, "--simulated_temperature", "0").search(["a"], 1)
    assert len(model.bodies) == 3, "another request"


@pytest.mark.parametrize(
    ("text", "topk", "message"),
    [
        ("I cannot do that.", 1, "0 of 1 passages"),
        (block(1), 2, "1 of 2 passages"),
        ("<passage>\nTorvel\nTorvel lies in", 1, "0 of 1 passages.*--simulated_passage_tokens"),
        ("<passage>Torvel</passage>", 1, "not a title, a line break and a text"),
        ("<passage>\n\n</passage>", 1, "not a title"),
        (f"<passage>\nTorvel\n{block(1)}", 1, "not a title"),
        (f"<think>{block(1)}</think>", 1, "0 of 1"),
    ],
)
def test_a_malformed_answer_is_an_error_of_its_query_alone(model, text, topk, message):
    made = engine(model, "--simulated_max_retries", "1", "--simulated_concurrency", "1")
    good = "".join(map(block, range(2)))
    model.answers = [chat_of(text), chat_of(text), chat_of(good)]
    bad, fine = made.search(["bad", "fine"], topk)
    assert bad.kind == "malformed" and len(fine) == topk
    with pytest.raises(type(bad), match=message):
        read_passages(text, topk)


def chat_of(text):
    message = {"role": "assistant", "content": text}
    return JSONResponse({"choices": [{"message": message, "finish_reason": "stop"}]})


@pytest.mark.parametrize(
    "body", [b"[]", b'{"choices": []}', b'{"choices": [{"message": {"content": null}}]}', b"no"]
)
def test_what_is_no_chat_completion_is_malformed(model, body):
    model.answers = [Response(body)] * 3
    (failed,) = engine(model).search(["a"], 1)
    assert failed.kind == "malformed" and "no chat completion" in str(failed)


def test_half_a_surrogate_pair_is_malformed(model):
    text = GOOD.replace("Marna", r"\ud800").replace("\n", r"\n")
    whole = chat_of("TEXT").body.replace(b"TEXT", text.encode())
    model.answers = [Response(whole)] * 3
    (failed,) = engine(model).search(["a"], 1)
    assert failed.kind == "malformed"


def test_errors_are_retried_where_that_may_help(model):
    made = engine(model)
    model.answers = [JSONResponse({}, 500), chat_of("nothing")]
    assert made.search(["a"], 1)[0][0][0]["contents"] == '"Torvel"\nTorvel lies in Marna.'
    assert len(model.bodies) == 3
    model.answers = [JSONResponse({"error": "no such model"}, 404)]
    (failed,) = made.search(["a"], 1)
    assert failed.kind == "refused" and "404" in str(failed) and len(model.bodies) == 4
    model.answers = [JSONResponse({}, 503, {"retry-after": "0"})] * 3
    (failed,) = made.search(["a"], 1)
    assert failed.kind == "simulator" and "503" in str(failed)
    assert made.search([" "], 1) == [[]], "nothing is asked"


def test_the_key_of_the_environment_is_sent_and_never_told(model, monkeypatch):
    monkeypatch.setenv("WRITER_KEY", KEY)
    made = engine(model, "--simulated_key_env", "WRITER_KEY")
    model.answers = [JSONResponse({}, 401)]
    (failed,) = made.search(["a"], 1)
    assert model.keys == [f"Bearer {KEY}"] and KEY not in str(failed)


# At the start


def test_an_endpoint_that_does_not_answer_is_named():
    with pytest.raises(
        RetrieverError, match=r"--simulated_url http://127.0.0.1:9/v1 does not answ"
    ):
        load(arguments("http://127.0.0.1:9/v1"))


@pytest.mark.parametrize(
    ("listing", "message"),
    [
        (
            JSONResponse({"data": [{"id": "a"}]}),
            "--simulated_model writer: .* no such model, only a",
        ),
        (JSONResponse({}, 401), "refuses the key in .OPENAI_API_KEY"),
        (JSONResponse({}, 500), "not the list of models .*status 500"),
        (JSONResponse([]), "not the list of models"),
    ],
)
def test_a_wrong_model_and_a_wrong_endpoint_are_named(model, listing, message):
    model.listing = listing
    with pytest.raises(RetrieverError, match=message):
        engine(model)


def test_an_endpoint_that_lists_no_models_is_taken(model):
    model.listing = JSONResponse({}, 404)
    assert engine(model).search(["a"], 1)[0]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "needs --simulated_url and --simulated_model"),
        (["--simulated_url", "http://a/v1"], "needs --simulated_model"),
        (["--simulated_url", "a:1", "--simulated_model", "m"], "expected an address such as"),
        (["--corpus_path", "c.jsonl", "--record", "r"], "remove --corpus_path and --record"),
        (["--index_path", "i", "--reranker", "m"], "remove --index_path and --reranker"),
        (["--documents", "id"], "searches nothing: remove --documents"),
    ],
)
def test_flags_that_are_missing_or_have_no_effect_are_named(flags, message):
    with pytest.raises(RetrieverError, match=message):
        load(parse_arguments(["--retriever_name", "simulated", *flags]))


@pytest.mark.parametrize(
    "flags",
    [
        ("--simulated_temperature", "-1"),
        ("--simulated_max_retries", "-1"),
        ("--simulated_timeout_s", "0"),
        ("--simulated_passage_tokens", "0"),
    ],
)
def test_numbers_out_of_range_are_refused(flags, capsys):
    with pytest.raises(SystemExit):
        parse_arguments(flags)
    assert flags[0] in capsys.readouterr().err


def test_help_has_every_flag(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["--help-all"])
    said = capsys.readouterr().out
    names = ("url", "model", "key_env", "useful_prompt", "noisy_prompt", "cache", "concurrency")
    assert all(f"--simulated_{name}" in said for name in names)


# The contract


@pytest.fixture
def server(model):
    made = create_app(lambda: engine(model), ServerSettings())
    with serving(made) as base:
        wait_until_ready(f"{base}/health")
        yield base


def ask(base, queries, **body):
    return httpx.post(f"{base}/retrieve", json={"queries": queries, "topk": 1, **body}, timeout=30)


def kinds(answer):
    return [hits[0]["id"].partition("-")[0] for hits in answer.json()["result"]]


def test_health_metrics_and_the_contract_are_those_of_every_engine(server, model):
    health = {"status": "ok", "retriever": "simulated", "num_documents": 0}
    assert httpx.get(f"{server}/health").json() == health
    (hit,) = ask(server, ["a"], return_scores=True).json()["result"][0]
    assert hit["document"]["contents"] == '"Torvel"\nTorvel lies in Marna.' and hit["score"] == 1.0
    model.text = "nothing"
    partial = ask(server, ["b"], allow_partial=True).json()
    assert partial["result"] == [[]] and partial["errors"]["0"].startswith("malformed: ")
    assert ask(server, ["b"]).status_code == 500
    assert 'retrieval_errors_total{kind="malformed"} 2.0' in httpx.get(f"{server}/metrics").text


def test_the_share_of_noise_is_drawn_from_query_and_seed(server):
    queries = [f"query {i}" for i in range(200)]
    drawn = kinds(ask(server, queries, noise=0.3, noise_seed=5))
    assert drawn == kinds(ask(server, queries, noise=0.3, noise_seed=5))
    expected = [Noise(0.3, 5).falls_on(query) for query in queries]
    assert [kind == "noisy" for kind in drawn] == expected
    deviation = math.sqrt(200 * 0.3 * 0.7)
    assert abs(sum(expected) - 60) < 4 * deviation
    assert drawn != kinds(ask(server, queries, noise=0.3, noise_seed=6)), "other queries"
    for noise, kind in [(0, "useful"), (None, "useful"), (1, "noisy")]:
        assert set(kinds(ask(server, queries, noise=noise))) == {kind}


def test_the_cache_keeps_useful_and_noisy_passages_apart(server, model):
    answers = [kinds(ask(server, ["a"], noise=noise)) for noise in (0, 1, 0, 1)]
    assert answers == [["useful"], ["noisy"]] * 2 and len(model.bodies) == 2
    assert "\nretrieval_cache_hits_total 2.0" in httpx.get(f"{server}/metrics").text


@pytest.mark.parametrize("noise", [-0.1, 1.1, True, "0.5"])
def test_a_share_that_is_none_is_refused(server, noise):
    answer = ask(server, ["a"], noise=noise)
    assert answer.status_code == 422 and answer.json()["detail"][0]["loc"] == ["body", "noise"]
    with pytest.raises(ValidationError):
        RetrieveRequest.model_validate({"queries": [], "noise": noise})


def test_an_engine_that_only_searches_refuses_noise():
    with serving(app(Engine())) as base:
        wait_until_ready(f"{base}/health")
        answer = ask(base, ["a"], noise=0.5)
        assert answer.status_code == 409
        assert "the engine echo searches and cannot write noise" in answer.json()["detail"]
        assert ask(base, ["a"], noise=0).status_code == 200
        assert check_server(f"{base}/retrieve") is None
        problem = check_noise(f"{base}/retrieve")
        assert "gives no noise (status 409" in problem and "--retriever_name simulated" in problem


def test_a_simulated_server_passes_the_checks(server):
    assert check_server(f"{server}/retrieve") is check_noise(f"{server}/retrieve") is None


# The client


async def test_searches_share_requests_and_results_only_with_the_same_noise(server):
    client = RetrievalClient(RetrieverConfig(url=f"{server}/retrieve", topk=1, batch_wait_s=0.05))
    sent = []
    post = client.http.post

    async def counting(address, **kwargs):
        sent.append(kwargs["json"])
        return await post(address, **kwargs)

    client.http.post = counting
    all_noise = Noise(1.0, 3)
    asked = [("a",), ("b",), ("a", all_noise), ("a",), ("b", all_noise), ("a", Noise(1.0, 4))]
    found = await asyncio.gather(*(client.search(*search) for search in asked))
    await client.close()
    bodies = [(body["queries"], body.get("noise"), body.get("noise_seed")) for body in sent]
    assert bodies == [(["a", "b"], None, None), (["a", "b"], 1.0, 3), (["a"], 1.0, 4)]
    got = [passages[0].id.partition("-")[0] for passages in found]
    assert got == ["useful", "useful", "noisy", "useful", "noisy", "noisy"]


# The schedule


@pytest.mark.parametrize(("base", "middle"), [(4.0, 1 / 3), (0.25, 2 / 3), (1.001, 0.499875)])
def test_the_schedule_is_that_of_the_paper(base, middle):
    schedule = NoiseConfig(start=0.2, end=0.8, base=base, steps=10)
    assert schedule.share_at(5) == pytest.approx(0.2 + 0.6 * middle, abs=1e-6)
    shares = [schedule.share_at(step) for step in range(13)]
    assert shares[0] == 0.2 and shares[10:] == [0.8] * 3 and shares == sorted(shares)
    expected = 0.2 + 0.6 * (base**0.3 - 1) / (base - 1)
    assert shares[3] == pytest.approx(expected)
    assert schedule.share_at(None) == 0.0
    assert NoiseConfig(start=0.5, end=0.5, validation=0.25).share_at(None) == 0.25
    assert NoiseConfig(start=0.5, end=0.5).share_at(7) == 0.5


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"end": 0.5, "steps": 0}, "(?s)steps.*greater than 0"),
        ({"end": 0.5}, "steps: name the number of training steps .* start=0 to end=0.5"),
        ({"end": 0.5, "steps": 9, "base": 1}, "(?s)base.*must not be 1, by which"),
        ({"end": 0.5, "steps": 9, "base": 0}, "(?s)base.*greater than 0"),
        ({"end": 0.5, "steps": 9, "base": math.inf}, "(?s)base.*finite"),
        ({"start": 1.5}, "(?s)start.*less than or equal to 1"),
        ({"validation": math.nan}, "(?s)validation"),
    ],
)
def test_bad_schedules_are_refused(keys, message):
    with pytest.raises(ValidationError, match=message):
        RetrieverConfig(noise=keys)


def test_results_that_the_client_keeps_would_have_noise_of_another_step():
    with pytest.raises(ValidationError, match="cache_size=9 would answer with the noise of an"):
        RetrieverConfig(cache_size=9, noise={"end": 0.5, "steps": 9})
    assert RetrieverConfig(cache_size=9).cache_size == 9
