"""The supervisor around small scripts: what is restarted, what is not, where signals go, and that
nothing is left."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import family, wait_for

ROOT = Path(__file__).parents[2]
HEAD = """
import os, pathlib, signal, subprocess, sys, time
from verl.trainer.supervise import Stop, follow_supervisor
own = follow_supervisor()
run = pathlib.Path(os.environ["RUN"])
with (run / "starts").open("a") as file:
    file.write(f"{own}\\n")
start = len((run / "starts").read_text().split())
def checkpoint(step):
    (run / "pending").write_text(str(step))
    os.replace(run / "pending", run / "latest_checkpointed_iteration.txt")
def ready():
    (run / "ready").touch()
"""
SUPERVISE = """
import logging, sys
from verl.trainer.supervise import supervise
logging.basicConfig(format="%(message)s")
command = [sys.executable, "-c", sys.argv[1]]
sys.exit(supervise(command, sys.argv[2], int(sys.argv[3]), pause_s=0.01, grace_s=2.0))
"""
DESCENDANT = "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']);"


@pytest.fixture
def start(tmp_path):
    """`start(body, max_restarts)`: the supervisor of a driver with this body, running."""
    with family() as (env, alive):

        def begin(body: str, max_restarts: int = 3) -> "subprocess.Popen[str]":
            env.update(RUN=str(tmp_path), PYTHONPATH=str(ROOT))
            command = [
                sys.executable,
                "-c",
                SUPERVISE,
                HEAD + body,
                str(tmp_path),
                str(max_restarts),
            ]
            begin.alive = alive
            return subprocess.Popen(
                command,
                env=env,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

        yield begin


def end(supervisor: "subprocess.Popen[str]") -> tuple[int, str]:
    output, _ = supervisor.communicate(timeout=60)
    return supervisor.returncode, output


def starts(folder: Path) -> list[str]:
    return (folder / "starts").read_text().split()


def restarts(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "restarts.jsonl").open()]


def test_a_killed_driver_continues_from_its_checkpoint(tmp_path, start):
    status, output = end(
        start("if start == 1: checkpoint(7); os.kill(os.getpid(), signal.SIGKILL)")
    )
    assert status == 0
    assert starts(tmp_path) == ["False", "True"]
    assert [(r["signal"], r["step"]) for r in restarts(tmp_path)] == [("SIGKILL", 7)]
    assert (
        "the run ended by SIGKILL: restart 1 of 3 in 0.01 s, from the checkpoint of step 7"
        in output
    )


def test_a_restart_before_the_first_own_checkpoint_is_told_so(tmp_path, start):
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("40")
    status, _ = end(start("if start < 3: os.abort()\nif start == 3: checkpoint(2); os.abort()"))
    assert status == 0
    assert starts(tmp_path) == ["False", "False", "False", "True"]
    assert [(r["signal"], r["step"]) for r in restarts(tmp_path)] == [
        ("SIGABRT", 40),
        ("SIGABRT", 40),
        ("SIGABRT", 2),
    ]


def test_what_is_lost_again_and_again_ends_with_what_to_do(tmp_path, start):
    status, output = end(start("sys.exit(75)", max_restarts=2))
    assert status == 75
    assert len(starts(tmp_path)) == 3
    assert [r["status"] for r in restarts(tmp_path)] == [75, 75]
    assert (
        "given up after 2 restarts without a new checkpoint in between (trainer.max_restarts)"
        in output
    )
    assert "run the same command: it continues from the beginning" in output


def test_progress_begins_the_count_anew(tmp_path, start):
    status, output = end(
        start("if start < 6: checkpoint(start // 2); sys.exit(75)", max_restarts=2)
    )
    assert status == 0 and len(starts(tmp_path)) == 6
    assert "restart 2 of" not in output  # even the same step, when it was written again


@pytest.mark.parametrize("status", [1, 2, 137])
def test_other_ends_are_final(tmp_path, start, status):
    assert end(start(f"sys.exit({status})"))[0] == status
    assert len(starts(tmp_path)) == 1 and not (tmp_path / "restarts.jsonl").exists()


def test_no_restart_where_none_is_wanted(tmp_path, start):
    status, output = end(start("os.kill(os.getpid(), signal.SIGKILL)", max_restarts=0))
    assert status == 137 and len(starts(tmp_path)) == 1
    assert "the run ended by SIGKILL; given up after no restart" in output


FINISHES_ITS_STEP = """
with Stop() as stop:
    ready()
    try:
        while not stop.requested:
            time.sleep(0.01)
        (run / "noted").touch()
        time.sleep(1.0 if len(sys.argv) == 1 else 600)
    except KeyboardInterrupt:
        sys.exit(130)
    checkpoint(3)
sys.exit(128 + stop.requested)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_one_signal_is_passed_on_once_and_the_status_comes_back(tmp_path, start, number):
    supervisor = start(FINISHES_ITS_STEP)
    wait_for((tmp_path / "ready").exists)
    supervisor.send_signal(number)
    status, output = end(supervisor)
    assert status == 128 + number and len(starts(tmp_path)) == 1
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "3"
    assert (
        output.count("finishing the step under way, then a checkpoint; Ctrl-C again to exit now")
        == 1
    )


def test_the_second_signal_ends_the_driver_at_once(tmp_path, start):
    supervisor = start(FINISHES_ITS_STEP.replace("1.0 if len(sys.argv) == 1 else 600", "600"))
    wait_for((tmp_path / "ready").exists)
    supervisor.send_signal(signal.SIGTERM)
    wait_for((tmp_path / "noted").exists)
    supervisor.send_signal(signal.SIGINT)
    status, output = end(supervisor)
    assert status == 130 and "Traceback" not in output
    assert not (tmp_path / "latest_checkpointed_iteration.txt").exists()


def test_a_driver_that_ignores_the_second_signal_is_killed_with_its_session(tmp_path, start):
    ignores = (
        "[signal.signal(n, lambda *a: (run / 'got').open('a').write('x')) for n in (2, 15)]; "
        "ready()\n"
    )
    supervisor = start(f"{DESCENDANT} {ignores}while True: time.sleep(1)")
    wait_for((tmp_path / "ready").exists)
    for got in ("x", "xx"):
        supervisor.send_signal(signal.SIGINT)
        wait_for(
            lambda got=got: (tmp_path / "got").exists() and (tmp_path / "got").read_text() == got
        )
    assert end(supervisor)[0] == 137
    assert len(starts(tmp_path)) == 1


def test_a_signal_in_the_pause_ends_the_run(tmp_path, start):
    supervisor = start("sys.exit(75)", max_restarts=1000)
    wait_for(lambda: (tmp_path / "restarts.jsonl").exists() and len(restarts(tmp_path)) >= 4)
    supervisor.send_signal(signal.SIGTERM)
    assert end(supervisor)[0] in (143, 75)  # in a pause, or while the driver was starting


def test_nothing_outlives_a_killed_supervisor(tmp_path, start):
    supervisor = start(f"{DESCENDANT} ready(); time.sleep(600)")
    wait_for((tmp_path / "ready").exists)
    assert len(start.alive()) == 3
    supervisor.kill()
    wait_for(lambda: not start.alive())


def test_what_a_killed_driver_leaves_is_gone_before_the_next_start(tmp_path, start):
    body = f"if start == 1: {DESCENDANT} ready(); os.kill(os.getpid(), 9)\nelse: time.sleep(600)"
    supervisor = start(body)
    wait_for(lambda: (tmp_path / "starts").exists() and len(starts(tmp_path)) == 2)
    assert len(start.alive()) == 2
    supervisor.kill()
