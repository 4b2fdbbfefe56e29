"""What the trainer does at the end of a run and on an alarm.

Its roles and engines only write down what they are asked.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.configs import composed
from tests.verl.fake_roles import SMALL, Questions, make_processes
from tests.verl.fake_run import Run, rewind
from verl.trainer.config import validate
from verl.trainer.ppo.collapse import Alarm, Signal
from verl.trainer.ppo.ray_trainer import RayPPOTrainer, TrainingCollapsed, TrainingDiverged
from verl.trainer.preparation import Task
from verl.utils.checkpoint_storage import CheckpointError
from verl.utils.run_folder import best, steps
from verl.utils.tracking import STEP, Timers, Tracking

ALARM = Alarm(4, (Signal("entropy", 3, 0.1, 1.0, "fell"),))
WATCH = "trainer.collapse_watch"


@pytest.fixture
def make_trainer(tmp_path, monkeypatch):
    """Makes trainers after step 4, with a validation that always finds em 0.5."""
    monkeypatch.setattr("verl.trainer.ppo.validation.score", lambda *_: ({"em": 0.5}, []))

    def make(*overrides: str) -> RayPPOTrainer:
        folder = f"trainer.default_local_dir={tmp_path}"
        quick = ["trainer.best_metric=em", "trainer.save_freq=1", "trainer.max_ckpt_to_keep=null"]
        config = validate(composed("ppo", *SMALL, *quick, folder, *overrides))
        run = Run(tmp_path)
        processes = make_processes(config)
        processes.roles = {"actor": run.actor, "critic": run.critic}
        tracking = Tracking(str(tmp_path), [], "project", "run", {}, {})
        task = Task(SimpleNamespace(pad_token_id=0), SimpleNamespace(), None)
        stop = SimpleNamespace(requested=0)
        made = RayPPOTrainer(
            config, task, Questions(), Questions(), processes, tracking, Timers(), stop
        )
        run.checkpoints = made.checkpoints
        made.run = run
        made.step = 4
        return made

    return make


@pytest.fixture
def trainer(make_trainer):
    return make_trainer()


def lines(folder: Path) -> list[dict]:
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_a_validation_that_outlives_the_last_step_is_written(trainer, tmp_path):
    trainer.save_checkpoint()
    trainer.validator.start(4)
    trainer.finish()
    assert lines(tmp_path) == [{STEP: 4, "em": 0.5}]
    assert best(tmp_path) == {"step": 4, "metric": "em", "value": 0.5}


def test_a_stop_leaves_the_validation_to_the_resumed_run(trainer, tmp_path):
    trainer.validator.start(4)
    trainer.stop.requested = 15
    trainer.finish()
    assert lines(tmp_path) == [] and steps(tmp_path) == [4]


def test_a_validation_goes_into_the_line_of_its_step_while_that_is_not_written(trainer, tmp_path):
    trainer.validator.start(4)
    assert trainer.finish_validation() == {"em": 0.5} and lines(tmp_path) == []
    trainer.validator.start(3)
    assert trainer.finish_validation() == {}
    assert lines(tmp_path) == [{STEP: 3, "em": 0.5}]


def test_a_checkpoint_waits_for_a_validation_of_weights_that_it_does_not_hold(trainer, tmp_path):
    trainer.validator.start(3)
    trainer.save_checkpoint()
    assert lines(tmp_path) == [{STEP: 3, "em": 0.5}] and trainer.validator.step is None
    trainer.validator.start(4)
    trainer.save_checkpoint()
    assert trainer.validator.step == 4


@pytest.mark.parametrize("written", [False, True])
def test_a_resumed_run_repeats_a_validation_unless_it_was_written(make_trainer, tmp_path, written):
    before = make_trainer()
    before.validator.start(4)
    before.save_checkpoint()
    before.checkpoints.complete()
    if written:
        before.tracking.log({"val/em": 0.5, "val/odd": float("nan")}, 4)
    before.tracking.log({"loss": 1.0}, 4)
    resumed = make_trainer()
    resumed.load_checkpoint(4)
    assert resumed.validates_again is not written


def test_a_step_whose_alarm_is_to_be_answered_is_not_saved(make_trainer, tmp_path):
    for response, saved in (("stop", []), ("roll_back", []), ("continue", [4])):
        trainer = make_trainer(f"{WATCH}.response={response}")
        trainer.save_checkpoint(ALARM)
        trainer.checkpoints.complete()
        assert steps(tmp_path) == saved


def test_skipped_steps_of_either_role_count_and_only_in_a_row(make_trainer):
    trainer = make_trainer("trainer.max_skipped_steps=2")
    for role, skipped in (("actor", 1.0), ("actor", 0.0), ("critic", 2.0)):
        trainer.check_finite({f"{role}/skipped_steps": skipped})
    with pytest.raises(TrainingDiverged, match="2 training steps in a row"):
        trainer.check_finite({"actor/skipped_steps": 0.0, "critic/skipped_steps": 1.0})


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


def test_roll_backs_end_with_the_run_also_when_fewer_are_allowed_than_there_were(make_trainer):
    trainer = make_trainer(f"{WATCH}.response=roll_back", f"{WATCH}.max_roll_backs=1")
    trainer.run.save(1, 2, 3)
    for _ in range(2):
        assert rewind(trainer.checkpoints, 4, 3, 0.5) == 2
    with pytest.raises(TrainingCollapsed, match="after 2 roll-backs"):
        trainer.respond(ALARM)


def test_a_roll_back_goes_on_from_a_healthy_checkpoint(make_trainer):
    trainer = make_trainer(f"{WATCH}.response=roll_back")
    trainer.run.save(1, 2, 3)
    trainer.checkpoints.suspect(3)
    trainer.validator.start(4)
    done = []
    trainer.sleep = lambda: done.append("sleep")
    trainer.load_checkpoint = lambda step: done.append(f"load {step}")
    trainer.sync_weights = lambda: done.append("sync")
    trainer.respond(ALARM)
    assert done == ["sleep", "load 2", "sync"] and trainer.validator.step is None
