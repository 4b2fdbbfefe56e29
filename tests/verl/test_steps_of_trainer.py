"""The order of a training step and what each verb is given, over roles and engines that write down
what they are asked.

The configuration, the batches and everything that the driver computes are real.
"""

import itertools
from types import SimpleNamespace

import pytest
import torch

from tests.configs import composed
from tests.verl.fake_roles import GROUP, PROMPTS, ROWS, SMALL, make_processes, trainer_over
from verl.trainer.config import validate
from verl.trainer.ppo import ray_trainer
from verl.trainer.ppo.batch_source import NothingToLearn
from verl.trainer.ppo.ray_trainer import RayPPOTrainer
from verl.utils.errors import RewardError


@pytest.fixture(autouse=True)
def validation(monkeypatch):
    """Finds the same whatever it is given."""
    found = {"val/test_score/all": 0.5}
    monkeypatch.setattr("verl.trainer.ppo.validation.score", lambda *_: (dict(found), []))


def make_trainer(
    folder, algorithm: str, *overrides: str, scores: dict | None = None
) -> RayPPOTrainer:
    """A trainer whose `said` is what its roles and engines were asked, in that order."""
    config = validate(
        composed(algorithm, *SMALL, f"trainer.default_local_dir={folder}", *overrides)
    )
    processes = make_processes(config, scores)
    made = trainer_over(config, processes)
    made.said = processes.said
    return made


def verbs(trainer: RayPPOTrainer) -> list[str]:
    """What was asked for, in its order; validations have a test of their own."""
    return [event[0] for event in trainer.said if event[0] != "submit validation"]


def test_a_step_of_ppo_in_its_order(tmp_path):
    trainer = make_trainer(tmp_path, "ppo", "trainer.total_training_steps=2")
    trainer.fit()
    step = [
        "submit rollout",
        "collect",
        "sleep",
        "old_log_probs",
        "ref_log_prob",
        "values",
        "update critic",
        "update actor",
        "update_weights",
    ]
    assert verbs(trainer) == ["update_weights", *step, *step]
    assert [event[1] for event in trainer.said if event[0] == "update_weights"] == [0, 1, 2]
    assert [event[1:] for event in trainer.said if event[0] == "submit rollout"] == [
        ((0, 1), 0),
        ((2, 3), 1),
    ]


def test_a_step_of_grpo_has_neither_critic_nor_values(tmp_path):
    trainer = make_trainer(tmp_path, "grpo", "trainer.total_training_steps=1")
    trainer.fit()
    assert verbs(trainer)[3:] == [
        "sleep",
        "old_log_probs",
        "ref_log_prob",
        "update actor",
        "update_weights",
    ]


def test_a_teacher_is_asked_about_the_batch_and_moves_its_advantages_alone(tmp_path):
    """The teacher stands at -1.5 and the policy at -1: each token loses half of the weight."""
    steps = ["trainer.total_training_steps=1", "actor_rollout_ref.actor.use_kl_loss=false"]
    plain = make_trainer(tmp_path / "plain", "grpo", *steps)
    plain.fit()
    taught = make_trainer(tmp_path / "taught", "grpo", "teacher.weight=0.2", *steps)
    taught.fit()
    assert verbs(taught)[3:6] == ["sleep", "old_log_probs", "ref_log_prob"]
    (before,) = (batch.batch for batch in plain.actor.batches)
    (after,) = (batch.batch for batch in taught.actor.batches)
    lost = before["advantages"] - after["advantages"]
    assert torch.allclose(lost, 0.1 * before["response_mask"])
    assert torch.equal(after["returns"], before["returns"])
    assert taught.logged[-1]["teacher/reverse_kl"] == pytest.approx(0.5)


def test_the_gain_of_information_is_paid_before_the_batch_is_made(tmp_path):
    """Log-probs are asked for once more, for the answers, once the engines sleep."""
    weight = "algorithm.information_gain.weight=0.5"
    trainer = make_trainer(tmp_path, "grpo", weight, "trainer.total_training_steps=1")
    trainer.fit()
    assert verbs(trainer)[2:6] == ["collect", "sleep", "old_log_probs", "old_log_probs"]
    (line,) = trainer.logged
    assert line["reward/information_gain"] == 0.0, "a trajectory of one turn has none"
    assert line["information_gain/contexts"] == PROMPTS


def test_only_the_critic_learns_up_to_the_last_step_of_its_warm_up(tmp_path):
    trainer = make_trainer(tmp_path, "ppo", "trainer.critic_warmup=2")
    trainer.fit()
    updates = [verb for verb in verbs(trainer) if verb.startswith("update ")]
    assert updates == ["update critic", "update critic", "update critic", "update actor"]


