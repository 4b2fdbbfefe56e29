"""Translation of the command lines of other projects.

`compat=verl` accepts a command line of verl, `compat=search_r1` one of the original Search-R1. A
key that has an equivalent is translated, one that cannot change the training is ignored, and one
that would silently train something else is refused. Each is listed with the reason.
docs/migration.md has the tables.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from verl.trainer.config import Logger
from verl.trainer.overrides import parse, written
from verl.utils.config import did_you_mean
from verl.utils.errors import ConfigError
from verl.utils.loading import load_class

logger = logging.getLogger(__name__)
PROJECTS = {"search_r1": "search_r1.compat.SEARCH_R1", "verl": "verl.trainer.compat.VERL"}
"""The dotted path of a project's description, by the value of `compat`.

It is loaded by name, as the classes of a task are, so the library imports no task.
"""
OPEN_SECTIONS = (
    "apply_chat_template_kwargs",
    "override_config",
    "engine_kwargs",
    "extra_body",
    "panels",
)
"""Sections that accept any key."""
OWN_GROUPS = ("algo", "experiment", "method", "mode")
"""Keys that choose a file of configs/."""

Given = Mapping[str, Any]
"""All keys of a command line with their values."""
Convert = Callable[[Any, Given], Any]


class Refused(ValueError):
    """A value that has no equivalent here; the message says why."""


@dataclass(frozen=True)
class Fate:
    """How a key of another project is translated, or why it is not."""

    key: str = ""
    """The key in this project; empty if there is none."""
    note: str = ""
    """How it differs, or why there is none."""
    convert: Convert | None = None
    """Converts the value; None: it stays the same. Raises Refused."""
    also: Callable[[Any], dict[str, Any]] | None = None
    """Gives further keys of this project that follow from the value."""

    def apply(self, value: object, given: Given) -> dict[str, Any]:
        """The keys and values in this project. Raises Refused."""
        converted = value if self.convert is None else self.convert(value, given)
        found = {self.key: converted} if self.key else {}
        return found | (self.also(value) if self.also is not None else {})

    def __str__(self) -> str:
        """The translation in words, to be put after the name of the other project's key."""
        if not self.key:
            return f"has no equal here: {self.note}"
        return f"is {self.key} here" + (f" ({self.note})" if self.note else "")


@dataclass(frozen=True)
class Project:
    """Another project's command line."""

    keys: Mapping[str, Fate]
    """How its keys are translated. A key of ours that is absent here means the same in both."""
    defaults: Mapping[str, Any]
    """Keys of this project, with the values that are the other project's defaults."""
    configs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """The keys and values that its own configuration files set, by the names of the files."""


def ignored(note: str) -> Fate:
    """A key whose value cannot change what is trained."""
    return Fate(note=note)


def ignored_if(allowed: Sequence[Any], note: str) -> Fate:
    """A key that is ignored with some values, and refused for the reason `note` with others."""

    def check(value: object, given: Given) -> None:
        if value not in allowed:
            raise Refused(note)

    return Fate(note=note, convert=check)


def gpus(given: Given) -> int:
    """GPUs of the training, as both projects count them."""
    return given.get("trainer.nnodes", 1) * given.get("trainer.n_gpus_per_node", 8)


