"""What a resumed run has from its checkpoint, and what it may change: every key is decided on, told
where it takes effect, refused where it cannot."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from tests.verl.batches import ragged_batch
from tests.verl.fake_run import Run
from tests.verl.questions import row
from verl.trainer import driver
from verl.trainer.compose import CONFIGS
from verl.trainer.config import PPOConfig, validate
from verl.trainer.driver import checkpoint_to_resume, status_of
from verl.trainer.ppo.checkpoints import TRAINER
from verl.trainer.ppo.ray_trainer import RayPPOTrainer
from verl.trainer.preparation import Task
from verl.trainer.resume import FIXED, TAKES_EFFECT, WITHOUT_MEANING, check_resume
from verl.trainer.supervise import Stop
from verl.utils.checkpoint_storage import CheckpointError
from verl.utils.config import Config
from verl.utils.dataset import questions_digest
from verl.utils.errors import ConfigError
from verl.utils.run_folder import name_latest
from verl.utils.tracking import Timers, Tracking

QUESTIONS = [row(text=f"Who is {i}?") for i in range(4)]
ADAPTERS = "actor_rollout_ref.model.lora_rank=8"


def configured(*overrides: str, name: str = "ppo") -> PPOConfig:
    fixed = [
        "data.train_files=a.parquet",
        "data.val_files=b.parquet",
        "data.train_batch_size=240",
        "actor_rollout_ref.actor.optim.lr=1e-6",
        "critic.optim.betas=[0.9,0.999]",
        "actor_rollout_ref.model.path=/models/a",
        "trainer.experiment_name=test",
        "trainer.n_gpus_per_node=8",
        "trainer.save_freq=-1",
        "retriever.topk=3",
    ]
    with initialize_config_dir(str(CONFIGS), version_base=None):
        raw: Any = OmegaConf.to_container(compose(name, [*fixed, *overrides]), resolve=True)
    return validate(raw)


def saved_with(folder: Path, config: PPOConfig, questions: list[Any] = QUESTIONS) -> Path:
    state = {"config": config.model_dump(mode="json"), "questions": questions_digest(questions)}
    (folder / TRAINER).write_text(json.dumps(state))
    return folder


def sections(model: type[Config] = PPOConfig) -> Iterator[type[Config]]:
    yield model
    for field in model.model_fields.values():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Config):
            yield from sections(field.annotation)


@pytest.mark.parametrize("section", dict.fromkeys(sections()), ids=lambda section: section.__name__)
def test_every_field_is_decided_on_once(section):
    fields = section.model_fields.items()
    own = [
        name
        for name, f in fields
        if not (isinstance(f.annotation, type) and issubclass(f.annotation, Config))
    ]
    tables = (FIXED, WITHOUT_MEANING, TAKES_EFFECT)
    decided = [name for table in tables for name in table.get(section, []) if "." not in name]
    assert sorted(decided) == sorted(own), (
        "decide in verl/trainer/resume.py what a change means for a resumed run"
    )


def test_what_may_change_takes_effect_and_is_told(tmp_path):
    saved_with(tmp_path, configured())
    now = configured(
        "actor_rollout_ref.actor.optim.lr=1e-7",
        "critic.optim.betas=[0.9,0.95]",
        "trainer.n_gpus_per_node=4",
        "algorithm.kl_ctrl.kl_coef=0.05",
        "reward.f1=0.5",
        "data.train_batch_size=480",
        "trainer.save_freq=7",
        "trainer.collapse_watch.signals={actor/entropy: null}",
        "retriever.topk=5",
        "++actor_rollout_ref.model.override_config.attn_implementation=sdpa",
    )
    assert {str(change) for change in check_resume(tmp_path, now, QUESTIONS)} == {
        "actor_rollout_ref.actor.optim.lr: 1e-06 -> 1e-07",
        "critic.optim.betas: [0.9, 0.999] -> [0.9, 0.95]",
        "trainer.n_gpus_per_node: 8 -> 4",
        "algorithm.kl_ctrl.kl_coef: 0.001 -> 0.05",
        "reward.f1: 0.0 -> 0.5",
        "data.train_batch_size: 240 -> 480",
        "trainer.save_freq: -1 -> 7",
        'trainer.collapse_watch.signals.actor/entropy: {"below": 0.005, "above": null, '
        '"falls_to": 0.1, "rises_to": 2.5, "falls_by": null} -> null',
        "agent.retriever.topk: 3 -> 5",
        'actor_rollout_ref.model.override_config.attn_implementation: null -> "sdpa"',
        'critic.model.override_config.attn_implementation: null -> "sdpa"',
    }


def test_nothing_is_told_of_the_same_configuration_or_of_what_is_about_this_start_alone(tmp_path):
    saved_with(tmp_path, configured())
    assert check_resume(tmp_path, configured(), QUESTIONS) == []
    moved = configured(
        "data.train_files=elsewhere/a.parquet",
        "trainer.default_local_dir=/moved",
        "data.made_by=make",
    )
    assert check_resume(tmp_path, moved, QUESTIONS) == []


def test_a_model_may_be_named_by_its_relative_or_its_full_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    saved_with(tmp_path, configured("actor_rollout_ref.model.path=model"))
    assert (
        check_resume(
            tmp_path, configured(f"actor_rollout_ref.model.path={tmp_path}/model"), QUESTIONS
        )
        == []
    )


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("data.shuffle_train_dataloader=false", "saved with true, and the place in the data"),
        ("trainer.seed=1", "saved with 0, and the place in the data"),
        (
            "actor_rollout_ref.model.path=/models/b",
            'saved with "/models/a", and its weights are those of that model',
        ),
        ("actor_rollout_ref.model.tokenizer_path=/models/b", "tokens of that tokenizer"),
        ("actor_rollout_ref.model.lora_rank=4", "saved with 8, and its adapters are of that shape"),
        (
            "actor_rollout_ref.model.lora_alpha=32",
            "saved with 16, and its adapters were trained at that scale",
        ),
        ("actor_rollout_ref.model.target_modules=[q_proj]", "its adapters are of that shape"),
        (
            "++actor_rollout_ref.model.override_config.rope_theta=1e6",
            "its weights are those of that model",
        ),
        ("critic.model.path=/models/b", "its weights are those of that model"),
    ],
)
def test_what_would_change_the_meaning_of_the_state_is_refused(tmp_path, override, told):
    saved_with(tmp_path, configured(ADAPTERS))
    with pytest.raises(ConfigError) as refused:
        check_resume(
            tmp_path,
            configured(ADAPTERS, override, "actor_rollout_ref.actor.optim.lr=1e-7"),
            QUESTIONS,
        )
    key = override.partition("=")[0].lstrip("+")
    assert any(
        problem.startswith(f"{key}=") and told in problem for problem in refused.value.problems
    )
    assert (
        "optim.lr" not in str(refused.value)
        and "put back what was changed" in refused.value.problems[-1]
    )


def test_every_fixed_key_is_refused_by_name():
    """The cases above are all of them."""
    names = {name for fields in FIXED.values() for name in fields}
    assert names == {
        "shuffle_train_dataloader",
        "seed",
        "path",
        "tokenizer_path",
        "lora_rank",
        "lora_alpha",
        "target_modules",
        "override_config",
    }


def test_a_critic_can_be_left_and_not_made_up(tmp_path):
    saved_with(tmp_path, configured(name="ppo"))
    told = [str(change) for change in check_resume(tmp_path, configured(name="grpo"), QUESTIONS)]
    assert 'algorithm.adv_estimator: "gae" -> "grpo"' in told
    assert not any(line.startswith("critic") for line in told)
    saved_with(tmp_path, configured(name="grpo"))
    with pytest.raises(ConfigError, match="saved with grpo, and holds no critic"):
        check_resume(tmp_path, configured(name="ppo"), QUESTIONS)


def test_weights_of_sources_may_change_but_not_come_or_go(tmp_path):
    one = configured("++data.source_weights={set: 1}")
    other = configured("++data.source_weights={set: [[0, 1], [9, 2]]}")
    saved_with(tmp_path, one)
    (change,) = check_resume(tmp_path, other, QUESTIONS)
    assert str(change) == "data.source_weights.set: 1.0 -> [[0, 1.0], [9, 2.0]]"
    with pytest.raises(ConfigError, match=r"saved with weights of sources, .* of each source"):
        check_resume(tmp_path, configured(), QUESTIONS)
    saved_with(tmp_path, configured())
    with pytest.raises(ConfigError, match=r"saved without weights of sources, .* all questions"):
        check_resume(tmp_path, one, QUESTIONS)


@pytest.mark.parametrize(
    ("questions", "same"),
    [
        (QUESTIONS, True),
        ([row(text=f"Who is {i}?", target=["B"]) for i in range(4)], True),
        (QUESTIONS[:3], False),
        (QUESTIONS[::-1], False),
        ([*QUESTIONS[:3], row(text="Who else?")], False),
    ],
    ids=["same", "answers corrected", "fewer", "another order", "another question"],
)
def test_the_place_in_the_data_is_one_among_the_same_questions(tmp_path, questions, same):
    saved_with(tmp_path, configured())
    if same:
        assert check_resume(tmp_path, configured(), questions) == []
    else:
        with pytest.raises(ConfigError, match="saved with other training questions"):
            check_resume(tmp_path, configured(), questions)


def test_a_key_of_another_version_is_no_change(tmp_path):
    saved_with(tmp_path, configured())
    state = json.loads((tmp_path / TRAINER).read_text())
    del (
        state["config"]["trainer"]["save_hf"],
        state["config"]["actor_rollout_ref"]["model"]["lora_alpha"],
    )
    state["config"]["trainer"]["gone"] = 1
    (tmp_path / TRAINER).write_text(json.dumps(state))
    assert check_resume(tmp_path, configured(), QUESTIONS) == []


def test_what_cannot_be_resumed_ends_the_command_before_anything_is_written(
    tmp_path, caplog, capsys
):
    """And what can be says what has changed."""
    run = [f"trainer.default_local_dir={tmp_path}"]
    questions = SimpleNamespace(rows=QUESTIONS)
    assert checkpoint_to_resume(configured(*run), questions) is None
    folder = tmp_path / "global_step_3"
    folder.mkdir()
    name_latest(tmp_path, 3)
    saved_with(folder, configured(*run))
    with caplog.at_level("INFO"):
        assert checkpoint_to_resume(configured(*run, "trainer.save_freq=5"), questions) == folder
    assert "changed since global_step_3: trainer.save_freq: -1 -> 5" in caplog.text
    with pytest.raises(ConfigError, match="resume_mode=disable"):
        checkpoint_to_resume(configured(*run, "trainer.resume_mode=disable"), questions)
    (folder / TRAINER).rename(folder / "trainer.pt")
    with pytest.raises(CheckpointError, match=r"trainer\.pt: a pickle") as refused:
        checkpoint_to_resume(configured(*run), questions)
    assert (
        status_of(refused.value) == 1
        and "Finish the run with the version" in capsys.readouterr().err
    )
    assert not (tmp_path / "config.yaml").exists()


class Questions:
    """Seven of them."""

    rows = tuple(row(text=f"Who is {number}?") for number in range(7))
    prompt_ids = tuple([number] for number in range(7))

    def __len__(self) -> int:
        return len(self.rows)


class Rollout:
    """Engines without weights."""

    version = 0

    def submit(self, rows: Any, *_: Any, **__: Any) -> Any:
        return rows

    def collect(self, rows: Any) -> tuple[Any, list[Any]]:
        return rows, []


class Processes:
    """Roles that only write down, and engines without weights."""

    def __init__(self, folder: Path) -> None:
        run = Run(folder)
        self.roles = {"actor": run.actor, "critic": run.critic}
        self.group = SimpleNamespace(world_size=1)
        self.rollout = Rollout()
        self.val_rollout = self.rollout


def trainer_in(folder: Path, *overrides: str) -> RayPPOTrainer:
    """A trainer at the start of a run."""
    config = configured(
        "algorithm.kl_ctrl.type=adaptive", f"trainer.default_local_dir={folder}", *overrides
    )
    processes: Any = Processes(folder)
    questions: Any = Questions()
    tracking = Tracking(str(folder), [], "project", "run", {}, {})
    task = Task(SimpleNamespace(pad_token_id=0), SimpleNamespace(), None)  # pyright: ignore
    stop: Any = SimpleNamespace(requested=0)
    return RayPPOTrainer(config, task, questions, questions, processes, tracking, Timers(), stop)


def trained(folder: Path, *overrides: str, steps: int = 4) -> RayPPOTrainer:
    """A trainer after `steps` steps, with a checkpoint of the last.

    Nothing of it is as at the start.
    """
    made: Any = trainer_in(folder, *overrides)
    for _ in range(steps):
        made.step += 1
        made.batches.queue.next_batch(10)
        made.policy_version += 1
        made.guard.observe(made.step, {"actor/entropy": 0.5, "actor/grad_norm": 1.0})
    made.kl_ctrl.value = 0.0625
    made.skipped_in_a_row = 1
    made.validator.start(made.step)
    made.checkpoints.save(made.step, made.state_dict())
    made.checkpoints.complete()
    return made


def test_everything_that_the_driver_has_become_is_restored(tmp_path):
    fresh = trainer_in(tmp_path).state_dict()
    before = trained(tmp_path)
    resumed = trainer_in(tmp_path)
    resumed.load_checkpoint(4)
    assert resumed.validates_again
    resumed.policy_version += 1  # the sync of the weights, with which every run begins
    saved, restored = ({**t.state_dict(), "validating": None} for t in (before, resumed))
    assert restored == saved
    same = {key for key, value in fresh.items() if saved[key] == value}
    assert same == {"config", "questions", "trackers"}, (
        "all else had changed, so that a default would be seen"
    )


@pytest.mark.parametrize(
    ("before", "after", "coefficient"),
    [
        ([], [], 0.0625),
        ([], ["algorithm.kl_ctrl.target_kl=0.2", "algorithm.kl_ctrl.horizon=99"], 0.0625),
        ([], ["algorithm.kl_ctrl.kl_coef=0.05"], 0.05),
        ([], ["algorithm.kl_ctrl.type=fixed"], 0.001),
        (["algorithm.kl_ctrl.type=fixed"], [], 0.001),
        (
            ["algorithm.kl_ctrl.type=fixed"],
            ["algorithm.kl_ctrl.type=fixed", "algorithm.kl_ctrl.kl_coef=0.05"],
            0.05,
        ),
    ],
    ids=[
        "adaptive",
        "other dynamics",
        "other start",
        "fixed from now on",
        "adaptive from now on",
        "fixed and changed",
    ],
)
def test_the_kl_coefficient_goes_on_where_it_is_a_state_and_follows_the_configuration_otherwise(
    tmp_path, before, after, coefficient
):
    trained(tmp_path, *before)
    resumed = trainer_in(tmp_path, *after)
    resumed.load_checkpoint(4)
    assert resumed.kl_ctrl.value == coefficient


@pytest.mark.parametrize(("step", "learned"), [(1, False), (2, False), (3, True)])
def test_the_critics_warm_up_ends_where_it_would_have(tmp_path, step, learned):
    """Three steps of warm-up, resumed after `step` of them: the actor learns in the next one from
    step 4 on."""
    trained(tmp_path, steps=step)
    resumed = trainer_in(tmp_path, "trainer.critic_warmup=3")
    taken = []
    resumed.actor = SimpleNamespace(
        update_actor=lambda batch: taken.append(batch) or {"skipped_steps": 0.0}
    )
    resumed.load_checkpoint(step)
    resumed.step += 1
    batch = ragged_batch(torch.float32)
    mask = batch.batch["response_mask"]
    old = batch.batch["old_log_probs"]
    resumed.update_actor(batch.with_tensors(turns=mask - 1, rollout_log_probs=old))
    assert bool(taken) is learned


def test_signals_that_are_not_watched_any_more_are_forgotten(tmp_path):
    """Else the step since which one was out of bounds would hold back every later roll back."""
    before = trainer_in(tmp_path)
    for step, entropy in enumerate((1.0, 1.0, 0.0), 1):
        before.guard.watch.observe(step, {"actor/entropy": entropy, "actor/grad_norm": 1.0})
    assert before.guard.watch.since == {"actor/entropy": 3}
    after = trainer_in(
        tmp_path,
        "trainer.collapse_watch.signals={actor/entropy: null}",
        "trainer.collapse_watch.window=1",
    )
    after.guard.watch.load_state_dict(before.guard.watch.state_dict())
    assert after.guard.watch.since == {} and after.guard.watch.history == {"actor/grad_norm": [1.0]}


def test_a_run_is_compared_as_it_will_train_with_its_packing_decided(tmp_path, monkeypatch):
    """The saved configuration has it decided; compared before that, every resume would tell of a
    change."""
    undecided, decided = (
        SimpleNamespace(trainer=SimpleNamespace(default_local_dir=str(tmp_path)), pack_rows=pack)
        for pack in (None, True)
    )
    compared = []
    monkeypatch.setattr(driver, "load_train_set", lambda *_: [])
    monkeypatch.setattr(driver, "plan_of", lambda *_: "")
    for name in (
        "check_trainable",
        "load_val_set",
        "check_environment",
        "slow_precision",
        "write_config",
        "train",
    ):
        monkeypatch.setattr(driver, name, lambda *_: None)
    task = SimpleNamespace(tokenizer=None, agent=None, reward=None)
    monkeypatch.setattr(driver, "gpus_here", lambda config: 0)
    monkeypatch.setattr(driver, "prepare", lambda raw: (undecided, task))
    monkeypatch.setattr(driver, "decide_packing", lambda config: decided)
    monkeypatch.setattr(
        driver,
        "checkpoint_to_resume",
        lambda config, train_set: compared.append(config.pack_rows),
    )
    driver.run_ppo({}, Stop())
    assert compared == [True]