def test_the_kl_is_in_the_rewards_before_advantages_are_made_of_them(tmp_path):
    """Token KL of k1 is .5: four tokens make 2 less of a reward, and the returns show it."""
    weight = "algorithm.kl_ctrl.kl_coef=0.1"
    trainer = make_trainer(tmp_path, "ppo", weight, "trainer.total_training_steps=1")
    trainer.fit()
    (batch,) = trainer.critic.batches
    scores = batch.batch["token_level_scores"].sum(1)
    assert torch.allclose(batch.batch["token_level_rewards"].sum(1), scores - 4 * 0.05)
    assert torch.allclose(batch.batch["returns"][:, 0], scores - 4 * 0.05)
    assert torch.allclose(batch.batch["returns"][:, 3], scores - 0.05)


def test_the_adaptive_coefficient_moves_by_the_trajectories_of_each_step(tmp_path):
    """KL .5 is far above its target: the coefficient rises by 20 % of 8 of 100 trajectories, once a
    step."""
    control = ["type=adaptive", "kl_coef=0.1", "target_kl=0.1", "horizon=100"]
    trainer = make_trainer(
        tmp_path, "ppo", *[f"algorithm.kl_ctrl.{setting}" for setting in control]
    )
    trainer.fit()
    growth = 1 + 0.2 * PROMPTS * GROUP / 100
    assert [line["critic/kl"] for line in trainer.logged] == pytest.approx([0.5] * 3)
    assert [line["critic/kl_coeff"] for line in trainer.logged] == pytest.approx(
        [0.1, 0.1 * growth, 0.1 * growth**2]
    )
    assert trainer.state_dict()["kl"] == pytest.approx(0.1 * growth**3)


@pytest.mark.parametrize("partial", [True, False])
def test_trajectories_under_way_settle_before_the_weights_change_unless_they_may(tmp_path, partial):
    stale = ["async_training.max_staleness=1", "algorithm.rollout_correction.rollout_is=token"]
    trainer = make_trainer(tmp_path, "grpo", *stale, f"async_training.partial_rollout={partial}")
    trainer.fit()
    events = [
        event[0]
        for event in trainer.said
        if event[0] in ("drain", "update_weights", "submit rollout")
    ]
    settles = [] if partial else ["drain"]
    under_way = ["submit rollout", "submit rollout"]
    expected = [
        *settles,
        "update_weights",
        *under_way,
        *settles,
        "update_weights",
        "submit rollout",
    ]
    assert events[: len(expected)] == expected
    # An engine that is replaced while others settle takes the new weights, so the version rises
    # first.
    drained = (
        [] if partial else [("drain", 0, 0), ("drain", 1, 1), ("drain", 1, 2), ("drain", 0, 3)]
    )
    assert [event for event in trainer.said if event[0] == "drain"] == drained


def test_dynamic_sampling_keeps_the_first_groups_that_differ_and_counts_everything(tmp_path):
    """Prompt 0 teaches nothing, prompt 4 fails once: the step trains on 1 and 2, and tells of all
    four prompts."""
    scores = {
        0: [1.0] * 4,
        1: [0.0, 1.0, 0.0, 1.0],
        2: [0.0, 1.0, None, 1.0],
        3: [0.0, 0.0, 0.0, 1.0],
    }
    sampling = ["algorithm.filter_groups.enable=true", "trainer.max_failed_share=0.5"]
    trainer = make_trainer(
        tmp_path, "grpo", *sampling, "trainer.total_training_steps=1", scores=scores
    )
    trainer.fit()
    (batch,) = trainer.actor.batches
    assert sorted(batch.batch["prompts"].flatten().tolist()) == [2] * 4 + [3] * 3
    (line,) = trainer.logged
    assert line["training/num_gen_batches"] == 2 and line["training/num_trajectories"] == 15
    assert line["rollout/failed"] == 1 and line["rollout/failed_share"] == 1 / 16


@pytest.mark.parametrize("most", [1, 2, 3])
def test_dynamic_sampling_ends_after_its_largest_number_of_batches(tmp_path, most):
    alike = {number: [1.0] * 4 for number in range(ROWS)}
    settings = [
        "algorithm.filter_groups.enable=true",
        f"algorithm.filter_groups.max_num_gen_batches={most}",
    ]
    trainer = make_trainer(tmp_path, "grpo", *settings, scores=alike)
    with pytest.raises(
        NothingToLearn,
        match=f"none of {most * PROMPTS * GROUP} trajectories is in a group that differs",
    ):
        trainer.fit()
    assert verbs(trainer).count("collect") == most


def test_questions_that_are_always_or_never_solved_rest_and_are_counted(tmp_path):
    """Six questions, two a step. 0 is always solved, 3 never; a step that fails is no verdict."""
    mixed = [0.0, 1.0, 0.0, 1.0]
    scores = dict.fromkeys(range(ROWS), mixed) | {0: [1.0] * 4, 3: [0.0] * 4}
    settings = [
        "data.gate.rest_solved=2",
        "data.gate.rest_unsolved=1",
        "trainer.total_training_steps=8",
    ]
    trainer = make_trainer(tmp_path, "grpo", *settings, scores=scores)
    trainer.fit()
    asked = [event[1] for event in trainer.said if event[0] == "submit rollout"]
    assert asked == [(0, 1), (2, 3), (4, 5), (1, 2), (4, 5), (1, 2), (3, 4), (5, 0)]
    counts = [line["gate/resting"] for line in trainer.logged]
    assert counts == [1, 2, 2, 2, 1, 0, 1, 2]
    passed_over = [line["gate/passed_over"] for line in trainer.logged]
    assert passed_over == [0, 0, 0, 1, 1, 1, 0, 0]
    assert [line["gate/solved"] for line in trainer.logged] == [1, 0, 0, 0, 0, 0, 0, 1]
    assert [line["gate/unsolved"] for line in trainer.logged] == [0, 1, 0, 0, 0, 0, 1, 0]