def per_gpu(value: int | None, given: Given) -> int | None:
    """A global micro-batch as one GPU's share."""
    return None if value is None else max(1, value // gpus(given))


def all_if_negative(value: int | None, given: Given) -> int | None:
    """A number of rows; None for all, where verl writes -1."""
    return None if value is None or value < 0 else value


@dataclass
class Translation:
    """The translation of one command line."""

    values: dict[str, Any] = field(default_factory=dict)
    """Keys and values in this project."""
    lines: list[str] = field(default_factory=list)
    """Messages about the keys that are not the same in both projects."""
    problems: list[str] = field(default_factory=list)
    """Messages about the keys that are refused."""
    num_same: int = 0
    """The number of keys that mean the same in both projects."""

    def take(self, key: str, value: object, fate: Fate, given: Given) -> None:
        """Adds the translation of a key of the other project, or the reason why it is refused."""
        there = f"{key}={written(value)}"
        try:
            became = fate.apply(value, given)
        except Refused as refusal:
            self.problems.append(f"{there}: refused: {refusal}")
            return
        self.values |= became
        if became == {key: value}:
            self.num_same += 1
        else:
            self.lines.append(f"{there}: {describe(fate, became)}")

    def keep(self, key: str, value: object) -> None:
        """Adds a key that means the same in both projects."""
        self.values[key] = value
        self.num_same += 1

    def add_defaults(self, defaults: Mapping[str, Any]) -> None:
        """Adds the other project's defaults for keys that the command line does not set."""
        for key, value in defaults.items():
            if key not in self.values:
                self.lines.append(f"{key}={written(value)}: the default there")
                self.values[key] = value

    def overrides(self, known: frozenset[str]) -> list[str]:
        """The command line in this project's keys. Keys that are not `known` get a leading ++."""
        prefixes = {key: "" if key in known else "++" for key in self.values}
        keys = [f"{prefixes[key]}{key}={written(value)}" for key, value in self.values.items()]
        return ["~experiment", *keys]


def translate(
    project_name: str, overrides: Sequence[str], config_name: str, known: frozenset[str]
) -> list[str]:
    """Translates overrides into this project's keys, and logs how each was translated.

    `config_name`: the configuration file that the command line names. `known`: all keys of this
    project. Raises ConfigError listing what is refused.
    """
    project: Project = load_class(PROJECTS[project_name], "compat")
    given, problems = read_keys(overrides)
    given = {**project.configs.get(config_name, {}), **given}
    translation = Translation(problems=problems)
    for key, value in given.items():
        fate = project.keys.get(key)
        if fate is not None:
            translation.take(key, value, fate, given)
        elif key in known or is_open(key):
            translation.keep(key, value)
        else:
            hint = did_you_mean(key, known)
            problems.append(f"{key}={written(value)}: known neither there nor here{hint}")
    if problems:
        raise ConfigError(problems)
    translation.add_defaults(project.defaults)
    same = f"{translation.num_same} keys mean the same here; of the others:"
    logger.warning("%s", "\n  ".join([f"compat={project_name}: {same}", *translation.lines]))
    return translation.overrides(known)


def describe(fate: Fate, became: Mapping[str, Any]) -> str:
    """The message about a key that was translated or ignored."""
    if not became:
        return f"ignored: {fate.note}"
    note = f" ({fate.note})" if fate.note else ""
    return " ".join(f"{key}={written(value)}" for key, value in became.items()) + note


def read_keys(overrides: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Keys and values, and messages about arguments that are not key=value.

    If a key comes twice, the last value counts.
    """
    parsed, problems = parse(overrides)
    given: dict[str, Any] = {}
    for override in parsed:
        if override.is_delete() or override.is_sweep_override():
            problems.append(f"{override.input_line}: compat= takes keys with one value each")
        elif override.key_or_group in OWN_GROUPS:
            problems.append(
                f"{override.input_line}: compat= takes another project's keys, which this is not"
            )
        else:
            given[override.key_or_group] = override.value()
    return given, problems


def is_open(key: str) -> bool:
    """Whether a key is in a section that accepts any key."""
    return any(section in key.split(".")[:-1] for section in OPEN_SECTIONS)


def fates_of(key: str) -> dict[str, Fate]:
    """The translations of a key by project, for the projects that have it, Search-R1 first."""
    projects: dict[str, Project] = {
        name: load_class(path, "compat") for name, path in PROJECTS.items()
    }
    return {name: project.keys[key] for name, project in projects.items() if key in project.keys}


MODEL = "actor_rollout_ref.model"
ACTOR = "actor_rollout_ref.actor"
REF = "actor_rollout_ref.ref"
ROLLOUT = "actor_rollout_ref.rollout"
PACKED = "rows are always packed, without padding, up to a number of tokens"
PLACEMENT = (
    "how the work is spread changes no result; memory is a matter of *_max_token_len_per_gpu and "
    "*_offload"
)
ONE_ENGINE = "vLLM is the one engine"
WITH_PARAMETERS = "gradients are where the parameters are (param_offload)"
AS_SAMPLED = "the sampled ids are kept"


def engine(value: object, given: Given) -> str:
    """The engine: `openai` for an endpoint, vLLM instead of any other."""
    return "openai" if value == "openai" else "vllm"


def searches(value: int | None, given: Given) -> int:
    """The most searches of a trajectory: one less than its turns, since the last one answers."""
    if value is None:
        raise Refused("the number of turns must be bounded: set max_turns, the most searches")
    return max(1, value - 1)


def trajectories(value: int, given: Given) -> int:
    """Trajectories of a mini-batch, which verl counts in prompts."""
    return value * given.get(f"{ROLLOUT}.n", 1)


def warm_up_share(value: float | None, given: Given) -> float:
    """A number of warm-up steps as the share of all."""
    if value is None or value <= 0:
        return given.get(f"{ACTOR}.optim.lr_warmup_steps_ratio", 0.0)
    if not given.get("trainer.total_training_steps"):
        raise Refused(
            "give lr_warmup_steps_ratio, a share: the number of steps is not known from the "
            "command line"
        )
    return value / given["trainer.total_training_steps"]


def loggers(value: str | list[str], given: Given) -> list[str]:
    """The loggers that exist here."""
    names = [value] if isinstance(value, str) else value
    return [name for name in names if name in get_args(Logger)]


def common_model(section: str) -> dict[str, Fate]:
    """Translations of a model's keys, which both projects have."""
    return {
        f"{section}.use_remove_padding": ignored(PACKED),
        f"{section}.external_lib": ignored_if(
            [None], "classes are named by agent._target_ and reward._target_"
        ),
    }


COMMON: dict[str, Fate] = {
    **common_model(MODEL),
    **common_model("critic.model"),
    "critic.model.fsdp_config.param_offload": Fate("critic.fsdp_config.param_offload"),
    "critic.model.fsdp_config.optimizer_offload": Fate("critic.fsdp_config.optimizer_offload"),
    "critic.model.fsdp_config.grad_offload": ignored(WITH_PARAMETERS),
    f"{ACTOR}.fsdp_config.grad_offload": ignored(WITH_PARAMETERS),
    "data.val_batch_size": ignored("a validation takes all questions at once"),
    "data.return_raw_input_ids": ignored(AS_SAMPLED),
    "data.return_raw_chat": ignored("the agent builds the prompt"),
    "data.prompt_key": ignored_if(["prompt"], "the column is `prompt`"),
    "data.tokenizer": ignored_if([None], "name it by actor_rollout_ref.model.tokenizer_path"),
    f"{ACTOR}.ppo_micro_batch_size": Fate(
        f"{ACTOR}.ppo_micro_batch_size_per_gpu",
        "divided by the GPUs; the gradient does not depend on it",
        per_gpu,
    ),
    "critic.ppo_micro_batch_size": Fate(
        "critic.ppo_micro_batch_size_per_gpu",
        "divided by the GPUs; the gradient does not depend on it",
        per_gpu,
    ),
    f"{ROLLOUT}.log_prob_micro_batch_size": Fate(
        f"{ROLLOUT}.log_prob_micro_batch_size_per_gpu", "divided by the GPUs", per_gpu
    ),
    f"{REF}.log_prob_micro_batch_size": Fate(
        f"{REF}.log_prob_micro_batch_size_per_gpu", "divided by the GPUs", per_gpu
    ),
    "critic.forward_micro_batch_size": ignored("as critic.ppo_micro_batch_size_per_gpu"),
    "critic.forward_micro_batch_size_per_gpu": ignored("as critic.ppo_micro_batch_size_per_gpu"),
    "critic.forward_max_token_len_per_gpu": ignored("as critic.ppo_max_token_len_per_gpu"),
    f"{ACTOR}.use_dynamic_bsz": ignored(PACKED),
    "critic.use_dynamic_bsz": ignored(PACKED),
    f"{ROLLOUT}.log_prob_use_dynamic_bsz": ignored(PACKED),
    f"{REF}.log_prob_use_dynamic_bsz": ignored(PACKED),
    f"{ACTOR}.strategy": ignored_if(["fsdp", "fsdp2"], "FSDP2 is the one strategy"),
    "critic.strategy": ignored_if(["fsdp", "fsdp2"], "FSDP2 is the one strategy"),
    f"{ACTOR}.ulysses_sequence_parallel_size": ignored(PLACEMENT),
    "critic.ulysses_sequence_parallel_size": ignored(PLACEMENT),
    f"{REF}.ulysses_sequence_parallel_size": ignored(PLACEMENT),
    f"{ACTOR}.shuffle": ignored("the order within a rollout batch is that of its prompts"),
    "critic.shuffle": ignored("the order within a rollout batch is that of its prompts"),
    f"{ACTOR}.fsdp_config.wrap_policy.min_num_params": ignored(PLACEMENT),
    f"{ACTOR}.fsdp_config.fsdp_size": ignored(PLACEMENT),
    f"{REF}.fsdp_config.fsdp_size": ignored(PLACEMENT),
    f"{ROLLOUT}.name": Fate(f"{ROLLOUT}.name", ONE_ENGINE, engine),
    f"{ROLLOUT}.do_sample": ignored_if([True], "training needs sampling"),
    f"{ROLLOUT}.ignore_eos": ignored_if([False], "a turn ends where the policy ends it"),
    f"{ROLLOUT}.free_cache_engine": ignored("the engine sleeps while the update runs"),
    f"{ROLLOUT}.load_format": ignored("the first weight sync brings the weights"),
    f"{ROLLOUT}.enable_chunked_prefill": ignored("vLLM does so by itself"),
    f"{ROLLOUT}.disable_log_stats": ignored("a matter of the console"),
    f"{ROLLOUT}.prompt_length": ignored("as data.max_prompt_length"),
    f"{ROLLOUT}.response_length": ignored("as data.max_response_length"),
    "reward_model.enable": ignored_if(
        [False], "there is no reward model; reward.judge asks one behind an endpoint"
    ),
    "trainer.logger": Fate(
        "trainer.logger", f"{', '.join(get_args(Logger))}; metrics.jsonl always", loggers
    ),
    "trainer.default_hdfs_dir": ignored_if(
        [None], "nothing is copied to HDFS: name a mounted folder"
    ),
}
"""Keys of verl 0.1, which the original Search-R1 contains, and of later verl."""

VERL = Project(
    keys={
        **COMMON,
        "data.max_prompt_length": Fate(
            "data.max_prompt_length",
            "bounds every context; the first prompt by max_start_length",
            also=lambda value: {"data.max_start_length": value},
        ),
        "data.max_response_length": Fate(
            "data.max_response_length", "of one turn, there of all turns together"
        ),
        "data.train_max_samples": Fate(
            "data.train_data_num", "a fixed random sample", all_if_negative
        ),
        "data.val_max_samples": Fate("data.val_data_num", "a fixed random sample", all_if_negative),
        "data.shuffle": Fate("data.shuffle_train_dataloader"),
        "data.seed": Fate("trainer.seed", "", lambda value, given: 0 if value is None else value),
        "data.filter_overlong_prompts": ignored(
            "a prompt longer than data.max_start_length is an error, with its row"
        ),
        "data.filter_overlong_prompts_workers": ignored("there is nothing to filter"),
        "data.truncation": ignored_if(
            ["error"], "no prompt is cut: a longer one is an error, with its row"
        ),
        "data.dataloader_num_workers": ignored("prompts are read once, at the start"),
        "data.reward_fn_key": ignored_if(["data_source"], "the column is `data_source`"),
        "data.trust_remote_code": Fate(f"{MODEL}.trust_remote_code"),
        f"{ACTOR}.ppo_mini_batch_size": Fate(
            f"{ACTOR}.ppo_mini_batch_size",
            "counts trajectories, there prompts: times rollout.n",
            trajectories,
        ),
        "critic.ppo_mini_batch_size": Fate(
            "critic.ppo_mini_batch_size",
            "counts trajectories, there prompts: times rollout.n",
            trajectories,
        ),
        f"{ACTOR}.optim.lr_warmup_steps": Fate(
            f"{ACTOR}.optim.lr_warmup_steps_ratio", "a share", warm_up_share
        ),
        f"{ACTOR}.optim.warmup_style": Fate(f"{ACTOR}.optim.lr_scheduler_type"),
        f"{ACTOR}.optim.total_training_steps": ignored(
            "trainer.total_training_steps, or what the epochs amount to"
        ),
        f"{ACTOR}.use_torch_compile": ignored("model.use_torch_compile compiles whole layers"),
        f"{ACTOR}.checkpoint.save_contents": ignored(
            "checkpoints hold everything, trainer.save_hf writes the model"
        ),
        f"{ACTOR}.fsdp_config.forward_prefetch": ignored(PLACEMENT),
        f"{MODEL}.use_shm": ignored("a matter of speed"),
        f"{MODEL}.use_liger": ignored("a matter of speed"),
        f"{MODEL}.use_fused_kernels": ignored("a matter of speed"),
        f"{MODEL}.enable_activation_offload": ignored(PLACEMENT),
        f"{ROLLOUT}.mode": ignored("every trajectory is a coroutine"),
        f"{ROLLOUT}.calculate_log_probs": ignored("the engine always reports them"),
        f"{ROLLOUT}.layered_summon": ignored("weights travel tensor by tensor"),
        f"{ROLLOUT}.val_kwargs.do_sample": ignored("val_kwargs.temperature=0 is greedy"),
        f"{ROLLOUT}.agent.num_workers": Fate(f"{ROLLOUT}.num_agent_workers"),
        f"{ROLLOUT}.multi_turn.enable": ignored_if(
            [True], "max_turns and do_search say so: do_search=false"
        ),
        f"{ROLLOUT}.multi_turn.format": ignored(
            "agent.format says how tools are called: tags, auto, or the name of a parser"
        ),
        f"{ROLLOUT}.multi_turn.max_assistant_turns": Fate(
            "max_turns", "the most searches: one less, as the last turn answers", searches
        ),
        f"{ROLLOUT}.multi_turn.max_turns": Fate(
            "max_turns", "the most searches: one less, as the last turn answers", searches
        ),
        f"{ROLLOUT}.multi_turn.max_user_turns": ignored("max_turns bounds them"),
        f"{ROLLOUT}.multi_turn.tool_config_path": ignored(
            "the file is not read: name tools by agent.tools, and the server of the searches by "
            "retriever.url and retriever.topk; agent.format says how they are called"
        ),
        "reward_model.reward_manager": ignored_if(
            ["naive"], "name a function by custom_reward_function.path"
        ),
        "reward_model.launch_reward_fn_async": ignored(
            "rewards are always computed as trajectories end"
        ),
        "trainer.resume_from_path": ignored_if(
            [None, False], "name the run by trainer.default_local_dir"
        ),
        "trainer.max_actor_ckpt_to_keep": Fate("trainer.max_ckpt_to_keep"),
        "trainer.max_critic_ckpt_to_keep": ignored("as trainer.max_ckpt_to_keep"),
        "trainer.balance_batch": ignored("ranks always get nearly equal numbers of tokens"),
        "trainer.log_val_generations": ignored("validations are always written to the run folder"),
        "trainer.rollout_data_dir": ignored(
            "trajectories are in the run folder (trainer.rollout_data_freq)"
        ),
        "trainer.validation_data_dir": ignored("validations are in the run folder"),
        "trainer.ray_wait_register_center_timeout": ignored("there is no such wait"),
    },
    defaults={
        "data.train_batch_size": 1024,
        "data.max_prompt_length": 512,
        "data.max_start_length": 512,
        "data.max_response_length": 512,
        "algorithm.adv_estimator": "gae",
        "algorithm.use_kl_in_reward": False,
        f"{ACTOR}.use_kl_loss": False,
        f"{ACTOR}.ppo_mini_batch_size": 256,
        f"{ROLLOUT}.n": 1,
        f"{ROLLOUT}.gpu_memory_utilization": 0.5,
        f"{ROLLOUT}.tensor_model_parallel_size": 2,
        "trainer.total_epochs": 30,
        "trainer.project_name": "verl_examples",
        "trainer.experiment_name": "gsm8k",
    },
    configs={
        "search_multiturn_grpo": {
            "data.max_prompt_length": 1024,
            "data.max_response_length": 1024,
            "data.train_batch_size": 256,
            "data.shuffle": False,
            f"{ROLLOUT}.multi_turn.enable": True,
            f"{ROLLOUT}.multi_turn.max_assistant_turns": 2,
        }
    },
)
"""verl, as of 2025: main_ppo with search as a tool (`examples/sglang_multiturn/search_r1_like`)."""
