"""Wrong overrides are found together, before anything starts, by every command that takes them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.runs import ROOT
from verl.trainer.compose import absolute, as_plain, check_overrides, composed, read_command_line
from verl.trainer.config import validate
from verl.trainer.overrides import quoted
from verl.trainer.sft import read_config
from verl.utils.errors import ConfigError

MODEL = "actor_rollout_ref.model"


def problems(*overrides, config="grpo", **kwargs):
    with pytest.raises(ConfigError) as caught:
        check_overrides(config, overrides, **kwargs)
    return caught.value.problems


def invalid(*overrides):
    with pytest.raises(ConfigError) as caught:
        validate(as_plain(composed("grpo", overrides)))
    return caught.value.problems


def test_all_wrong_overrides_are_listed_at_once():
    found = problems(
        "data.nope=1",
        "experiment=closed_world/grpoo",
        "max_turn=3",
        "a=[",
        "+trainer.val_only=true",
    )
    assert [line.partition(":")[0] for line in sorted(found)] == [
        "+trainer.val_only",
        "a=[",
        "data.nope",
        "experiment=closed_world/grpoo",
        "max_turn",
    ]
    assert all("\n" not in line for line in found)


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("trainer.seeed=1", "trainer.seed"),
        ("train_batch_size=8", "data.train_batch_size"),
        ("actor.optim.lr=1", "actor_rollout_ref.actor.optim.lr"),
        ("data.topk=3", "retriever.topk"),
        ("experiment=nq_hotpotqa/qwen2.5-3b-gpro", "nq_hotpotqa/qwen2.5-3b-grpo"),
        ("method=search-r1", "search_r1"),
    ],
)
def test_the_nearest_name_is_offered(wrong, meant):
    (line,) = problems(wrong)
    assert line.endswith(f"; did you mean {meant}?")


def test_nothing_is_offered_where_nothing_is_near():
    assert problems("data.nope=1") == ["data.nope: there is no such key"]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data.val_files=a.parquet,b.parquet", "a list is written [a.parquet,b.parquet]"),
        ("trainer.experiment_name", "expected key=value"),
        ("data=3", "data=3: expected a section of keys"),
        ("--confg-name=ppo", "expected key=value"),
        ("+trainer.seed=1", "the key exists: leave out the +"),
        ("experiment=nowhere/at_all", "configs/experiment has no such file"),
    ],
)
def test_mistakes_that_hydra_explains_to_its_developers(override, said):
    (line,) = problems(override)
    assert said in line and "\n" not in line


def test_what_is_right_passes():
    check_overrides(
        "grpo",
        ["+mode=deterministic", "method=rag", "trainer.seed=1", "~trainer.panels", "++a.b=1"],
    )
    check_overrides(
        "grpo",
        ["+data.apply_chat_template_kwargs.enable_thinking=false", "trainer.logger=[console]"],
    )
    check_overrides(
        "ppo", ["trainer.seed=0,1", "experiment=closed_world/ppo,closed_world/grpo"], sweeps=True
    )


def test_a_configuration_that_does_not_exist():
    (line,) = problems(config="gpro")
    assert line.startswith("--config-name gpro:") and "grpo" in line


def test_values_that_are_required_are_named():
    config = composed("grpo", ["experiment=nq_hotpotqa/grpo"])
    with pytest.raises(
        ConfigError, match=r"actor_rollout_ref\.model\.path: required, and not given"
    ):
        as_plain(config)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("data.train_batch_size=many", "data.train_batch_size=many: expected a whole number"),
        ("data.train_batch_size=1.5", "data.train_batch_size=1.5: expected a whole number"),
        ("data.train_batch_size=0", "data.train_batch_size=0: expected a number above 0"),
        ("trainer.max_failed_share=2", "trainer.max_failed_share=2: expected 1 or less"),
        ("trainer.val_only=maybe", "trainer.val_only=maybe: expected true or false"),
        ("trainer.device=tpu", "trainer.device=tpu: expected 'auto', 'cuda' or 'cpu'"),
        ("trainer.panels=3", "trainer.panels=3: expected a section of keys"),
        ("trainer.experiment_name=null", "trainer.experiment_name=null: expected text"),
        (f"{MODEL}.target_modules=3", f"{MODEL}.target_modules=3: expected text or a list"),
        ("reward.f1=no", "reward.f1=no: expected a number or a list"),
        ("+trainer.seeed=1", "trainer.seeed: there is no such key; did you mean trainer.seed?"),
    ],
)
def test_wrong_values_name_key_value_and_what_was_expected(override, line):
    assert line in invalid(override)


def test_a_class_without_a_model_of_its_section():
    (line,) = invalid("agent._target_=search_r1.prompts.build_prompt")
    assert line == (
        "agent._target_=search_r1.prompts.build_prompt: expected a subclass of verl.agent.AgentLoop"
    )


def test_fine_tuning_has_keys_of_its_own():
    with pytest.raises(ConfigError) as caught:
        read_config(["model.pth=x", "optim.lr=fast"])
    assert caught.value.problems == [
        "model.path: required, and not given",
        "model.pth: there is no such key; did you mean model.path?",
        "output: required, and not given",
        "optim.lr=fast: expected a number",
    ]
    for text in ("output", "output=[a"):
        with pytest.raises(ConfigError, match=f"{text}: ".replace("[", r"\[")):
            read_config([text])


PROGRAMS = {
    "verl.trainer.main_ppo": ([], 1),
    "verl.trainer.main_eval": ([], 1),
    "verl.trainer.estimate": ([], 2),
    "verl.trainer.step_time": ([], 2),
    "search_r1.launch": ([], 1),
    "search_r1.evaluate": (["a-model"], 1),
    "search_r1.infer": (["a-model", "a question"], 1),
    "search_r1.finetune": ([], 1),
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_lists_them_without_a_traceback(program, tmp_path):
    arguments, status = PROGRAMS[program]
    command = [sys.executable, "-m", program, *arguments, "data.nope=1", "trainer.seeed=2"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == status
    assert done.stderr.splitlines()[-3:] == [
        "error: the configuration cannot work:",
        "  - data.nope: there is no such key",
        "  - trainer.seeed: there is no such key; did you mean trainer.seed?",
    ]
    assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())


def test_arguments_of_hydra_stay_where_they_are():
    line = read_command_line(["--cfg", "job", "a=1", "--config-name=grpo", "-m", "b=[1,2]"], "ppo")
    assert (line.config_name, line.overrides, line.multirun) == ("grpo", ["a=1", "b=[1,2]"], True)
    assert line.flags == ["--cfg", "job", "--config-name=grpo", "-m"] and line.only_shows


def test_a_configuration_of_another_project_is_not_looked_for():
    argv = ["--config-path", "/theirs", "--config-name=ppo", "compat=verl"]
    line = read_command_line([*argv, "trainer.total_epochs=1"], "grpo")
    assert (line.config_name, line.flags, line.is_foreign) == ("ppo", ["--config-name=ppo"], False)


def test_paths_are_relative_to_where_the_user_stands(tmp_path):
    (tmp_path / "model").mkdir()
    given = [
        "p=a.parquet",
        "p=[a.parquet,/b.parquet]",
        "p=null",
        "m=model",
        "m=Qwen/Qwen2.5-3B",
        "p=${x}/a",
        "q=a",
    ]
    found = absolute(
        [*given, "p='it is, a = b'", "p='~/a'", "p=hf:a/b:train"], tmp_path, ["p"], ["m"]
    )
    assert found == [
        f"p={tmp_path}/a.parquet",
        f"p=[{tmp_path}/a.parquet,/b.parquet]",
        "p=null",
        f"m={tmp_path}/model",
        "m=Qwen/Qwen2.5-3B",
        "p=${x}/a",
        "q=a",
        f"p='{tmp_path}/it is, a = b'",
        f"p={Path.home()}/a",
        "p=hf:a/b:train",
    ]


@pytest.mark.parametrize(
    "text", ["a b", "it's", "x,y", "[a]", "12", "null", "a=b", "{a}", "C:\\d", "ö", " a ", "(a)"]
)
def test_texts_are_read_as_they_were_written(text):
    config = composed("grpo", [f"trainer.experiment_name={quoted(text)}"])
    assert config.trainer.experiment_name == text
