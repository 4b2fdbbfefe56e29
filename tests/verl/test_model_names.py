"""What a model may be called, and what is said where there is none; folders here hold the names
alone."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from verl.trainer.config import build_tokenizer
from verl.trainer.driver import has_policy_of
from verl.utils.errors import ConfigError, ModelError
from verl.utils.model_names import find_checkpoint, ready_model, run_folder_of
from verl.utils.run_folder import INDEX, complete, mark_best, name_latest, pending_folder
from verl.workers.config import ModelConfig, RolloutConfig


def save(root: Path, step: int) -> Path:
    parts = pending_folder(root, step) / "actor"
    parts.mkdir(parents=True)
    (parts / INDEX).touch()
    return complete(root, step)


def write_model(folder: Path, **origin: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").touch()
    if origin:
        (folder / "training.json").write_text(json.dumps(origin))
    return folder


@pytest.fixture
def run(tmp_path):
    """Three checkpoints: the second is the best, and one is being written."""
    root = tmp_path / "run"
    root.mkdir()
    (root / "config.yaml").touch()
    for step, value in ((10, 0.1), (20, 0.3), (30, 0.2)):
        save(root, step)
        mark_best(root, step, "val/em", value)
    (pending_folder(root, 40) / "actor").mkdir(parents=True)
    (root / "alarms" / "step_12" / "actor").mkdir(parents=True)
    (root / "alarms" / "step_12" / "actor" / INDEX).touch()
    return root


def test_checkpoints_have_names(run):
    names = {"": 30, "latest": 30, "best": 20, "global_step_10": 10, "global_step_20/": 20}
    for name, step in names.items():
        assert find_checkpoint(f"{run}/{name}") == run / f"global_step_{step}", name
        assert ready_model(f"{run}/{name}") is None
    assert find_checkpoint(str(run / "alarms/step_12")) == run / "alarms" / "step_12"
    name_latest(run, 10)  # as a roll back does
    assert find_checkpoint(str(run)) == find_checkpoint(f"{run}/latest") == run / "global_step_10"


def test_names_may_be_relative(run, monkeypatch):
    monkeypatch.chdir(run.parent)
    assert find_checkpoint("run/best") == run / "global_step_20"
    monkeypatch.chdir(run)
    assert (
        find_checkpoint("best") == run / "global_step_20"
        and find_checkpoint(".") == run / "global_step_30"
    )


def test_an_exported_checkpoint_is_ready(run):
    exported = write_model(run / "global_step_20" / "hf")
    assert ready_model(f"{run}/best") == ready_model(str(run / "global_step_20")) == str(exported)
    assert ready_model(str(run)) is None


def test_a_run_is_ready_when_its_model_is_that_of_its_newest_checkpoint(run):
    write_model(run / "hf", checkpoint="global_step_20")
    assert ready_model(str(run)) is None, "the run went on after that"
    write_model(run / "hf", checkpoint="global_step_30")
    assert ready_model(str(run)) == str(run / "hf")
    assert ready_model(f"{run}/latest") is None, "the checkpoint of that name"
    assert ready_model(str(run / "hf")) == str(run / "hf")


def test_a_run_without_checkpoints_is_its_model(tmp_path):
    (tmp_path / "config.yaml").touch()
    with pytest.raises(
        ModelError, match=r"a run folder without a checkpoint.*has no checkpoint and no hf folder"
    ):
        ready_model(str(tmp_path))
    write_model(tmp_path / "hf")
    assert ready_model(str(tmp_path)) == str(tmp_path / "hf")
    (tmp_path / "config.yaml").unlink()  # as fine-tuning leaves it
    assert ready_model(str(tmp_path)) == str(tmp_path / "hf")


def test_what_may_be_on_the_hub_is_left_to_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert ready_model("Qwen/Qwen2.5-7B") == "Qwen/Qwen2.5-7B" and ready_model("gpt2") == "gpt2"
    write_model(tmp_path / "mine")
    assert ready_model("mine") == str(tmp_path / "mine")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "run/global_step_40",
            r"global_step_40: unfinished.*run has global_step_10, .*global_step_30, best",
        ),
        ("run/global_step_40.tmp", r"global_step_40.tmp: unfinished"),
        ("run/global_step_50", r"no such checkpoint. .*run has global_step_10"),
        (
            "run/alarms",
            r"alarms: holds step_12; expected a Hugging Face folder \(with config.json\), a run "
            r"folder",
        ),
        ("broken", rf"broken/actor: has no {INDEX}, so this checkpoint is not complete"),
        ("empty", r"empty: holds nothing; expected"),
        ("file", r"file: a file; expected"),
        ("hf.tmp", r"hf.tmp: unfinished"),
    ],
)
def test_what_is_no_model_is_named(run, name, message):
    root = run.parent
    (root / "broken" / "actor").mkdir(parents=True)
    (root / "empty").mkdir()
    (root / "file").touch()
    write_model(root / "hf.tmp")
    for find in (find_checkpoint, ready_model):
        with pytest.raises(ModelError, match=message):
            find(str(root / name))


def test_a_run_that_never_validated_has_no_best(tmp_path):
    save(tmp_path, 10)
    with pytest.raises(
        ModelError,
        match=r"no best checkpoint \(best_checkpoint.json\).*best_metric.* has global_step_10",
    ):
        find_checkpoint(f"{tmp_path}/best")


def test_the_run_folder_of_a_checkpoint_holds_its_configuration(run):
    assert (
        run_folder_of(run / "alarms" / "step_12")
        == run
        == run_folder_of(run / "global_step_10" / "hf")
    )
    assert run_folder_of(run.parent / "elsewhere") is None


def test_a_training_from_a_checkpoint_is_told_to_export_it(run):
    model = ModelConfig(path=str(run))
    section = SimpleNamespace(model=model, rollout=RolloutConfig())
    config: Any = SimpleNamespace(actor_rollout_ref=section)
    with pytest.raises(
        ConfigError,
        match=r"actor_rollout_ref.model.path=.*run: a checkpoint, not a Hugging Face model",
    ):
        build_tokenizer(config)


def test_a_mistyped_folder_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "one").mkdir(parents=True)
    (tmp_path / "runs" / "one" / "config.yaml").touch()
    write_model(tmp_path / "Qwen" / "Qwen2.5-3B")
    for name in ("runs/nope", "./nope", "../nope", "/nope", "~/nope", "nowhere/at/all"):
        with pytest.raises(ModelError, match="no such folder; expected a Hugging Face folder"):
            ready_model(name)
    (tmp_path / "Qwen" / "Qwen2.5-3B" / "config.yaml").touch()
    for name in ("nobody/nope", "nope", "Qwen/Qwen2.5-7B"):
        assert ready_model(name) == name


def test_the_policy_of_a_run_is_that_of_its_newest_checkpoint(run):
    assert not has_policy_of(str(run), 30)
    write_model(run / "hf", checkpoint="global_step_30")
    assert has_policy_of(str(run), 30)
    assert not has_policy_of(str(run), 40)
    write_model(run / "hf", checkpoint="global_step_20")
    assert not has_policy_of(str(run), 30)
