"""The supervisor around a small driver: restarts, signals, and that nothing is left."""

import json
import signal
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tests.processes import PATIENCE_S, family, wait_for
from verl.utils.run_folder import held

ROOT = Path(__file__).parents[2]
SUPERVISOR = ROOT / "tests" / "programs" / "supervisor.py"


@pytest.fixture
def start(tmp_path):
    """`start(behaviour, max_restarts)`: the supervisor of tests/programs/driver.py, running."""
    with family() as (env, alive):
        env.update(PYTHONPATH=str(ROOT))

        def begin(behaviour: str, max_restarts: int = 3) -> "subprocess.Popen[str]":
            arguments = [behaviour, str(tmp_path), str(max_restarts)]
            begin.alive = alive
            return subprocess.Popen(
                [sys.executable, str(SUPERVISOR), *arguments],
                env=env,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

        yield begin


def end(supervisor: "subprocess.Popen[str]") -> tuple[int, str]:
    output, _ = supervisor.communicate(timeout=PATIENCE_S)
    return supervisor.returncode, output


def starts(folder: Path) -> list[str]:
    return (folder / "starts").read_text().split()


def restarts(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "restarts.jsonl").open()]


def test_a_killed_driver_continues_from_its_checkpoint(tmp_path, start):
    status, output = end(start("is_killed_after_a_checkpoint"))
    assert status == 0
    assert starts(tmp_path) == ["False", "True"]
    assert [(r["signal"], r["step"]) for r in restarts(tmp_path)] == [("SIGKILL", 7)]
    assert json.loads((tmp_path / "ended.json").read_text())["status"] == 0
    assert (
        "the run ended by SIGKILL: restart 1 of 3 in 0.01 s, from the checkpoint of step 7"
        in output
    )


def test_a_restart_before_the_first_own_checkpoint_is_told_so(tmp_path, start):
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("40")
    status, _ = end(start("aborts_three_times"))
    assert status == 0
    assert starts(tmp_path) == ["False", "False", "False", "True"]
    assert [(r["signal"], r["step"]) for r in restarts(tmp_path)] == [
        ("SIGABRT", 40),
        ("SIGABRT", 40),
        ("SIGABRT", 2),
    ]


def test_what_is_lost_again_and_again_ends_with_what_to_do(tmp_path, start):
    status, output = end(start("is_lost", max_restarts=2))
    assert status == 75
    assert len(starts(tmp_path)) == 3
    assert [r["status"] for r in restarts(tmp_path)] == [75, 75]
    assert (
        "given up after 2 restarts without a new checkpoint in between (trainer.max_restarts)"
        in output
    )
    assert "run the same command: it continues from the beginning" in output


def test_progress_begins_the_count_anew(tmp_path, start):
    status, output = end(start("is_lost_but_progresses", max_restarts=2))
    assert status == 0 and len(starts(tmp_path)) == 6
    assert "restart 2 of" not in output  # even the same step, when it was written again


@pytest.mark.parametrize("status", [1, 2, 137])
def test_other_ends_are_final(tmp_path, start, status):
    assert end(start(f"exits_{status}"))[0] == status
    assert len(starts(tmp_path)) == 1 and not (tmp_path / "restarts.jsonl").exists()


@pytest.mark.parametrize("status", [1, 137])
def test_the_run_folder_says_how_the_run_ended(tmp_path, start, status):
    end(start(f"exits_{status}"))
    told = json.loads((tmp_path / "ended.json").read_text())
    assert told["status"] == status and datetime.fromisoformat(told["time"]).tzinfo is UTC


def test_a_start_that_was_refused_leaves_what_the_folder_says(tmp_path, start):
    (tmp_path / "ended.json").write_text("of the run before")
    end(start("exits_1"))
    assert (tmp_path / "ended.json").read_text() == "of the run before"
    (tmp_path / "ended.json").unlink()
    with held(tmp_path):
        end(start("exits_1"))
    assert not (tmp_path / "ended.json").exists()


def test_no_restart_where_none_is_wanted(tmp_path, start):
    status, output = end(start("is_killed", max_restarts=0))
    assert status == 137 and len(starts(tmp_path)) == 1
    assert "the run ended by SIGKILL; given up after no restart" in output
    assert "told: given up: the run ended by SIGKILL" in output


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_one_signal_is_passed_on_once_and_the_status_comes_back(tmp_path, start, number):
    supervisor = start("finishes_its_step")
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
    supervisor = start("has_a_long_step")
    wait_for((tmp_path / "ready").exists)
    supervisor.send_signal(signal.SIGTERM)
    wait_for((tmp_path / "noted").exists)
    supervisor.send_signal(signal.SIGINT)
    status, output = end(supervisor)
    assert status == 130 and "Traceback" not in output
    assert not (tmp_path / "latest_checkpointed_iteration.txt").exists()


def test_a_driver_that_ignores_the_second_signal_is_killed_with_its_session(tmp_path, start):
    supervisor = start("ignores_signals")
    wait_for((tmp_path / "ready").exists)
    for got in ("x", "xx"):
        supervisor.send_signal(signal.SIGINT)
        wait_for(
            lambda got=got: (tmp_path / "got").exists() and (tmp_path / "got").read_text() == got
        )
    assert end(supervisor)[0] == 137
    assert len(starts(tmp_path)) == 1


def test_a_signal_in_the_pause_ends_the_run(tmp_path, start):
    supervisor = start("is_lost", max_restarts=1000)
    wait_for(lambda: (tmp_path / "restarts.jsonl").exists() and len(restarts(tmp_path)) >= 4)
    supervisor.send_signal(signal.SIGTERM)
    assert end(supervisor)[0] in (143, 75)  # in a pause, or while the driver was starting


def test_nothing_outlives_a_killed_supervisor(tmp_path, start):
    supervisor = start("works_with_a_descendant")
    wait_for((tmp_path / "ready").exists)
    assert len(start.alive()) == 3
    supervisor.kill()
    wait_for(lambda: not start.alive())


def test_what_a_killed_driver_leaves_is_gone_before_the_next_start(tmp_path, start):
    supervisor = start("is_killed_beside_a_descendant")
    wait_for(lambda: (tmp_path / "starts").exists() and len(starts(tmp_path)) == 2)
    assert len(start.alive()) == 2
    supervisor.kill()
