"""Real hangs: of a verb, of the processes asked for their stacks, and none."""

import re
import subprocess
import sys
import threading
import time
from pathlib import Path

from tests.processes import PATIENCE_S
from verl.trainer.watchdog import Watchdog

ROOT = Path(__file__).parents[2]


def hang(folder, stacks, **more):
    """The file of stacks that a watchdog wrote about a verb that hangs."""
    noticed = threading.Event()
    with Watchdog(0.2, folder, stacks, noticed.set, **more) as watchdog:
        watchdog.beat("gen")
        assert noticed.wait(60)
    (path,) = (folder / "stacks").iterdir()
    return path.read_text()


def test_the_stacks_of_all_processes_are_written(tmp_path):
    text = hang(tmp_path, lambda: {"rank 0": "in all_reduce", "engine 1": "idle"})
    assert re.match(
        r"'gen' made no progress for \d+ s \(trainer.hang_timeout_s=0.2\)\n\n== driver\n", text
    )
    assert "test_watchdog.py" in text and "in hang" in text  # this thread, waiting
    assert text.endswith("\n== rank 0\nin all_reduce\n\n== engine 1\nidle\n")


def test_processes_that_do_not_answer_cannot_hang_the_dump(tmp_path):
    text = hang(tmp_path, lambda: time.sleep(600) or {}, stacks_timeout_s=0.2)
    assert "in hang" in text and text.endswith("\n== other processes\nno answer within 0.2 s\n")


def test_an_error_on_the_way_is_written_in_their_place(tmp_path):
    def broken():
        raise ConnectionError("gone")

    assert hang(tmp_path, broken).endswith("\n== other processes\nConnectionError: gone\n")


def test_a_folder_that_cannot_be_written_stops_nothing(tmp_path, caplog):
    (tmp_path / "stacks").touch()
    noticed = threading.Event()
    with Watchdog(0.05, tmp_path, on_hang=noticed.set):
        assert noticed.wait(60)
    assert "'start' made no progress" in caplog.text and "could not be written" in caplog.text


def test_beats_keep_it_quiet_and_its_end_is_clean(tmp_path):
    barked = threading.Event()
    with Watchdog(5.0, tmp_path, on_hang=barked.set) as watchdog:
        for verb in ("gen", "values", "update_actor"):
            watchdog.beat(verb)
    assert not barked.is_set() and not (tmp_path / "stacks").exists()
    assert "watchdog" not in [thread.name for thread in threading.enumerate()]


def test_a_hanging_driver_leaves_with_the_status_that_is_restarted(tmp_path):
    code = (
        "import sys, time; from verl.trainer.watchdog import Watchdog\n"
        "with Watchdog(0.2, sys.argv[1]) as watchdog:\n"
        "    watchdog.beat('update_weights'); time.sleep(600)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, timeout=PATIENCE_S)
    assert done.returncode == 75
