"""Bookkeeping of checkpoints: what is complete, newest, best; what a crash at any point leaves
behind."""

import json
import logging
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from verl.utils import run_folder
from verl.utils.errors import ConfigError, DataError
from verl.utils.run_folder import (
    best,
    claim,
    complete,
    discard,
    find_latest,
    held,
    in_use,
    mark_best,
    name_latest,
    pending_folder,
    prune,
    remove_leftovers,
    replace_folder,
    steps,
)


def write(root: Path, step: int, text: str = "weights") -> None:
    folder = pending_folder(root, step) / "actor"
    folder.mkdir(parents=True)
    (folder / "0.distcp").write_text(text)


def saved(root: Path, *numbers: int) -> Path:
    for step in numbers:
        write(root, step)
        complete(root, step)
    return root


def test_a_checkpoint_counts_once_it_is_complete(tmp_path):
    assert find_latest(tmp_path) is None and steps(tmp_path) == []
    write(tmp_path, 3)
    assert find_latest(tmp_path) is None and steps(tmp_path) == []
    assert complete(tmp_path, 3) == find_latest(tmp_path) == tmp_path / "global_step_3"
    write(tmp_path, 6)
    discard(tmp_path, 6)
    discard(tmp_path, 6)
    assert find_latest(tmp_path) == tmp_path / "global_step_3"
    with pytest.raises(FileNotFoundError, match=r"global_step_9\.tmp"):
        complete(tmp_path, 9)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "global_step_3",
        "latest_checkpointed_iteration.txt",
    ]


def test_a_step_reached_again_replaces_its_checkpoint(tmp_path):
    saved(tmp_path, 5)
    write(tmp_path, 5, "second")
    complete(tmp_path, 5)
    assert (tmp_path / "global_step_5/actor/0.distcp").read_text() == "second"
    assert steps(tmp_path) == [5] and remove_leftovers(tmp_path) == []


def test_steps_are_ordered_as_numbers(tmp_path):
    saved(tmp_path, 9, 100, 20)
    (tmp_path / "global_step_x").mkdir()
    (tmp_path / "global_step_7").write_text("a file")
    assert steps(tmp_path) == [9, 20, 100]


def test_leftovers_of_a_crash_are_removed(tmp_path):
    saved(tmp_path, 1)
    write(tmp_path, 2)
    (tmp_path / "hf.tmp").mkdir()
    (tmp_path / "notes.tmp").write_text("not a folder")
    assert remove_leftovers(tmp_path) == ["global_step_2.tmp", "hf.tmp"]
    assert find_latest(tmp_path) == tmp_path / "global_step_1" and (tmp_path / "notes.tmp").exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [("20", 20), ("25", 20), ("5", 30), ("garbage", 30), ("", 30), (None, 30)],
)
def test_a_wrong_marker_is_told_and_the_newest_folder_taken(tmp_path, caplog, text, expected):
    saved(tmp_path, 10, 20, 30)
    marker = tmp_path / "latest_checkpointed_iteration.txt"
    marker.unlink() if text is None else marker.write_text(text)
    assert find_latest(tmp_path) == tmp_path / f"global_step_{expected}"
    assert bool(caplog.records) == (text != "20")
    assert all(str(marker) in r.message and r.levelno == logging.WARNING for r in caplog.records)


def test_a_marker_without_any_checkpoint_is_told(tmp_path, caplog):
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("4")
    assert find_latest(tmp_path) is None and "starting afresh" in caplog.text


def test_the_best_is_the_highest_of_one_metric(tmp_path):
    saved(tmp_path, 1, 2, 3)
    assert best(tmp_path) is None
    assert not mark_best(tmp_path, 1, "em", float("nan"))
    assert mark_best(tmp_path, 1, "em", -1.5)
    assert mark_best(tmp_path, 2, "em", 0.5) and not mark_best(tmp_path, 3, "em", 0.5)
    assert json.loads((tmp_path / "best_checkpoint.json").read_text()) == {
        "step": 2,
        "metric": "em",
        "value": 0.5,
    }
    assert mark_best(tmp_path, 3, "f1", 0.1) and best(tmp_path)["step"] == 3  # pyright: ignore
    with pytest.raises(FileNotFoundError, match="global_step_4"):
        mark_best(tmp_path, 4, "f1", 0.9)


