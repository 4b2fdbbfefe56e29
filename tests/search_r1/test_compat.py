"""The published command lines of the original and of verl are taken whole, and say what became of
each key."""

import logging

import pytest

from tests import published
from verl.trainer.compat import PROJECTS, Project
from verl.trainer.compose import as_plain, check_overrides, composed, keys_of, read_command_line
from verl.trainer.config import PPOConfig, validate
from verl.utils.errors import ConfigError
from verl.utils.loading import load_class

COMMANDS = {
    **{
        name: ("search_r1", published.arguments(keys)) for name, keys in published.SEARCH_R1.items()
    },
    "verl": ("verl", [*published.VERL_FLAGS, *published.arguments(published.VERL)]),
}
PROJECT: dict[str, Project] = {name: load_class(path, "compat") for name, path in PROJECTS.items()}


def taken(project: str, arguments: list[str]) -> PPOConfig:
    line = read_command_line([f"compat={project}", *arguments], "grpo")
    return validate(as_plain(composed(line.config_name, line.overrides)))


def refused(project: str, *arguments: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read_command_line([f"compat={project}", *arguments], "grpo")
    return caught.value.problems


@pytest.mark.parametrize("name", COMMANDS)
def test_published_command_lines_compose(name):
    config = taken(*COMMANDS[name])
    assert config.data.train_batch_size == 512 and config.actor_rollout_ref.rollout.name == "vllm"
    assert config.algorithm.use_kl_in_reward is not config.actor_rollout_ref.actor.use_kl_loss
    assert config.critic.model.path == config.actor_rollout_ref.model.path


def test_what_the_original_trains():
    """512 prompts, micro-batches of its 8 GPUs, two optimizer steps with PPO and ten with GRPO."""
    ppo, grpo = (taken(*COMMANDS[name]) for name in ("v0.2/train_ppo.sh", "v0.2/train_grpo.sh"))
    actor = ppo.actor_rollout_ref.actor
    assert (actor.ppo_micro_batch_size_per_gpu, ppo.critic.ppo_micro_batch_size_per_gpu) == (8, 1)
    assert ppo.actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu == 16
    assert ppo.critic.fsdp_config.param_offload and ppo.critic.fsdp_config.optimizer_offload
    assert (ppo.actor_rollout_ref.rollout.n, grpo.actor_rollout_ref.rollout.n) == (1, 5)
    assert (*ppo.num_mini_batches.values(), *grpo.num_mini_batches.values()) == (2, 2, 10)
    assert actor.entropy_coeff == 0.001, "the original's default"
    assert ppo.agent["max_turns"] == 4 and ppo.agent["max_obs_length"] == 500


def test_the_micro_batch_is_shared_by_all_gpus():
    config = taken(*COMMANDS["multinode/train_grpo_32b.sh"])
    assert config.actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu == 64 // (4 * 8)


def test_the_format_reward_comes_with_its_scores():
    reward = taken(*COMMANDS["v0.3/train_grpo_format.sh"]).reward
    assert (reward["em"], reward["em_format"]) == (0, 1)
    assert (
        reward["structure_format_score"],
        reward["final_format_score"],
        reward["retrieval_score"],
    ) == (0.2, 0.1, 0)


def test_an_evaluation_of_the_original():
    assert taken(*COMMANDS["evaluate.sh"]).trainer.val_only


def test_what_verl_trains():
    """Its mini-batch counts prompts; its lengths bound the first prompt and the whole response."""
    config = taken(*COMMANDS["verl"])
    assert list(config.num_mini_batches.values()) == [2]
    data = config.data
    assert (data.max_start_length, data.max_prompt_length, data.max_response_length) == (
        4096,
        4096,
        3000,
    )
    assert not data.shuffle_train_dataloader and config.agent["max_turns"] == 1, (
        "of its search_multiturn_grpo.yaml"
    )


def test_everything_that_changes_is_said(caplog):
    with caplog.at_level(logging.WARNING):
        read_command_line(["compat=search_r1", *COMMANDS["train_grpo.sh"][1]], "grpo")
    said = caplog.text
    assert "actor_rollout_ref.rollout.n_agent=5: actor_rollout_ref.rollout.n=5" in said
    assert "data.val_batch_size=256: ignored: a validation takes all questions at once" in said
    assert "actor_rollout_ref.actor.entropy_coeff=0.001: the default there" in said
    assert "data.train_batch_size" not in said, "it means the same"


@pytest.mark.parametrize(
    ("project", "override"),
    [
        ("search_r1", "algorithm.no_think_rl=true"),
        ("search_r1", "retriever.url=serpapi_google"),
        ("search_r1", "reranker.do_rerank=true"),
        ("search_r1", "actor_rollout_ref.rollout.n=4"),
        ("search_r1", "reward_model.enable=true"),
        ("search_r1", "trainer.default_hdfs_dir=hdfs://a/b"),
        ("search_r1", "actor_rollout_ref.actor.strategy=megatron"),
        ("verl", "data.truncation=left"),
        ("verl", "reward_model.reward_manager=dapo"),
        ("verl", "actor_rollout_ref.rollout.multi_turn.enable=false"),
        ("verl", "actor_rollout_ref.rollout.multi_turn.max_assistant_turns=null"),
        ("verl", "actor_rollout_ref.actor.optim.lr_warmup_steps=20"),
    ],
)
def test_what_would_train_something_else_is_refused(project, override):
    (line,) = refused(project, override)
    assert line.startswith(f"{override}: refused: ")


def test_all_that_is_wrong_is_listed_at_once():
    lines = refused(
        "search_r1",
        "data.nope=1",
        "algorithm.no_think_rl=true",
        "experiment=own_data",
        "a=1,2",
        "b=[",
    )
    assert len(lines) == 5


def test_a_project_that_nobody_knows():
    assert refused("trl") == ["compat=trl: expected search_r1 or verl"]


def test_without_compat_each_key_says_what_became_of_it():
    with pytest.raises(ConfigError) as caught:
        check_overrides("grpo", COMMANDS["train_ppo.sh"][1])
    lines = {line.partition(": ")[0]: line for line in caught.value.problems}
    assert len(lines) == 16
    assert "is actor_rollout_ref.rollout.n here" in lines["actor_rollout_ref.rollout.n_agent"]
    assert "has no equal here: a validation takes all" in lines["data.val_batch_size"]
    assert "leave out the +" in lines["+trainer.val_only"]
    assert sum("compat=search_r1" in line for line in lines.values()) == 14


@pytest.mark.parametrize("name", PROJECTS)
def test_tables_name_keys_that_exist(name):
    known = keys_of(composed("grpo", ["~experiment"]))
    project = PROJECT[name]
    assert {fate.key for fate in project.keys.values() if fate.key} <= known
    assert project.defaults.keys() <= known
    assert all(fate.note or fate.key for fate in project.keys.values())


def test_warm_up_steps_become_a_share():
    optim = "actor_rollout_ref.actor.optim"
    given = published.VERL | {
        "trainer.total_training_steps": "200",
        f"{optim}.lr_warmup_steps": "20",
    }
    assert (
        taken(
            "verl", published.arguments(given)
        ).actor_rollout_ref.actor.optim.lr_warmup_steps_ratio
        == 0.1
    )
