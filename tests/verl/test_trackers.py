"""The services that show curves: real clients, offline, whose files are read back."""

import json
import logging
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from verl.utils.mailbox import Mailbox, close_all
from verl.utils.trackers import (
    SERVICES,
    TrackedRun,
    Tracker,
    markdown_of,
    missing_clients,
)
from verl.utils.tracking import STEP, Tracking
from verl.utils.webhook import Webhook, webhook_of

RECORD = {
    "data_source": "nq",
    "prompt": "Question: Who? ",
    "segments": [{"text": "<think> hm </think>\n# <answer> Ada </answer>"}],
    "reward": {"score": 1.0},
    "info": {"turns": 1},
    "ground_truth": {"target": ["Ada"]},
    "stop_reason": "answer",
    "extra_info": {"question": "Who?"},
}
SCORE = "critic/score/mean"


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """Every client keeps what it is told in a folder of the test."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("SWANLAB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", str(tmp_path / "mlruns"))
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return tmp_path


def follow(
    name: str,
    folder: Path,
    steps: Sequence[int],
    resume_id: str | None = None,
    has_failed: bool = False,
) -> str:
    """Tells a service of these steps of a run; returns the service's name of the run."""
    run = TrackedRun(folder, "project", "run", {"trainer": {"seed": 0}}, resume_id, steps[0] - 1)
    tracker = SERVICES[name](run)
    for step in steps:
        tracker.log({SCORE: step / 10, "val/test_score/all": float("nan")}, step)
    tracker.log_trajectories("val", [RECORD, RECORD], steps[-1])
    tracker.alert("collapse", "the entropy fell")
    tracker.finish(has_failed)
    return tracker.id


@pytest.mark.parametrize("name", SERVICES)
def test_a_resumed_run_goes_on_with_its_curve(name, offline):
    """What a start that failed was told stays, and the next one adds to it."""
    if missing_clients([name]):
        pytest.skip(f"{name} is not installed")
    first = follow(name, offline, [1, 2, 3], has_failed=True)
    assert follow(name, offline, [4, 5], first) == first
    if name in CURVES:
        assert CURVES[name](offline, first) == [(step, step / 10) for step in (1, 2, 3, 4, 5)]


