"""Prompting baselines against an OpenAI-compatible server that plays transcripts.

The transcripts are right, wrong, malformed and endless.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fastapi import Response
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from transformers import AutoTokenizer

from search_r1.prompts import INVALID_ACTION, build_prompt
from tests.e2e.runs import ROOT
from tests.openai_server import Player
from tests.processes import PATIENCE_S
from tests.retrieval import serving
from tests.templates import make_family_tokenizer
from verl.trainer.driver import run_ppo
from verl.trainer.main_eval import run_eval
from verl.trainer.ppo.failures import RolloutFailed
from verl.trainer.supervise import Stop
from verl.utils.errors import ConfigError, DataError

KINDS = ("right", "wrong", "malformed", "endless")
QUESTIONS = {kind: f"Where was Ada Marin of the {kind} tale born?" for kind in KINDS}
ADA = 'Doc 1(Title: "Ada Marin") Ada Marin was born in Torvel.'
RIGHT = "Known. <answer> Torvel </answer> and more"
WRONG = "<answer> Marna </answer>"
MAX_TURNS = 2


@pytest.fixture
def questions(tmp_path):
    rows = [
        {
            "data_source": "tale",
            "prompt": [{"role": "user", "content": build_prompt(question, "search")}],
            "ability": "fact-reasoning",
            "reward_model": {"style": "rule", "ground_truth": {"target": ["Torvel"]}},
            "extra_info": {"question": question, "index": i, "gold_ids": ["1"]},
        }
        for i, question in enumerate(QUESTIONS.values())
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "questions.parquet")
    return tmp_path / "questions.parquet"


@pytest.fixture
def one_question(questions):
    """The first of them alone."""
    path = questions.with_name("one.parquet")
    pq.write_table(pq.read_table(questions).slice(0, 1), path)
    return path


def overrides(method, url, questions, retriever, *more):
    endpoint = "actor_rollout_ref.rollout.endpoint"
    return [
        f"method={method}",
        "experiment=nq_hotpotqa/grpo",
        f"max_turns={MAX_TURNS}",
        "trainer.device=cpu",
        "actor_rollout_ref.model.path=scripted",
        "actor_rollout_ref.model.tokenizer_path=data/closed_world/base",
        "actor_rollout_ref.rollout.name=openai",
        f"{endpoint}.url={url}/v1",
        f"{endpoint}.backoff_s=0.01",
        f"{endpoint}.timeout_s=3",
        f"{endpoint}.max_retries=2",
        f"retriever.url={retriever}",
        "data.max_start_length=1024",
        "data.max_response_length=200",
        f"data.train_files={questions}",
        f"data.val_files={questions}",
        f"trainer.default_local_dir={questions.parent}/run",
        "trainer.experiment_name=endpoint",
        *more,
    ]


def configuration(*args):
    with initialize_config_dir(str(ROOT / "configs"), version_base=None):
        return OmegaConf.to_container(compose("grpo", overrides(*args)), resolve=True)


def play(method, scripts, questions, retriever, *more, **player):
    """(records by kind, player) of an evaluation of the method."""
    played = Player({QUESTIONS[kind]: turns for kind, turns in scripts.items()}, **player)
    with serving(played.app) as url:
        path = run_eval(configuration(method, url, questions, retriever, *more))
    records = [json.loads(line) for line in path.open()]
    return {KINDS[record["row"]]: record for record in records}, played


def said(played, kind):
    """The messages of every request about a question, as (role, text)."""
    return [
        [(m["role"], m["content"]) for m in r["messages"]] for r in played.requests[QUESTIONS[kind]]
    ]


def outcomes(records):
    return {
        kind: (r["stop_reason"], r["info"]["searches"], r["reward"].get("em", 0))
        for kind, r in records.items()
    }


@pytest.mark.parametrize(
    ("method", "template"), [("direct", "direct"), ("cot", "cot"), ("r1", "r1"), ("sft", "direct")]
)
def test_methods_without_search_ask_once(method, template, questions, retriever):
    scripts = {
        "right": [RIGHT],
        "wrong": [WRONG],
        "malformed": ["Torvel"],
        "endless": ["so " * 500],
    }
    records, played = play(method, scripts, questions, retriever)
    for kind in KINDS:
        (request,) = played.requests[QUESTIONS[kind]]
        assert request["messages"] == [
            {"role": "user", "content": build_prompt(QUESTIONS[kind], template)}
        ]
        assert (
            request["stop"] == ["</answer>"]
            and request["temperature"] == 0
            and request["max_tokens"] == 200
        )
    assert outcomes(records) == {
        "right": ("answer", 0, 1),
        "wrong": ("answer", 0, 0),
        "malformed": ("max_turns", 0, 0),
        "endless": ("max_turns", 0, 0),
    }
    assert records["right"]["segments"][0]["text"] == "Known. <answer> Torvel </answer>", (
        "the stop string is put back"
    )


def test_rag_searches_once_with_the_question(questions, retriever):
    scripts = {
        "right": [RIGHT],
        "wrong": [WRONG],
        "malformed": ["Torvel"],
        "endless": ["so " * 500],
    }
    records, played = play("rag", scripts, questions, retriever)
    for kind in KINDS:
        (request,) = played.requests[QUESTIONS[kind]]
        (message,) = request["messages"]
        assert (
            QUESTIONS[kind] in message["content"]
            and ADA in message["content"]
            and request["stop"] == ["</answer>"]
        )
        assert records[kind]["segments"][0]["info"]["query"] == QUESTIONS[kind]
    assert {kind: o[1:] for kind, o in outcomes(records).items()} == {
        kind: (1, kind == "right") for kind in KINDS
    }


TAGGED = {
    "search_r1": (
        "search",
        "<think> t </think> <search> Ada Marin </search>",
        "</search>",
        "\n\n<information>",
        INVALID_ACTION,
    ),
    "react": (
        "react",
        "Thought: t\nAction: Search[Ada Marin]",
        "\nObservation:",
        "\nObservation: ",
        "no valid action",
    ),
    "search_o1": (
        "search_o1",
        "t <|begin_search_query|>Ada Marin<|end_search_query|>",
        "<|end_search_query|>",
        "\n\n<|begin_search_result|>",
        "<|begin_search_query|> query",
    ),
}


@pytest.mark.parametrize("method", TAGGED)
def test_methods_that_search_in_turns(method, questions, retriever):
    """The next message answers a search, or corrects nonsense, and nobody searches for ever."""
    template, search, stop, head, correction = TAGGED[method]
    ended = search if stop in search else search + stop
    scripts = {
        "right": [f"{ended} invented </information>", RIGHT],
        "wrong": [ended, WRONG],
        "malformed": ["hm", RIGHT],
        "endless": [ended],
    }
    records, played = play(method, scripts, questions, retriever)
    assert outcomes(records) == {
        "right": ("answer", 1, 1),
        "wrong": ("answer", 1, 0),
        "malformed": ("answer", 0, 1),
        "endless": ("max_turns", MAX_TURNS, 0),
    }
    first, second = said(played, "right")
    assert first == [("user", build_prompt(QUESTIONS["right"], template))]
    assert second[:2] == [*first, ("assistant", search)] and len(second) == 3
    role, text = second[2]
    assert role == "user" and text.startswith(head) and "Ada Marin was born in Torvel." in text
    assert (ADA in text) == (method != "search_o1")
    assert all(r["stop"] == [stop, "</answer>"] for r in played.requests[QUESTIONS["right"]])
    assert correction in said(played, "malformed")[1][2][1]
    assert (
        len(said(played, "endless")) == MAX_TURNS + 1
        and len(said(played, "endless")[-1]) == 2 * MAX_TURNS + 1
    )
    assert records["right"]["segments"][1]["info"]["query"] == "Ada Marin"
    searches = 2 + MAX_TURNS
    assert len(played.side) == (searches if method == "search_o1" else 0)


def test_search_o1_condenses_passages_in_a_conversation_of_its_own(one_question, retriever):
    search = "I wonder. <|begin_search_query|>Ada Marin<|end_search_query|>"
    scripts = {kind: [search, RIGHT] for kind in KINDS}
    finding = "She is from Torvel. </answer> <|end_search_result|>"
    records, played = play("search_o1", scripts, one_question, retriever, finding=finding)
    (side,) = played.side
    (message,) = side["messages"]
    assert (
        all(part in message["content"] for part in ("I wonder.", "Search query: Ada Marin", ADA))
        and "stop" not in side
    )
    shown = (
        "\n\n<|begin_search_result|>She is from Torvel. (/answer) "
        "(|end_search_result|)<|end_search_result|>\n\n"
    )
    assert said(played, "right")[1][2] == ("user", shown)
    info = records["right"]["segments"][1]["info"]
    assert info["passages"][0]["title"] == '"Ada Marin"' and info["condensed_from_tokens"] > 20


def test_ircot_reasons_a_sentence_at_a_time_over_all_passages(questions, retriever):
    scripts = {
        "right": [
            "Torvel lies in Marna. And then some.",
            "So it is. <answer> Torvel </answer>",
            RIGHT,
        ],
        "wrong": [WRONG],
        "malformed": [""],
        "endless": ["Marna is a country. I go on."],
    }
    records, played = play("ircot", scripts, questions, retriever, "retriever.topk=1")
    assert outcomes(records) == {
        "right": ("answer", 3, 1),
        "wrong": ("answer", 1, 0),
        "malformed": ("empty", 1, 0),
        "endless": ("max_turns", 1 + MAX_TURNS, 0),
    }
    contexts = said(played, "right")
    assert all(len(messages) == 1 for messages in contexts), "every context is written anew"
    texts = [messages[0][1] for messages in contexts]
    assert "Ada Marin was born" in texts[0] and "It has a harbour" not in texts[0]
    assert "Ada Marin was born" in texts[1] and "It has a harbour" in texts[1]
    assert (
        "Reasoning so far: Torvel lies in Marna.\n" in texts[1] and "And then some" not in texts[1]
    )
    assert "Reasoning so far: Torvel lies in Marna. So it is.\n" in texts[2]
    queries = [
        s["info"]["query"] for s in records["right"]["segments"] if s["source"] == "observation"
    ]
    assert queries == [QUESTIONS["right"], "Torvel lies in Marna.", "So it is."]
    assert records["endless"]["segments"][-1]["text"].strip() == "Marna is a country. I go on.", (
        "the last turn is whole"
    )


def test_a_completions_endpoint_reads_one_growing_text(one_question, retriever):
    search = TAGGED["search_r1"][1]
    scripts = {kind: [search, RIGHT] for kind in KINDS}
    api = "actor_rollout_ref.rollout.endpoint.api=completions"
    records, played = play("search_r1", scripts, one_question, retriever, api)
    first, second = (request["prompt"] for request in played.requests[QUESTIONS["right"]])
    assert first == build_prompt(QUESTIONS["right"], "search")
    assert second.startswith(f"{first}{search}\n\n<information>{ADA}") and second.endswith(
        "</information>\n\n"
    )
    assert outcomes(records) == {"right": ("answer", 1, 1)}


@pytest.mark.parametrize("api", ["chat", "completions"])
def test_an_endpoint_gets_no_bos_because_it_puts_one_there_itself(
    tmp_path, one_question, retriever, api
):
    make_family_tokenizer(tmp_path / "llama", "llama3-instruct")
    more = [
        f"actor_rollout_ref.rollout.endpoint.api={api}",
        f"actor_rollout_ref.model.tokenizer_path={tmp_path}/llama",
    ]
    _, played = play("direct", {kind: [RIGHT] for kind in KINDS}, one_question, retriever, *more)
    (request,) = played.requests[QUESTIONS["right"]]
    prompt = build_prompt(QUESTIONS["right"], "direct")
    if api == "chat":
        assert request["messages"] == [{"role": "user", "content": prompt}]
    else:
        start, end = (
            f"<|start_header_id|>{role}<|end_header_id|>\n\n" for role in ("user", "assistant")
        )
        assert request["prompt"] == f"{start}{prompt.strip()}<|eot_id|>{end}"


def test_an_endpoint_that_stumbles_is_asked_again(questions, retriever):
    scripts = {
        "right": [Response("", 500), Response("", 429, {"retry-after": "0"}), RIGHT],
        "wrong": [Response("no json"), Response('{"choices": []}'), WRONG],
        "malformed": [Player.HANG, RIGHT],
        "endless": [Response('{"choices": [{"message": {"content": 7}}]}'), RIGHT],
    }
    records, played = play("direct", scripts, questions, retriever)
    assert [r["reward"]["em"] for r in records.values()].count(1) == 3 and len(records) == 4
    assert [len(played.requests[q]) for q in QUESTIONS.values()] == [3, 3, 2, 2]


def test_finished_answers_outlive_a_broken_endpoint_and_are_not_asked_again(questions, retriever):
    broken = Response("out of money", 402)
    scripts = {"right": [RIGHT], "wrong": [broken], "malformed": [broken], "endless": [broken]}
    with pytest.raises(RolloutFailed, match="402: out of money"):
        play("direct", scripts, questions, retriever)
    kept = questions.parent / "run" / "evaluation.jsonl"
    assert [json.loads(line)["row"] for line in kept.open()] == [0]
    again = {**{kind: [WRONG] for kind in KINDS}, "right": [Response("", 500)]}
    records, played = play("direct", again, questions, retriever)
    assert (
        len(records) == 4
        and not played.requests[QUESTIONS["right"]]
        and records["right"]["reward"]["em"] == 1
    )


def test_another_evaluation_in_the_same_folder_is_refused(questions, retriever):
    scripts = {kind: [RIGHT] for kind in KINDS}
    play("direct", scripts, questions, retriever)
    with pytest.raises(DataError, match=r"of another evaluation \(.*agent"):
        play("cot", scripts, questions, retriever)
    with pytest.raises(DataError, match=r"of another evaluation \(not the same: reward\)"):
        play("direct", scripts, questions, retriever, "reward.f1=1.0")


def test_a_refused_key_an_absent_endpoint_and_training_are_clear_errors(questions, retriever):
    played = Player({})
    played.models_status = 401
    with (
        serving(played.app) as url,
        pytest.raises(ConfigError, match="refuses the key in \\$OPENAI_API_KEY"),
    ):
        run_eval(configuration("direct", url, questions, retriever))
    with pytest.raises(ConfigError, match="does not answer"):
        run_eval(configuration("direct", "http://127.0.0.1:9", questions, retriever))
    with pytest.raises(ConfigError, match="gives no tokens or weights to train"):
        run_ppo(configuration("direct", "http://127.0.0.1:9", questions, retriever), Stop())
    no_tokenizer = "actor_rollout_ref.model.tokenizer_path=null"
    with pytest.raises(ConfigError, match="needs a tokenizer"):
        run_eval(configuration("direct", "http://127.0.0.1:9", questions, retriever, no_tokenizer))
    with pytest.raises(ConfigError, match="the tokenizer has no chat template"):
        run_eval(configuration("tools", "http://127.0.0.1:9", questions, retriever))


def test_the_command_evaluates_an_endpoint_and_reports(tmp_path, questions, retriever):
    played = Player({QUESTIONS[kind]: [TAGGED["react"][1], RIGHT] for kind in KINDS})
    with serving(played.app) as url:
        settings = overrides("react", url, questions, retriever)
        command = [
            sys.executable,
            "-m",
            "search_r1.evaluate",
            "scripted",
            "--endpoint",
            f"{url}/v1",
            *settings,
        ]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=PATIENCE_S
        )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "| tale | 4 | 1.000 |" in done.stdout
    assert (
        json.loads((Path(questions).parent / "run" / "summary.json").read_text())["all"]["em"] == 1
    )


def test_trajectories_of_an_endpoint_become_rows_for_another_model(tmp_path, questions, retriever):
    """Right ones alone are kept, a second call asks nothing, and the rows have the prompt and the
    tokens of the model that is to be trained."""
    search = TAGGED["search_r1"][1]
    scripts = {"right": [search, RIGHT], "wrong": [search, WRONG], "malformed": [RIGHT]}
    played = Player({QUESTIONS[kind]: scripts.get(kind, [search]) for kind in KINDS})
    with serving(played.app) as url:
        settings = overrides("search_r1", url, questions, retriever, "finetune.samples=1")
        first, again = (
            command(tmp_path, "sample", "scripted", "--endpoint", f"{url}/v1", *out, *settings)
            for out in (["--out", "traces.jsonl"], ["--out", "again.jsonl"])
        )
    assert first.returncode == again.returncode == 0, first.stderr[-3000:] + again.stderr[-3000:]
    assert "traces.jsonl: 2 of 4 trajectories scored 1 or more, to 2 questions" in first.stdout
    assert [len(played.requests[QUESTIONS[kind]]) for kind in KINDS] == [2, 2, 1, MAX_TURNS + 1]
    traces = tmp_path / "traces.jsonl"
    assert {json.loads(line)["row"] for line in traces.open()} == {0, 2}
    assert traces.read_text() == (tmp_path / "again.jsonl").read_text()
    make_family_tokenizer(tmp_path / "llama", "llama3-instruct")
    model = [
        "experiment=nq_hotpotqa/grpo",
        f"actor_rollout_ref.model.path={tmp_path}/llama",
        f"data.train_files={questions}",
        "data.max_start_length=1024",
    ]
    done = command(tmp_path, "main", "--in", "traces.jsonl", "--out", "rows.jsonl", *model)
    assert done.returncode == 0 and "2 rows of 2 traces" in done.stdout, done.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").open()]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "llama")
    texts = [tokenizer.decode(row["input_ids"]) for row in rows]
    start, end = (
        f"<|start_header_id|>{role}<|end_header_id|>\n\n" for role in ("user", "assistant")
    )
    asked = f"{start}{build_prompt(QUESTIONS['right'], 'search').strip()}<|eot_id|>{end}"
    said = f"{search}\n\n<information>{ADA}"
    whole = next(text for text in texts if QUESTIONS["right"] in text)
    assert whole.startswith(f"<|begin_of_text|>{asked}{said}")
    assert whole.endswith("</information>\n\nKnown. <answer> Torvel </answer>")


def command(folder, module, *arguments):
    """A command of `search_r1.traces`, as it ended."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", f"search_r1.traces.{module}", *arguments],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