def test_the_shares_of_sources_are_logged_and_without_weights_are_not(tmp_path):
    trainer = make_trainer(tmp_path, "grpo", "++data.source_weights={tiny: 2}")
    trainer.fit()
    assert [line["data/share/tiny"] for line in trainer.logged] == [1.0, 1.0, 1.0]
    plain = make_trainer(tmp_path, "grpo", f"trainer.default_local_dir={tmp_path}/other")
    plain.fit()
    assert not [n for line in plain.logged for n in line if n.startswith(("data/", "gate/"))]


def test_a_gate_by_a_number_that_a_reward_lacks_ends_the_run(tmp_path):
    settings = ["data.gate.rest_solved=1", "data.gate.metric=em"]
    trainer = make_trainer(tmp_path, "grpo", *settings)
    with pytest.raises(RewardError, match=r"data\.gate\.metric=em: .* only score"):
        trainer.fit()


def test_an_update_without_anything_left_is_left_out(tmp_path):
    alike = {number: [1.0] * 4 for number in range(ROWS)}
    settings = ["algorithm.loss_filters=[zero_variance]", "trainer.total_training_steps=1"]
    trainer = make_trainer(tmp_path, "grpo", *settings, scores=alike)
    trainer.fit()
    assert "update actor" not in verbs(trainer)
    assert trainer.logged[0]["rollout/filtered/zero_variance"] == 1


def test_validation_and_checkpoints_come_every_so_many_steps_and_at_the_end(tmp_path):
    often = ["trainer.test_freq=2", "trainer.save_freq=2", "trainer.val_before_train=true"]
    trainer = make_trainer(tmp_path, "grpo", *often)
    saved = []
    trainer.checkpoints.save = lambda step, state: saved.append((step, state["version"]))
    trainer.checkpoints.newest = 3
    trainer.fit()
    assert [event[2] for event in trainer.said if event[0] == "submit validation"] == [0, 2, 3]
    assert saved == [(2, 2), (3, 3)]


def test_a_step_that_is_asked_to_stop_is_finished_and_saved(tmp_path):
    trainer = make_trainer(tmp_path, "grpo")
    trainer.actor.update_actor = lambda batch: (
        setattr(trainer.stop, "requested", 15) or trainer.actor._update(batch)
    )
    trainer.fit()
    assert trainer.step == 1 and verbs(trainer)[-1] == "update_weights"
    assert (tmp_path / "global_step_1").is_dir()


def test_one_survivor_of_a_group_is_not_compared_with_itself(tmp_path):
    scores = {0: [1.0, None, None, None], 1: [0.0, 1.0, 0.0, 1.0]}
    settings = ["trainer.max_failed_share=0.5", "trainer.total_training_steps=1"]
    trainer = make_trainer(tmp_path, "grpo", *settings, scores=scores)
    trainer.fit()
    (batch,) = trainer.actor.batches
    assert batch.batch["prompts"].flatten().tolist() == [2] * 4
    assert trainer.logged[0]["rollout/dropped_small_group"] == 1


def test_the_console_says_how_long_it_will_take(tmp_path, monkeypatch):
    """By a clock that the run reads once when it begins and once at the end of each step, a minute
    later each time."""
    minutes = itertools.count()
    monkeypatch.setattr(
        ray_trainer, "time", SimpleNamespace(monotonic=lambda: 60.0 * next(minutes))
    )
    etas = []
    monkeypatch.setattr(
        ray_trainer, "console_line", lambda metrics, step, total, eta_s: etas.append(eta_s) or ""
    )
    trainer = make_trainer(tmp_path, "grpo")
    trainer.fit()
    assert etas == [120.0, 60.0, 0.0]


def test_a_run_that_is_asked_to_stop_while_it_starts_does_not_validate(tmp_path):
    trainer = make_trainer(tmp_path, "grpo", "trainer.val_before_train=true")
    trainer.stop.requested = 15
    trainer.fit()
    assert [event[0] for event in trainer.said] == ["update_weights"] and trainer.step == 0


def test_a_run_that_has_ended_says_so_when_it_is_given_again(tmp_path):
    trainer = make_trainer(tmp_path, "grpo")
    messages = []
    trainer.tracking.message = messages.append
    trainer.step = trainer.total
    trainer.checkpoints.newest = trainer.total
    trainer.fit()
    (message,) = messages
    assert message.startswith("nothing left to train, all 3 training steps are done")
    assert "submit rollout" not in verbs(trainer)
