"""What the page is told of a run folder: state, cost, alarms, trajectories, retriever."""

import json
import threading
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.responses import PlainTextResponse

from search_r1.evaluation.report import trajectories_at
from search_r1.pages import retriever_state
from search_r1.pages.comparison import Comparison
from search_r1.pages.cost import Prices, cost_of
from search_r1.pages.retriever_state import RetrieverState
from search_r1.pages.watched_run import WatchedRun, retriever_urls, state_of
from tests.retrieval import serving
from tests.search_r1.pages.made_records import HOSTILE, sample, write
from tests.search_r1.pages.made_runs import (
    append,
    make_run,
    metrics_app,
    raise_alarms,
    step_line,
    validate,
)
from verl.utils.errors import DataError
from verl.utils.run_folder import held


def watched(folder: Path, prices: Prices | None = None) -> WatchedRun:
    return WatchedRun(folder, "run", 0, prices or Prices())


def status_of(run: WatchedRun) -> dict:
    run.poll()
    return run.status


def test_what_is_no_run_folder_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"no run folder; one has metrics\.jsonl"):
        watched(tmp_path)


def test_the_first_look_tells_all_and_later_ones_what_is_new(tmp_path):
    folder = make_run(tmp_path / "run", [0.1, 0.2])
    run = watched(folder)
    rows, status = run.poll()
    assert (rows["kind"], rows["from"], len(rows["rows"])) == ("rows", 0, 3)
    assert (status["step"], status["total"], status["seconds_per_step"]) == (2, 10, 36)
    assert (status["model"], status["algorithm"]) == ("data/base", "grpo")
    assert run.poll() == []
    append(folder, step_line(3, 0.3))
    rows, status = run.poll()
    assert rows["from"] == 3 and [row["step"] for row in rows["rows"]] == [3]
    assert [message["kind"] for message in run.snapshot()] == ["rows", "status", "trajectories"]


def test_a_run_is_running_while_its_folder_is_held_and_then_what_it_says(tmp_path):
    folder = make_run(tmp_path / "run", [0.1] * 4)
    run = watched(folder)
    with held(folder):
        assert status_of(run)["state"] == "running"
        assert run.status["eta_s"] == 36 * 6
    assert status_of(run)["state"] == "lost" and run.status["eta_s"] is None
    for status, state in ((0, "finished"), (143, "stopped"), (130, "stopped"), (1, "failed")):
        (folder / "ended.json").write_text(json.dumps({"status": status}))
        assert status_of(run)["state"] == state
    (folder / "ended.json").write_text("{")
    assert state_of(folder, 4, 10) == "lost" and state_of(folder, 10, 10) == "finished"


def test_cost_is_that_of_all_steps_in_the_prices_that_are_known(tmp_path):
    """Two steps of 36 s on two devices are .04 device-hours; 40 searches, 400 tokens."""
    folder = make_run(tmp_path / "run", [0.1, 0.2])
    cost = status_of(watched(folder, Prices(device_hour=100, search=0.5)))["cost"]
    assert cost == pytest.approx(
        {
            "hours": 0.02,
            "device_hours": 0.04,
            "generated_tokens": 400,
            "trained_tokens": 300,
            "searches": 40,
            "money": 4 + 20,
        }
    )
    assert cost_of([], Prices())["money"] is None
    assert cost_of([], Prices(million_tokens=2))["money"] == 0
    assert Prices(million_tokens=2).of(1, 1, 500_000) == 1


def test_alarms_roll_backs_and_restarts_are_told(tmp_path):
    folder = make_run(tmp_path / "run", [0.1])
    raise_alarms(folder)
    alarms = status_of(watched(folder))["alarms"]
    assert [(alarm["kind"], alarm["text"]) for alarm in alarms] == [
        ("collapse", "collapse at step 3: actor/entropy moved first, at step 2"),
        ("roll-back", "1: from the alarm of step 3 to step 1"),
        ("restart", "2026-01-01T00:00:00+00:00: ended by SIGKILL, went on after step 2"),
        ("restart", f"not a restart: {HOSTILE!r}"[: len("not a restart: ") + 60]),
    ]
    (folder / "roll_backs.json").write_text("{")
    assert ("roll-back", "1: not a roll-back: '{'") in [
        (alarm["kind"], alarm["text"]) for alarm in status_of(watched(folder))["alarms"]
    ]


def test_what_cannot_be_read_is_told(tmp_path):
    folder = make_run(tmp_path / "run", [0.1])
    append(folder, "[1]\n", '{"half')
    run = watched(folder)
    first, second = status_of(run)["problems"]
    assert first == "metrics.jsonl, line 3: no metrics by name but a list: [1]"
    assert second.startswith("metrics.jsonl, line 4: its end is missing")
    (folder / "config.yaml").write_text("a: [")
    assert any(
        text.startswith("config.yaml: cannot be read") for text in status_of(run)["problems"]
    )
    (folder / "config.yaml").write_text("trainer: {total_training_steps: {a: 1}}\nmodel: [1]")
    assert status_of(run)["total"] == 10


