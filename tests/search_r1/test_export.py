"""The command, and checkpoints where evaluation and inference expect a model."""

import os
import subprocess
import sys

import pytest
from safetensors.torch import load_file

from search_r1 import evaluate, export
from tests.models import make_tiny_qwen2
from tests.processes import PATIENCE_S
from tests.trained import make_run
from verl.utils.places import root
from verl.workers.config import ModelConfig


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with `run`, trained from `source`."""
    root = tmp_path_factory.mktemp("trained")
    make_tiny_qwen2(root / "source", layers=1, width=32, vocab=300)
    make_run(root / "run", ModelConfig(path=str(root / "source")), ranks=1)
    return root


@pytest.fixture
def run(trained, monkeypatch):
    """The run folder, seen from beside it; what a test exports is not there for the next."""
    monkeypatch.chdir(trained)
    yield trained / "run"
    for exported in trained.glob("run/*/hf"):
        for file in exported.iterdir():
            file.unlink()
        exported.rmdir()


def test_the_command_writes_a_checkpoint_by_its_name_to_a_folder(run, tmp_path, capsys):
    assert export.main(["run/best", "--out", str(tmp_path / "best")]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{tmp_path}/best\n"
    assert (
        f"{run}/global_step_1: writing its policy as a Hugging Face model to {tmp_path}/best"
        in captured.err
    )
    os.chdir(run.parent)
    assert export.main(["run"]) == 0
    assert capsys.readouterr().out == f"{run}/global_step_2/hf\n"
    best, newest, hf = (
        load_file(f / "model.safetensors")
        for f in (tmp_path / "best", run / "global_step_2/hf", run / "hf")
    )
    assert newest.keys() == hf.keys() and all((newest[name] == hf[name]).all() for name in hf)
    assert not all((best[name] == hf[name]).all() for name in hf)


def test_the_command_runs_anywhere_and_says_what_is_wrong(run):
    command = [sys.executable, "-m", "search_r1.export", "run/global_step_3"]
    env = {**os.environ, "PYTHONPATH": str(root())}
    done = subprocess.run(
        command, cwd=run.parent, env=env, capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr == (
        f"error: {run}/global_step_3: no such checkpoint. {run} has global_step_1, global_step_2, "
        "best, hf\n"
    )


def test_a_checkpoint_is_exported_once_and_then_found(run, capsys):
    first = evaluate.given_overrides("run/best", None)
    assert first[0] == f"actor_rollout_ref.model.path={run}/global_step_1/hf"
    assert "writing its policy" in capsys.readouterr().err
    os.chdir(run.parent)
    made = (run / "global_step_1/hf/model.safetensors").stat().st_mtime_ns
    assert evaluate.given_overrides("run/global_step_1", None)[0] == first[0]
    assert capsys.readouterr().err == ""
    assert (run / "global_step_1/hf/model.safetensors").stat().st_mtime_ns == made
    assert evaluate.run_name(f"{run}/global_step_1/hf") == "evaluate-run--global_step_1"
    assert evaluate.run_name(f"{run}/hf") == "evaluate-run"


def test_a_finished_run_is_its_model_and_an_endpoint_knows_names_alone(run, capsys):
    assert evaluate.given_overrides("run", None)[0] == f"actor_rollout_ref.model.path={run}/hf"
    assert (
        evaluate.given_overrides("run/best", "http://host/v1")[0]
        == "actor_rollout_ref.model.path=run/best"
    )
    assert capsys.readouterr().err == ""


def test_a_folder_that_cannot_be_written_is_named_with_the_way_out(run, monkeypatch):
    (
        run / "global_step_1" / "hf.tmp"
    ).touch()  # stands in the way, also for a user who may write everywhere
    try:
        with pytest.raises(
            SystemExit, match=r"error: .*global_step_1: no hf folder could be written.* --out DIR"
        ):
            evaluate.main(["run/best"])
    finally:
        (run / "global_step_1" / "hf.tmp").unlink()