def test_pruning_spares_newest_best_and_protected(tmp_path):
    saved(tmp_path, 1, 2, 3, 4, 5, 6)
    mark_best(tmp_path, 2, "em", 0.5)
    assert prune(tmp_path, None) == [] and prune(tmp_path, 6) == []
    assert prune(tmp_path, 2, protected=[3]) == [1, 4] and steps(tmp_path) == [2, 3, 5, 6]
    name_latest(tmp_path, 3)  # rolled back: 5 and 6 were given up and count no longer
    assert prune(tmp_path, 1) == [] and steps(tmp_path) == [2, 3, 5, 6]
    assert find_latest(tmp_path) == tmp_path / "global_step_3"
    write(tmp_path, 4)
    complete(tmp_path, 4)
    assert prune(tmp_path, 1) == [3] and steps(tmp_path) == [2, 4, 5, 6]


def test_results_of_something_else_are_not_added_to(tmp_path):
    path = tmp_path / "run" / "made_of.json"
    claim(path, {"model": "a", "topk": (1, 2)}, "evaluation")
    claim(path, {"model": "a", "topk": (1, 2)}, "evaluation")
    with pytest.raises(
        DataError, match=r"made_of.json: .* of another evaluation \(not the same: topk, reward\)"
    ):
        claim(path, {"model": "a", "topk": (1, 3), "reward": "f1"}, "evaluation")
    assert json.loads(path.read_text()) == {"model": "a", "topk": [1, 2]}


class Killed(BaseException):
    pass


@pytest.mark.parametrize("after", range(4))
def test_a_kill_between_any_two_operations_leaves_a_checkpoint(tmp_path, monkeypatch, after):
    """Replacing step 2, then pruning: the process dies before its `after`th rename or deletion."""
    saved(tmp_path, 1, 2)
    write(tmp_path, 2, "second")
    left = [after]

    def mortal(fn):
        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return fn(*args, **kwargs)

        return call

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(run_folder.os, "rename", mortal(run_folder.os.rename))
        patch.setattr(run_folder.os, "replace", mortal(run_folder.os.replace))
        complete(tmp_path, 2)
        prune(tmp_path, 1)
        raise AssertionError("survived")
    remove_leftovers(tmp_path)
    found = find_latest(tmp_path)
    assert found is not None and (found / "actor/0.distcp").is_file()
    assert found.name == ("global_step_1" if after == 1 else "global_step_2")
    assert all(
        (run_folder.folder_of(tmp_path, s) / "actor/0.distcp").is_file() for s in steps(tmp_path)
    )


def test_an_export_replaces_weights_and_keeps_other_files(tmp_path):
    for name, files in {
        "hf": ["model-1-of-2.safetensors", "notes.md", "config.json"],
        "hf.tmp": ["config.json"],
    }.items():
        (tmp_path / name).mkdir()
        for file in files:
            (tmp_path / name / file).write_text(name)
    replace_folder(tmp_path / "hf.tmp", tmp_path / "hf", carry_over=True)
    assert {p.name: p.read_text() for p in (tmp_path / "hf").iterdir()} == {
        "notes.md": "hf",
        "config.json": "hf.tmp",
    }
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


ROOT = Path(__file__).parents[2]
HOLDS = """
import sys, time
from verl.utils.run_folder import held
with held(sys.argv[1]):
    print("held", flush=True)
    time.sleep(3600)
"""


def test_a_run_folder_has_one_run_and_whoever_is_killed_lets_go_of_it(tmp_path):
    command = [sys.executable, "-c", HOLDS, str(tmp_path / "run")]
    other = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    try:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        refused = pytest.raises(
            ConfigError, match=r"default_local_dir=.*run: another run is using this folder"
        )
        with refused, held(tmp_path / "run", patience_s=0):
            pass
    finally:
        other.kill()
        other.wait()
    for _ in range(2):
        with held(tmp_path / "run", patience_s=0):
            pass


def test_a_run_that_is_just_ending_is_waited_for(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    with ExitStack() as ending:
        ending.enter_context(held(tmp_path))

        def sleep(seconds: float) -> None:
            if seconds > 0.1:  # it was told before
                ending.close()

        monkeypatch.setattr(run_folder.time, "sleep", sleep)
        with held(tmp_path):
            assert "waiting up to 60 s for its end" in caplog.text


def test_a_file_system_without_locks_is_told_and_used(tmp_path, monkeypatch, caplog):
    def unsupported(descriptor, operation):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(run_folder.fcntl, "flock", unsupported)
    with held(tmp_path):
        assert "start no second run in it" in caplog.text


def test_a_folder_is_in_use_while_a_run_holds_it(tmp_path):
    assert not in_use(tmp_path / "nowhere")
    with held(tmp_path):
        assert in_use(tmp_path)
    assert not in_use(tmp_path)
    assert not in_use(tmp_path)  # to ask leaves no lock behind


def test_a_run_that_takes_the_folder_removes_how_the_one_before_ended(tmp_path):
    (tmp_path / run_folder.ENDED).write_text("{}")
    with held(tmp_path):
        assert not (tmp_path / run_folder.ENDED).exists()
