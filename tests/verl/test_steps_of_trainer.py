"""The order of a training step and what each verb is given, over roles and engines that write down
what they are asked.

The configuration, the batches and everything that the driver computes are real.
"""

import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.verl.test_config import composed
from verl.agent import Segment, Source, Trajectory
from verl.protocol import DataProto
from verl.rollout.agent_worker import Failure
from verl.rollout.job import make_jobs
from verl.trainer.config import PPOConfig, validate
from verl.trainer.ppo import ray_trainer
from verl.trainer.ppo.batch_source import NothingToLearn
from verl.trainer.ppo.ray_trainer import RayPPOTrainer
from verl.trainer.preparation import Task
from verl.utils.tracking import Timers, Tracking

ROWS = 6
PROMPTS = 2
GROUP = 4
ACTOR = "actor_rollout_ref.actor"
ROLLOUT = "actor_rollout_ref.rollout"
SMALL = [
    f"data.train_batch_size={PROMPTS}",
    f"{ROLLOUT}.n={GROUP}",
    f"{ACTOR}.ppo_mini_batch_size={PROMPTS * GROUP}",
    "trainer.device=cpu",
    "trainer.n_gpus_per_node=1",
    "trainer.total_training_steps=3",
    "trainer.test_freq=-1",
    "trainer.save_freq=-1",
    "trainer.val_before_train=false",
    "trainer.best_metric=null",
    "trainer.logger=[]",
    "data.shuffle_train_dataloader=false",
    "trainer.critic_warmup=0",
    "trainer.rollout_data_freq=-1",
]


def question(number: int) -> dict:
    truth = {"ground_truth": "yes"}
    return {"data_source": "tiny", "prompt": str(number), "number": number, "reward_model": truth}


class Questions:
    rows = [question(number) for number in range(ROWS)]
    prompt_ids = [[number + 1] for number in range(ROWS)]

    def __len__(self) -> int:
        return ROWS


class Rollout:
    """Engines whose trajectories of a prompt score `scores[prompt]`; None fails. Four tokens
    each."""

    def __init__(self, said: list, scores: dict) -> None:
        self.said = said
        self.scores = scores
        self.version = -1

    def submit(self, rows, prompts, sampling, seed, name="rollout"):
        self.said.append((f"submit {name}", tuple(row["number"] for row in rows), self.version))
        jobs = make_jobs(rows, prompts, sampling, seed) if name == "rollout" else []
        return jobs, self.version

    def collect(self, submitted):
        jobs, version = submitted
        if not jobs:
            return [], []
        self.said.append(("collect", self.version))
        copies: dict[str, int] = {}
        results: list = []
        for job in jobs:
            copy = copies[job.uid] = copies.get(job.uid, -1) + 1
            score = self.scores[job.row["number"]][copy]
            segment = Segment(Source.MODEL, [5, 6, 7, 8], [-1.0] * 4, policy_version=version)
            failed = Failure("down", 1)
            done = Trajectory(job.prompt_ids, [segment], "answer", {"score": score})
            results.append(failed if score is None else done)
        return jobs, results

    def drain(self, submitted):
        self.said.append(("drain", len(submitted), self.version))

    def sleep(self):
        self.said.append(("sleep",))

    def report_progress_to(self, on_progress):
        self.on_progress = on_progress

    def is_done(self, submitted):
        return True

    def announce_version(self, version):
        self.version = version

    def update_weights(self, version):
        self.said.append(("update_weights", version))


class Role:
    """A worker group: log-probs of -1 for the actor, of -1.5 for the reference, values of 0."""

    def __init__(self, name: str, said: list) -> None:
        self.name = name
        self.said = said
        self.batches = []
        self.skipped_steps = 0.0
        self.checkpoints: list[tuple[str, bool]] = []
        """The folder of each one written, and whether in the background."""
        self.lr_factors: list[float] = []

    def describe(self):
        return [f"a {self.name} that writes down what it is asked"]

    def _column(self, batch: DataProto, name: str, value: float) -> DataProto:
        self.said.append((name,))
        return DataProto({name: torch.full(batch.batch["responses"].shape, value)})

    def compute_log_prob(self, batch):
        return self._column(batch, "old_log_probs", -1.0)

    def compute_ref_log_prob(self, batch):
        return self._column(batch, "ref_log_prob", -1.5)

    def compute_values(self, batch):
        return self._column(batch, "values", 0.0)

    def _update(self, batch):
        self.said.append((f"update {self.name}",))
        self.batches.append(batch)
        return {"loss": 0.0, "skipped_steps": self.skipped_steps}

    update_actor = update_critic = _update

    def save_checkpoint(self, path, asynchronous):
        self.checkpoints.append((Path(path).parent.name, asynchronous))

    def finish_checkpoint(self):
        pass

    def load_checkpoint(self, path):
        pass

    def scale_lr(self, factor):
        self.lr_factors.append(factor)

    def save_pretrained(self, path, checkpoint):
        self.said.append(("save_pretrained", path, checkpoint))


@pytest.fixture(autouse=True)
def validation(monkeypatch):
    """Finds the same whatever it is given."""
    found = {"val/test_score/all": 0.5}
    monkeypatch.setattr("verl.trainer.ppo.validation.score", lambda *_: (dict(found), []))


def make_processes(config: PPOConfig, scores: dict | None = None) -> SimpleNamespace:
    """Processes whose `said` is what the roles and engines were asked, in that order."""
    said: list = []
    names = ["actor", *["ref"] * config.use_reference, *["critic"] * config.use_critic]
    rollout = Rollout(said, scores or {number: [0.0, 1.0, 0.0, 1.0] for number in range(ROWS)})
    return SimpleNamespace(
        said=said,
        group=SimpleNamespace(world_size=1),
        roles={name: Role(name, said) for name in names},
        rollout=rollout,
        val_rollout=rollout,
        rollouts=[rollout],
        stacks=dict,
        shutdown=lambda: None,
    )


def trainer_over(config: PPOConfig, processes: SimpleNamespace) -> RayPPOTrainer:
    """A trainer of these processes whose `logged` is the metrics of each line."""
    agent = SimpleNamespace(reduce_metrics=lambda trajectories: {})
    tracking = Tracking(config.trainer.default_local_dir, [], "project", "run", {}, {})
    made = RayPPOTrainer(
        config,
        Task(SimpleNamespace(pad_token_id=0, decode=str), agent, None),
        Questions(),
        Questions(),
        processes,
        tracking,
        Timers(),
        SimpleNamespace(requested=0),
    )
    made.logged = []
    made.tracking.log = lambda metrics, step: made.logged.append(metrics)
    return made


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
