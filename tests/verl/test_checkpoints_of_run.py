"""The driver's side of checkpoints, with roles that only write down what they are asked: failures,
best, roll-backs."""

import json

import pytest

from tests.processes import file_limit
from tests.verl.fake_run import Run, rewind
from verl.utils import run_folder
from verl.utils.checkpoint_storage import CheckpointError
from verl.utils.run_folder import best, find_latest, steps


def test_a_checkpoint_counts_when_it_is_complete(tmp_path):
    run = Run(tmp_path)
    run.checkpoints.save(1, {"step": 1})
    assert find_latest(tmp_path) is None and run.checkpoints.newest == 0
    run.checkpoints.complete()
    assert find_latest(tmp_path) == tmp_path / "global_step_1" and run.checkpoints.newest == 1
    assert run.checkpoints.load(1)["step"] == 1 and run.actor.lr == run.critic.lr == 1
    Run(tmp_path, async_save=False).save(2)
    assert find_latest(tmp_path) == tmp_path / "global_step_2"


@pytest.mark.parametrize("trouble", ["fails", "finishes_badly"])
def test_a_failure_waits_for_the_other_writers_and_keeps_the_one_before(tmp_path, trouble):
    run = Run(tmp_path).save(1)
    run.actor.calls.clear(), run.critic.calls.clear()
    setattr(run.critic if trouble == "fails" else run.actor, trouble, True)
    run.save(2)
    assert run.actor.calls == ["save", "finish"] and run.critic.calls == ["save", "finish"]
    assert (
        steps(tmp_path) == [1]
        and run.checkpoints.newest == 1
        and not (tmp_path / "global_step_2.tmp").exists()
    )
    assert "step 2 FAILED" in run.said[0] and "no room at the" in run.said[0]
    setattr(run.critic if trouble == "fails" else run.actor, trouble, False)
    assert find_latest(tmp_path) == tmp_path / "global_step_1"
    run.save(3).checkpoints.complete(must_succeed=True)
    assert steps(tmp_path) == [1, 3] and len(run.said) == 1


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("trouble", ["fails", "finishes_badly"])
def test_the_last_checkpoint_must_succeed(tmp_path, trouble, asynchronous):
    run = Run(tmp_path, async_save=asynchronous)
    setattr(run.actor, trouble, True)
    run.checkpoints.save(5, {})
    with pytest.raises(CheckpointError, match="no room"):
        run.checkpoints.complete(must_succeed=True)
    assert "step 5 FAILED" in run.said[0]


def test_a_full_disk_under_the_drivers_state_costs_one_checkpoint(tmp_path):
    run = Run(tmp_path).save(1)
    with file_limit(1000):
        run.checkpoints.save(2, {"history": [0.5] * 1000})
    assert "step 2 FAILED" in run.said[0] and steps(tmp_path) == [1]
    assert run.save(3).checkpoints.load(3)["step"] == 3


def test_the_best_needs_a_score_and_a_whole_checkpoint_in_any_order(tmp_path):
    run = Run(tmp_path, max_ckpt_to_keep=1)
    run.checkpoints.save(1, {})
    run.checkpoints.score(1, {"em": 0.5})
    assert best(tmp_path) is None, "not whole yet"
    run.checkpoints.complete()
    assert best(tmp_path) == {"step": 1, "metric": "em", "value": 0.5}
    run.save(2)
    run.checkpoints.score(2, {"other": 0.9})
    assert best(tmp_path)["step"] == 1
    run.checkpoints.score(2, {"em": 0.75})
    assert best(tmp_path)["step"] == 2
    run.save(3, 4)
    assert steps(tmp_path) == [2, 4]


def test_a_checkpoint_is_kept_until_its_score_has_come(tmp_path):
    run = Run(tmp_path, max_ckpt_to_keep=1).save(1)
    run.checkpoints.score(1, {"em": 0.5})
    run.checkpoints.await_score(2)
    run.save(2, 3)
    assert steps(tmp_path) == [1, 2, 3]
    run.checkpoints.score(2, {"em": 0.75})
    run.save(4)
    assert steps(tmp_path) == [2, 4] and best(tmp_path)["step"] == 2


def test_old_checkpoints_that_cannot_be_deleted_stop_nothing(tmp_path, monkeypatch):
    def busy(*_):
        raise OSError("device busy")

    monkeypatch.setattr(run_folder, "delete_folder", busy)
    run = Run(tmp_path, max_ckpt_to_keep=1).save(1, 2)
    assert (
        run.said == ["old checkpoints could not be deleted: device busy"]
        and run.checkpoints.newest == 2
    )


def test_a_best_checkpoint_that_is_replaced_loses_its_value(tmp_path):
    run = Run(tmp_path).save(1, 2)
    run.checkpoints.score(2, {"em": 0.9})
    assert rewind(run.checkpoints, 3, 2, 0.5) == 1
    assert best(tmp_path)["value"] == 0.9
    run.save(2)
    assert best(tmp_path) is None, "the score was of weights that are gone"
    run.checkpoints.score(2, {"em": 0.25})
    assert best(tmp_path) == {"step": 2, "metric": "em", "value": 0.25}


@pytest.mark.parametrize("crash", [False, True], ids=["same driver", "new driver"])
def test_a_roll_back_lowers_learning_rates_once(tmp_path, crash):
    """The learning rate after each load and in what is saved then: 1, 1/2 after one roll-back, 1/4
    after two."""

    def again(run: Run) -> Run:
        return Run(tmp_path) if crash else run

    run = Run(tmp_path).save(10, 20, 30)
    assert rewind(run.checkpoints, 35, 33, 0.5) == 30
    for _ in range(2):
        run = again(run)
        run.checkpoints.load(30)
        assert run.actor.lr == run.critic.lr == 0.5
    assert rewind(run.checkpoints, 38, 20, 0.5) == 10
    run = again(run)
    run.checkpoints.load(10)
    assert run.actor.lr == 0.25
    run.save(20)
    run = again(run)
    run.checkpoints.load(20)
    assert run.actor.lr == 0.25, "both roll-backs are in that checkpoint already"
    assert [entry["to"] for entry in json.loads((tmp_path / "roll_backs.json").read_text())] == [
        30,
        10,
    ]


def test_no_roll_back_to_what_an_earlier_one_gave_up(tmp_path):
    run = Run(tmp_path).save(10, 17)  # 17: of a request to stop, not a multiple of save_freq
    assert rewind(run.checkpoints, 19, 16, 0.5) == 10
    assert find_latest(tmp_path) == tmp_path / "global_step_10"
    assert rewind(run.checkpoints, 19, 19, 0.5) == 10
    run.save(18)
    assert rewind(run.checkpoints, 25, 20, 0.5) == 18
    assert rewind(run.checkpoints, 12, 10, 0.5) is None


def test_the_checkpoint_to_roll_back_to_is_kept(tmp_path):
    run = Run(tmp_path, max_ckpt_to_keep=1)
    assert run.save(1, 2).checkpoints.rewind(3, 0.5) is None, "nothing is suspected"
    run.checkpoints.suspect(3)
    run.save(3, 4)
    assert steps(tmp_path) == [2, 4]
    run.checkpoints.suspect(5)
    run.save(5)
    assert steps(tmp_path) == [4, 5] and run.checkpoints.rewind(6, 0.5) == 4
