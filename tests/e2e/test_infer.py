"""Asking a model one question, in a dialogue, or a file of questions.

Most tests play transcripts; one has a real engine.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from search_r1 import infer
from search_r1.prompts import build_prompt
from search_r1.session import InferenceSession
from tests.configs import composed
from tests.e2e.runs import ROOT
from tests.openai_server import Player
from tests.processes import PATIENCE_S
from tests.retrieval import serving, write_lines
from tests.trained import make_run
from verl.trainer.config import validate
from verl.utils.errors import DataError
from verl.workers.config import ModelConfig

SEARCH = "<think> t </think> <search> Ada Marin </search>"
ANSWER = "<think> u </think> <answer> Torvel </answer>"
BASE = "data/closed_world/base"


@pytest.fixture
def repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def settings(retriever, *more):
    return [
        "experiment=nq_hotpotqa/grpo",
        f"retriever.url={retriever}",
        f"actor_rollout_ref.model.tokenizer_path={BASE}",
        "actor_rollout_ref.rollout.endpoint.backoff_s=0.01",
        "trainer.experiment_name=x",
        *more,
    ]


def ask(scripts, retriever, *arguments, setup=()):
    played = Player(scripts)
    with serving(played.app) as url:
        assert (
            infer.main(
                ["scripted", *arguments, "--endpoint", f"{url}/v1", *settings(retriever, *setup)]
            )
            == 0
        )
    return played


def test_a_question_is_shown_piece_by_piece(retriever, repository, capsys):
    played = ask({"Ada": [SEARCH, ANSWER]}, retriever, "Where was Ada Marin born")
    shown = capsys.readouterr().out
    assert shown.startswith(
        f'{SEARCH}\n\n<information>Doc 1(Title: "Ada Marin") Ada Marin was born in Torvel.'
    )
    assert (
        f"</information>\n\n{ANSWER}\n[answer: Torvel; 1 search, " in shown and "\033" not in shown
    )
    first = played.requests["Ada"][0]["messages"]
    assert first == [
        {"role": "user", "content": build_prompt("Where was Ada Marin born", "search")}
    ]


def test_a_dialogue_ends_with_an_empty_line_and_survives_a_failure(
    retriever, repository, capsys, monkeypatch
):
    lines = iter(["First?", "Broken?", "Second?", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    played = Player({"First": [ANSWER], "Broken": ["x"], "Second": ["<think> no idea </think>"]})
    with serving(played.app) as url:
        played.scripts.pop("Broken")  # the server does not know it: status 500
        flags = ["--endpoint", f"{url}/v1", *settings(retriever, "max_turns=1")]
        assert infer.main(["scripted", *flags]) == 0
    shown = capsys.readouterr().out
    assert (
        "[answer: Torvel; 0 searches" in shown
        and "[failed: " in shown
        and "[no answer; 0 searches" in shown
    )


def test_a_file_is_answered_and_answered_questions_are_not_asked_again(
    retriever, repository, tmp_path
):
    questions = write_lines(tmp_path / "q.jsonl", [{"question": "First?"}, {"question": "Second?"}])
    out = tmp_path / "answers.jsonl"
    files = ["--questions", str(questions), "--out", str(out)]
    ask({"First": [SEARCH, ANSWER], "Second": [ANSWER]}, retriever, *files)
    answers = {row["question"]: row for row in map(json.loads, out.open())}
    assert answers["First?"]["answer"] == "Torvel" and answers["First?"]["searches"] == 1
    assert [s["source"] for s in answers["First?"]["segments"]] == ["model", "observation", "model"]
    write_lines(questions, [{"question": q} for q in ("First?", "Second?", "Third?")])
    played = ask({"First": [ANSWER], "Second": [ANSWER], "Third": [ANSWER]}, retriever, *files)
    assert len(out.read_text().splitlines()) == 3 and list(played.requests) == ["Third"]
    with pytest.raises(
        SystemExit, match=r"answers.meta.json: .* of another set of answers \(not the same: agent\)"
    ):
        ask({}, retriever, *files, "max_turns=1")


def test_a_file_without_questions_is_named(retriever, repository, tmp_path):
    questions = write_lines(tmp_path / "q.jsonl", [{"question": "First?"}, {"text": "?"}])
    with pytest.raises(SystemExit, match=r"q.jsonl.*2.*: no question"):
        ask({}, retriever, "--questions", str(questions), "--out", str(tmp_path / "a.jsonl"))


@pytest.mark.cpu_engine
def test_a_real_engine_answers_from_a_checkpoint(retriever, tmp_path):
    make_run(tmp_path / "run", ModelConfig(path=str(ROOT / BASE)), ranks=1, lr=1e-6)
    rollout = [
        "actor_rollout_ref.rollout.dtype=float32",
        "actor_rollout_ref.rollout.cpu_kvcache_gb=0.2",
    ]
    budgets = [
        "data.max_prompt_length=512",
        "data.max_start_length=64",
        "data.max_response_length=48",
        "data.max_obs_length=256",
        "template=short",
    ]
    model = f"{tmp_path}/run/latest"
    question = "In which country lies Torvel"
    command = [sys.executable, "-m", "search_r1.infer", model, question, *rollout, *budgets]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *settings(retriever)],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("<think>") and " search" in done.stdout.splitlines()[-1]
    assert f"loading {tmp_path}" in done.stderr
    # what the engine and its processes say is shown when something fails
    assert not re.search(r"warn|vllm|leaked", done.stderr, re.IGNORECASE), done.stderr
    (log,) = re.findall(r"what the engine says: (\S+)\)", done.stderr)
    assert not Path(log).parent.exists()
    assert (tmp_path / "run" / "global_step_2" / "hf" / "model.safetensors").is_file()


def test_what_an_engine_has_said_is_shown_when_it_dies(tmp_path, monkeypatch, capsys):
    session = InferenceSession(validate(composed("grpo", "experiment=closed_world/grpo")))
    session.log = tmp_path / "engine.log"
    session.log.write_text("out of memory\n")
    server = session._build_server()
    server.on_death = session.show_log
    server.engine = object()
    monkeypatch.setattr("os._exit", lambda status: None)
    server._engine_ended()
    assert capsys.readouterr().err == "out of memory\n"
    server._engine_ended()
    assert capsys.readouterr().err == ""


def test_a_retriever_that_is_down_is_a_clear_error(repository):
    flags = ["--endpoint", "http://127.0.0.1:9/v1", *settings("http://127.0.0.1:9/retrieve")]
    with pytest.raises(SystemExit, match=r"(?s)error: .*endpoint.url: .*retriever.url: "):
        infer.main(["scripted", "Who?", *flags])


def test_a_missing_model_is_not_made_in_its_place(repository, tmp_path):
    missing = tmp_path / "none"
    with pytest.raises(SystemExit, match=f"{missing}: no such folder"):
        elsewhere = [f"setup.world={tmp_path}/world", "setup.index_dir=null"]
        infer.main([str(missing), "Who?", "retriever.url=http://127.0.0.1:9/retrieve", *elsewhere])
    assert not missing.exists()


def test_colours_are_for_terminals_only(monkeypatch):
    class Terminal(list):
        write = list.append
        flush = staticmethod(lambda: None)

        def isatty(self):
            return True

    out = Terminal()
    infer.show_colored("model", "<think> a </think> <answer> b </answer>", out)
    infer.show_colored("observation", "found", out)
    assert out[0].count("\033[90m<think>") == 1 and out[0].count("\033[1;32m<answer>") == 1
    assert out[1] == f"{infer.COLORS['observation']}found{infer.PLAIN}"
    monkeypatch.setenv("NO_COLOR", "1")
    infer.show_colored("model", "<think>", out)
    assert out[2] == "<think>"


def test_questions_of_every_form_are_read_and_rows_without_one_named(tmp_path):
    rows = [
        {"question": "a"},
        {"question": {"text": "b"}, "annotations": {"short_answers": [], "yes_no_answer": []}},
        {"question": "c", "supporting_facts": [], "answer": None},
        {"prompt": "d", "reward_model": {"ground_truth": None}},
        {"Question": "e", "Answer": {"Value": "x"}},
    ]
    assert infer.read_questions(write_lines(tmp_path / "q.jsonl", rows)) == [
        "a",
        "b",
        "c",
        "d",
        "e",
    ]
    bad = write_lines(
        tmp_path / "bad.jsonl", [{"question": "a"}, {"text": "b"}, {"question": ["c"]}]
    )
    with pytest.raises(DataError, match=r"line 2: no question\n.*line 3: no question"):
        infer.read_questions(bad)