def tensorboard_curve(folder: Path, run_id: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(run_id)
    events.Reload()
    return [(point.step, round(point.value, 6)) for point in events.Scalars(SCORE)]


def mlflow_curve(folder: Path, run_id: str) -> list[tuple[int, float]]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(str(folder / "mlruns"))
    return [(point.step, point.value) for point in client.get_metric_history(run_id, SCORE)]


def trackio_curve(folder: Path, run_id: str) -> list[tuple[int, float]]:
    with sqlite3.connect(folder / "trackio" / "project.db") as database:
        rows = database.execute("SELECT step, metrics FROM metrics WHERE run_name = ?", [run_id])
        points = [(step, json.loads(metrics).get(SCORE)) for step, metrics in rows]
    return sorted((step, value) for step, value in points if value is not None)


CURVES = {"tensorboard": tensorboard_curve, "mlflow": mlflow_curve, "trackio": trackio_curve}
"""How the curve of a score is read back, by service."""


def test_points_behind_the_checkpoint_are_written_again(offline):
    pytest.importorskip("tensorboard")
    first = follow("tensorboard", offline, [1, 2, 3])
    follow("tensorboard", offline, [2, 3, 4], first)
    assert [step for step, _ in tensorboard_curve(offline, first)] == [1, 2, 3, 4]


def test_mlflow_lists_a_run_that_failed_as_failed(offline):
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    first = follow("mlflow", offline, [1], has_failed=True)
    store = MlflowClient(str(offline / "mlruns"))
    assert store.get_run(first).info.status == "FAILED"
    follow("mlflow", offline, [2], first)
    assert store.get_run(first).info.status == "FINISHED"


def test_a_transcript_is_no_markup():
    text = markdown_of([RECORD], 5)
    assert text.startswith('**1.0** nq, step 5, gold: "Ada"\n\n    Who?\n')
    assert all(line.startswith("    ") for line in text.splitlines()[2:])


class Listener:
    """A tracker that keeps what it is told, fails as often as `failing`, and may be slow."""

    id = "one"

    def __init__(self, failing: int = 0, gate: threading.Event | None = None) -> None:
        self.failing = failing
        self.gate = gate
        self.heard: list[Any] = []

    def log(self, metrics: dict[str, float], step: int) -> None:
        if self.gate is not None:
            self.gate.wait()
        if self.failing:
            self.failing -= 1
            raise ConnectionError("nobody there")
        self.heard.append(step)

    def log_trajectories(self, name: str, records: Sequence[Any], step: int) -> None:
        self.heard.append((name, len(records), step))

    def alert(self, title: str, text: str) -> None:
        self.heard.append((title, text))

    def finish(self, has_failed: bool) -> None:
        self.heard.append("failed" if has_failed else "finish")


def test_a_slow_service_is_not_waited_for():
    gate = threading.Event()
    service = Listener(gate=gate)
    mailbox = Mailbox("slow", service)
    for step in (1, 2, 3):
        mailbox.post(Tracker.log, {}, step)
    assert service.heard == []
    gate.set()
    close_all([mailbox])
    assert service.heard == [1, 2, 3, "finish"]


def test_a_run_that_failed_is_shown_as_failed():
    service = Listener()
    close_all([Mailbox("one", service)], has_failed=True)
    assert service.heard == ["failed"]


def test_what_a_service_misses_is_told_once(caplog):
    service = Listener(failing=2)
    mailbox = Mailbox("away", service)
    for step in (1, 2, 3):
        mailbox.post(Tracker.log, {}, step)
    close_all([mailbox])
    assert service.heard == [3, "finish"]
    assert caplog.text.count("ConnectionError: nobody there; the training goes on") == 1
    assert "away: 2 calls failed" in caplog.text


def test_a_service_that_never_answers_does_not_keep_a_run(caplog):
    mailbox = Mailbox("hung", Listener(gate=threading.Event()))
    mailbox.post(Tracker.log, {}, 1)
    close_all([mailbox], wait_s=0.01)
    assert "hung: not all was sent" in caplog.text
    assert mailbox.thread.daemon


def test_a_service_that_is_away_at_the_start_does_not_end_a_run(tmp_path, monkeypatch, caplog):
    def refuse(run: TrackedRun) -> Tracker:
        raise ConnectionError("nobody there")

    monkeypatch.setitem(SERVICES, "wandb", refuse)
    tracking = Tracking(str(tmp_path), ["wandb"], "project", "run", {}, {}, {"wandb": "old"})
    tracking.log({"loss": 0.5}, 1)
    tracking.finish()
    assert "wandb: ConnectionError: nobody there; the run goes on without it" in caplog.text
    assert tracking.ids == {"wandb": "old"}, "a later start may find it again"


def test_a_run_tells_its_services_what_stands_in_its_folder(tmp_path, monkeypatch):
    service = Listener()
    monkeypatch.setitem(SERVICES, "wandb", lambda run: service)
    tracking = Tracking(str(tmp_path), ["wandb"], "project", "run", {}, {})
    assert tracking.ids == {"wandb": "one"}
    tracking.log({"loss": 0.5}, 1)
    tracking.log_trajectories("val", [RECORD] * 20, 1, samples=8)
    tracking.alert("collapse", "the entropy fell")
    tracking.finish()
    assert service.heard == [1, ("val", 8, 1), ("collapse", "the entropy fell"), "finish"]
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {STEP: 1, "loss": 0.5}
    assert tracking.latest == {"loss": 0.5}


@contextmanager
def channel(status: int = 200) -> Iterator[tuple[str, list[Any]]]:
    """A real server at an address that takes messages, and the messages."""
    heard: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            heard.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """Keeps the console of the tests clean."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/secret", heard
    finally:
        server.shutdown()
        server.server_close()


def test_a_webhook_is_told(monkeypatch):
    with channel() as (url, heard):
        monkeypatch.setenv("MY_WEBHOOK", url)
        webhook = webhook_of("MY_WEBHOOK")
        assert webhook is not None
        webhook.tell("run", "collapse at step 3", "the entropy fell")
    assert heard == [{"text": "run: collapse at step 3\nthe entropy fell"}]
    assert webhook_of(None) is None and webhook_of("NOT_SET") is None


def test_a_webhook_that_fails_is_logged_without_its_address(caplog):
    caplog.set_level(logging.INFO)
    with channel(status=500) as (url, _):
        Webhook(url).tell("run", "title", "text")
    Webhook(url).tell("run", "title", "text")
    Webhook("no address/secret").tell("run", "title", "text")
    assert caplog.text.count("alert not delivered") == 3
    assert "secret" not in caplog.text
