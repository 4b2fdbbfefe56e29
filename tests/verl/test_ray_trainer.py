"""What the trainer does at the end of a run and on an alarm, with roles and engines that only write
down."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.verl.fake_run import Run, rewind
from verl.trainer.config import KLControlConfig
from verl.trainer.ppo import ray_trainer
from verl.trainer.ppo.collapse import Alarm, CollapseWatchConfig, Signal
from verl.trainer.ppo.ray_trainer import RayPPOTrainer, TrainingCollapsed, TrainingDiverged
from verl.utils.checkpoint_storage import CheckpointError
from verl.utils.run_folder import best, steps
from verl.utils.tracking import STEP, Timers, Tracking

STATE = {"step": 4, "skipped_in_a_row": 0, "validating": True}
KL_CTRL = KLControlConfig()
SAVED = {"algorithm": {"kl_ctrl": KL_CTRL.model_dump()}}
ALARM = Alarm(4, (Signal("entropy", 3, 0.1, 1.0, "fell"),))


@pytest.fixture
def trainer(tmp_path, monkeypatch):
    """After step 4, with a validation that always finds em 0.5."""
    monkeypatch.setattr(ray_trainer.validation, "score", lambda *_: ({"em": 0.5}, []))
    made = RayPPOTrainer.__new__(RayPPOTrainer)
    watch = CollapseWatchConfig()
    made.config = SimpleNamespace(trainer=SimpleNamespace(val_only=False, collapse_watch=watch))
    made.timers = Timers()
    made.tracking = Tracking(str(tmp_path), [], "project", "run", {}, {})
    made.run = Run(tmp_path)
    made.checkpoints = made.run.checkpoints
    made.rollout = SimpleNamespace()
    made.val_rollout = SimpleNamespace(collect=lambda batch: ([], []))
    made.stop = SimpleNamespace(requested=0)
    made.agent = made.tokenizer = made.validating = None
    made.state_dict = lambda: {"step": made.step}
    made.step = 4
    made.metrics = {}
    return made


def lines(folder: Path) -> list[dict]:
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_a_validation_that_outlives_the_last_step_is_written(trainer, tmp_path):
    trainer.save_checkpoint()
    trainer.validating = (4, "under way")
    trainer.finish()
    assert lines(tmp_path) == [{STEP: 4, "em": 0.5}]
    assert best(tmp_path) == {"step": 4, "metric": "em", "value": 0.5}


def test_a_stop_leaves_the_validation_to_the_resumed_run(trainer, tmp_path):
    trainer.validating = (4, "under way")
    trainer.stop.requested = 15
    trainer.finish()
    assert lines(tmp_path) == [] and steps(tmp_path) == [4]


def test_a_validation_goes_into_the_line_of_its_step_while_that_is_not_written(trainer, tmp_path):
    trainer.metrics = {"loss": 1.0}
    trainer.validating = (4, "of this step")
    trainer.finish_validation()
    assert trainer.metrics == {"loss": 1.0, "em": 0.5} and lines(tmp_path) == []
    trainer.validating = (3, "of the step before")
    trainer.finish_validation()
    assert lines(tmp_path) == [{STEP: 3, "em": 0.5}]


def test_a_checkpoint_waits_for_a_validation_of_weights_that_it_does_not_hold(trainer, tmp_path):
    trainer.validating = (3, "under way")
    trainer.save_checkpoint()
    assert lines(tmp_path) == [{STEP: 3, "em": 0.5}] and trainer.validating is None
    trainer.validating = (4, "under way")
    trainer.save_checkpoint()
    assert trainer.validating is not None


@pytest.mark.parametrize("written", [False, True])
def test_a_resumed_run_repeats_a_validation_unless_it_was_written(trainer, tmp_path, written):
    trainer.state_dict = lambda: {
        "sampler": {},
        "kl": 0.0,
        "watch": {},
        "version": 4,
        "config": SAVED,
        **STATE,
    }
    trainer.save_checkpoint()
    trainer.checkpoints.complete()
    if written:
        trainer.tracking.log({"val/em": 0.5, "val/odd": float("nan")}, 4)
    trainer.tracking.log({"loss": 1.0}, 4)
    trainer.ahead = trainer.collapse_watch = SimpleNamespace(load_state_dict=lambda state: None)
    trainer.kl_ctrl = SimpleNamespace()
    trainer.config.algorithm = SimpleNamespace(kl_ctrl=KL_CTRL)
    trainer.load_checkpoint(4)
    assert trainer.validating_again is not written


def test_a_step_whose_alarm_is_to_be_answered_is_not_saved(trainer, tmp_path):
    for response, saved in (("stop", []), ("roll_back", []), ("continue", [4])):
        trainer.config.trainer.collapse_watch = CollapseWatchConfig(response=response)
        trainer.save_checkpoint(ALARM)
        trainer.checkpoints.complete()
        assert steps(tmp_path) == saved


def test_skipped_steps_of_either_role_count_and_only_in_a_row(trainer):
    trainer.skipped_in_a_row = 0
    trainer.config.trainer.max_skipped_steps = 2
    for role, skipped in (("actor", 1.0), ("actor", 0.0), ("critic", 2.0)):
        trainer.metrics = {f"{role}/skipped_steps": skipped}
        trainer.check_finite()
    trainer.metrics = {"actor/skipped_steps": 0.0, "critic/skipped_steps": 1.0}
    with pytest.raises(TrainingDiverged, match="2 training steps in a row"):
        trainer.check_finite()


def test_the_last_checkpoint_is_written_once_and_again_if_it_failed(trainer, tmp_path):
    trainer.save_checkpoint()
    trainer.finish()
    assert trainer.run.actor.calls.count("save") == 1 and steps(tmp_path) == [4]
    trainer.step = 5
    trainer.run.actor.finishes_badly = True
    trainer.save_checkpoint()
    trainer.checkpoints.complete()
    trainer.run.actor.finishes_badly = False
    trainer.finish()
    assert steps(tmp_path) == [4, 5] and trainer.run.actor.calls.count("save") == 3


def test_a_run_whose_last_checkpoint_cannot_be_written_does_not_end_well(trainer):
    trainer.run.actor.fails = True
    with pytest.raises(CheckpointError, match="no room"):
        trainer.finish()


def test_an_alarm_whose_state_cannot_be_written_is_answered_all_the_same(trainer, tmp_path):
    trainer.run.critic.fails = True
    trainer.respond(ALARM)
    assert not (tmp_path / "alarms/step_4/alarm.txt").exists()
    trainer.run.critic.fails = False
    trainer.respond(ALARM)
    assert "entropy moved first" in (tmp_path / "alarms/step_4/alarm.txt").read_text()


def test_roll_backs_end_with_the_run_also_when_fewer_are_allowed_than_there_were(trainer):
    trainer.run.save(1, 2, 3)
    for _ in range(2):
        assert rewind(trainer.checkpoints, 4, 3, 0.5) == 2
    watch = CollapseWatchConfig(response="roll_back", max_roll_backs=1)
    trainer.config.trainer.collapse_watch = watch
    with pytest.raises(TrainingCollapsed, match="after 2 roll-backs"):
        trainer.respond(ALARM)


def test_a_roll_back_goes_on_from_a_healthy_checkpoint(trainer, tmp_path):
    trainer.run.save(1, 2, 3)
    trainer.checkpoints.suspect_from = 3
    trainer.validating = (4, "under way")
    done = []
    trainer.sleep = lambda: done.append("sleep")
    trainer.load_checkpoint = lambda step: done.append(f"load {step}")
    trainer.sync_weights = lambda: done.append("sync")
    trainer.roll_back(ALARM, tmp_path / "alarms")
    assert done == ["sleep", "load 2", "sync"] and trainer.validating is None