def test_the_newest_trajectories_are_told_when_they_are_written(tmp_path):
    folder = make_run(tmp_path / "run", [0.1])
    run = watched(folder)
    run.poll()
    records = [sample(f"Question {n}?", "Paris", uid=f"{n}") for n in range(7)]
    write(folder / "trajectories" / "train_000001.jsonl", records)
    (message,) = run.poll()
    assert [record["name"] for record in message["records"]] == [
        f"train_000001:{n}" for n in range(1, 6)
    ]
    assert message["records"][0]["content"]["question"] == "Question 0?"
    assert run.poll() == []
    write(folder / "trajectories" / "val_000001.jsonl", ["{", "\n"])
    (message,) = run.poll()
    assert message["records"][0]["content"]["problem"].startswith("not JSON")


def test_many_alarms_of_a_kind_hide_none_of_another(tmp_path):
    folder = make_run(tmp_path / "run", [0.1])
    (folder / "alarms" / "step_1").mkdir(parents=True)
    (folder / "alarms" / "step_1" / "alarm.txt").write_text("the entropy fell")
    (folder / "nonfinite").mkdir()
    for number in range(60):
        (folder / "nonfinite" / f"actor_{number:02}.pt").touch()
    alarms = status_of(watched(folder))["alarms"]
    assert alarms[0] == {"kind": "collapse", "text": "the entropy fell"}
    assert alarms[1] == {"kind": "not finite", "text": "40 more, before these"}
    assert alarms[-1]["text"] == "a batch was kept: actor_59.pt" and len(alarms) == 22


def test_the_retrieval_server_is_asked_while_the_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(retriever_state, "TIMEOUT_S", 60)
    app = metrics_app([(10, 1.0), (14, 2.0), (2, 0.5)])
    with serving(app) as address:
        folder = make_run(tmp_path / "run", [0.1], url=f"{address}/retrieve")
        run = watched(folder)
        assert [message["kind"] for message in run.poll()] == ["rows", "status"]
        with held(folder):
            messages = [run.poll()[-1], run.poll()[-1], run.poll()[-1]]
    assert [message["samples"][0][1:] for message in messages] == [[7, None], [7, 0.25], [7, 0.25]]
    assert messages[0]["says"] == "1 of 1 answer" and run.snapshot()[-1]["anew"]
    with held(folder):
        (message,) = [m for m in run.poll() if m["kind"] == "retriever"]
        assert (message["says"], message["samples"]) == ("0 of 1 answer", [])
        assert run.poll() == []


def test_a_server_of_something_else_is_no_retriever():
    app = FastAPI()

    @app.get("/metrics")
    def metrics() -> PlainTextResponse:
        return PlainTextResponse("<html>")

    with serving(app) as address:
        assert RetrieverState([f"{address}/retrieve", "http://["]).poll() == {
            "says": "0 of 2 answer",
            "sample": None,
        }
    assert retriever_urls(["http://a", "file:///etc/passwd", 3]) == ["http://a"]
    assert retriever_urls(None) == []


def test_a_server_that_is_silent_holds_up_no_other(monkeypatch):
    """Each is answered only when all have been asked."""
    all_asked = threading.Barrier(3, timeout=60)

    def ask(self, url):
        all_asked.wait()
        return (2.0, 1.0, 4.0)

    monkeypatch.setattr(RetrieverState, "_ask", ask)
    answer = RetrieverState([f"http://127.0.0.1:{port}/retrieve" for port in (1, 2, 3)]).poll()
    assert answer["says"] == "3 of 3 answer" and answer["sample"][1:] == [6.0, 0.25]


def test_last_validations_are_compared_question_by_question(tmp_path):
    first, second, third = (make_run(tmp_path / name, [0.1]) for name in ("a", "b", "c"))
    table = Comparison([first, second, third])
    assert table.poll() and table.table[0] == {"problem": "not both have been validated yet"}
    assert not table.poll()
    validate(first, 0, ["Paris"] * 8)
    validate(first, 5, ["Paris", "Paris", *["Rome"] * 6])
    validate(second, 10, ["Paris", "Rome", *["Paris"] * 6])
    validate(third, 10, ["Paris"])
    assert table.poll()
    compared, other = table.table
    (row,) = compared["rows"]
    assert (compared["step"], compared["against"]) == (10, 5)
    assert (row["questions"], row["gained"], row["lost"]) == (8, 6, 1)
    assert row["difference"] == 5 / 8 and row["p"] == pytest.approx(2 * 8 / 128)
    assert other["problem"].startswith("cannot be compared: not the same questions")
    assert trajectories_at(first).name == "val_000005.jsonl"  # by `search-r1 compare`, too
    validate(second, 10, ["Paris"])
    assert table.poll()


def test_a_run_without_a_validation_cannot_be_compared(tmp_path):
    folder = make_run(tmp_path / "run", [0.1])
    with pytest.raises(DataError, match=r"neither evaluation\.jsonl nor a validation"):
        trajectories_at(folder)
    (folder / "evaluation.jsonl").touch()
    assert trajectories_at(folder) == folder / "evaluation.jsonl"


def test_a_comparison_says_what_cannot_be_read(tmp_path):
    first, second = (make_run(tmp_path / name, [0.1]) for name in ("a", "b"))
    validate(first, 5, ["Paris"])
    write(second / "trajectories" / "val_000005.jsonl", ["{"])
    table = Comparison([first, second])
    table.poll()
    assert "val_000005.jsonl, line 1: not a trajectory record" in table.table[0]["problem"]
