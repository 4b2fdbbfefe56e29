"""Configuration of a run, and its validation: once, at the boundary, every problem at once."""

from typing import Any, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
)

from verl.utils.config import Config
from verl.utils.endpoint import check_endpoint
from verl.utils.errors import ConfigError
from verl.utils.loading import load_class, load_function
from verl.workers.config import ActorRolloutRefConfig, CriticConfig, KLPenalty


class DataConfig(Config):
    train_files: list[str]
    """Parquet files of training questions."""
    val_files: list[str]
    """Parquet files of held-out questions."""
    train_batch_size: PositiveInt = 512
    """Prompts per training step."""
    max_start_length: PositiveInt = 2048
    """Longest prompt, in tokens; a longer one is an error."""
    max_prompt_length: PositiveInt = 4096
    """Longest context given to the engine in any turn, in tokens."""
    max_response_length: PositiveInt = 500
    """Most tokens the policy may write in one turn."""
    max_obs_length: PositiveInt = 500
    """Most tokens of one observation."""
    train_data_num: PositiveInt | None = None
    """Use only the first rows of the training files; null: all."""
    val_data_num: PositiveInt | None = None
    """Use only the first rows of the validation files; null: all."""
    val_sample_per_source: PositiveInt | None = None
    """Use a fixed random sample of so many validation questions of every data_source; null: all."""
    val_sample_seed: int = 0
    """What that sample is drawn with."""
    shuffle_train_dataloader: bool = True
    """A new permutation every epoch, drawn from trainer.seed."""
    apply_chat_template_kwargs: dict[str, Any] = {}
    """Further arguments of the tokenizer's chat template."""

    @field_validator("train_files", "val_files", mode="before")
    @classmethod
    def _one_file(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


class KLControlConfig(Config):
    type: Literal["fixed", "adaptive"] = "fixed"
    """adaptive moves the coefficient to keep the KL near target_kl (arXiv 1909.08593)."""
    kl_coef: NonNegativeFloat = 0.001
    """The coefficient, or where it starts."""
    horizon: PositiveInt = 10_000
    """Trajectories over which the adaptive coefficient reacts."""
    target_kl: PositiveFloat = 0.1
    """What the adaptive coefficient aims at."""


class FilterGroupsConfig(Config):
    """Dynamic sampling (DAPO, arXiv 2503.14476): groups whose trajectories all score the same are replaced."""

    enable: bool = False
    """Roll out further prompts until data.train_batch_size groups differ within."""
    metric: str = "score"
    """Which entry of the reward must differ."""
    max_num_gen_batches: PositiveInt = 10
    """Rollout batches per training step at most; then the step trains on what there is."""


LossFilter = Literal["zero_variance", "void_turn", "truncated"]


class AlgorithmConfig(Config):
    adv_estimator: Literal[
        "gae", "grpo", "dr_grpo", "rloo", "reinforce", "reinforce_plus_plus", "reinforce_plus_plus_baseline",
        "turn_level",
    ] = "gae"  # fmt: skip
    """gae is PPO with a critic. grpo, dr_grpo (no std), rloo, reinforce_plus_plus_baseline and turn_level compare the
    trajectories of one prompt; reinforce and reinforce_plus_plus take the returns as they are, the latter whitened."""
    gamma: float = Field(default=1.0, gt=0, le=1)
    """Discount per token of the policy."""
    lam: float = Field(default=1.0, ge=0, le=1)
    """GAE lambda."""
    norm_adv_by_std_in_grpo: bool = True
    """Divide by the group's standard deviation; false is Dr. GRPO's numerator."""
    filter_groups: FilterGroupsConfig = FilterGroupsConfig()
    loss_filters: list[LossFilter] = []
    """Trajectories left out of the policy loss, after their group's advantages were computed: of groups that all
    score the same; with a turn that neither acts nor answers (SimpleTIR, arXiv 2509.02479); cut off by a limit."""
    use_kl_in_reward: bool = False
    """Subtract the KL to the reference from the rewards (PPO)."""
    kl_penalty: KLPenalty = "kl"
    """Its estimator."""
    kl_ctrl: KLControlConfig = KLControlConfig()


class TrainerConfig(Config):
    project_name: str = "search-r1"
    """Project in wandb."""
    experiment_name: str = "run"
    """Run in wandb; also the name of the run folder in the default of default_local_dir."""
    default_local_dir: str = "runs/run"
    """The run folder: checkpoints, metrics.jsonl, trajectories, config.yaml."""
    logger: list[Literal["console", "wandb"]] = ["console", "wandb"]
    """Where metrics go besides metrics.jsonl. Without a key wandb stays offline."""
    panels: dict[str, str] = {}
    """Metrics to show again under another name, so that wandb groups them: {panel: metric}."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto: cuda where torch sees one."""
    nnodes: PositiveInt = 1
    """Nodes."""
    n_gpus_per_node: PositiveInt = 8
    """Training processes per node: GPUs, or gloo ranks on CPU."""
    threads_per_rank: PositiveInt | None = None
    """CPU threads of a training process on CPU; null: torch decides."""
    ray_address: str | None = None
    """Ray cluster to join; null: start one on this machine."""
    seed: int = 0
    """Seeds data order, sampling and initial value head."""
    total_epochs: PositiveInt = 15
    """Passes over the training data, unless total_training_steps says otherwise."""
    total_training_steps: PositiveInt | None = None
    """Training steps; null: from total_epochs."""
    critic_warmup: NonNegativeInt = 0
    """Steps in which only the critic learns."""
    val_before_train: bool = True
    """Validate the initial policy."""
    val_only: bool = False
    """Validate and stop."""
    test_freq: int = -1
    """Validate every so many steps, and at the end; -1: only at the end."""
    save_freq: int = -1
    """Checkpoint every so many steps, and at the end; -1: only at the end."""
    max_ckpt_to_keep: PositiveInt | None = None
    """Delete older checkpoints; null: keep all."""
    resume_mode: Literal["auto", "disable"] = "auto"
    """auto continues from the newest checkpoint in default_local_dir."""
    save_hf: bool = True
    """Write the final policy in Hugging Face format to default_local_dir/hf."""
    rollout_data_freq: int = 10
    """Write the trajectories of every so many training steps; -1: never. Validations are always written."""
    max_failed_share: float = Field(default=0.1, ge=0, le=1)
    """Stop when a larger share of a batch's trajectories failed (environment, not policy)."""
    max_skipped_steps: PositiveInt = 3
    """Stop after so many training steps in a row with a loss or gradient that is not finite."""


class CustomRewardConfig(Config):
    path: str | None = None
    """Python file."""
    name: str = "compute_score"
    """Function in it: compute_score(data_source, solution_str, ground_truth, extra_info)."""


class PPOConfig(Config):
    """Everything the library reads. `agent` and `reward` belong to the classes that their `_target_` names."""

    data: DataConfig
    actor_rollout_ref: ActorRolloutRefConfig
    critic: CriticConfig
    algorithm: AlgorithmConfig = AlgorithmConfig()
    trainer: TrainerConfig = TrainerConfig()
    agent: dict[str, Any]
    reward: dict[str, Any]
    custom_reward_function: CustomRewardConfig = CustomRewardConfig()

    @property
    def use_critic(self) -> bool:
        return self.algorithm.adv_estimator == "gae"

    @property
    def compares(self) -> bool:
        """Whether advantages come from comparing the trajectories of one prompt."""
        return self.algorithm.adv_estimator not in ("gae", "reinforce", "reinforce_plus_plus")

    @property
    def use_reference(self) -> bool:
        return self.actor_rollout_ref.actor.use_kl_loss or self.algorithm.use_kl_in_reward

    @property
    def max_model_len(self) -> int:
        """Longest sequence of the engine, in tokens."""
        return self.actor_rollout_ref.rollout.max_model_len or (
            self.data.max_prompt_length + self.data.max_response_length
        )

    @property
    def num_mini_batches(self) -> int:
        """Optimizer steps per rollout batch and epoch."""
        rollout_batch = self.data.train_batch_size * self.actor_rollout_ref.rollout.n
        return rollout_batch // self.actor_rollout_ref.actor.ppo_mini_batch_size


def validate(raw: dict[str, Any]) -> PPOConfig:
    """The typed configuration of a composed one. Raises ConfigError listing every wrong key, type and combination."""
    problems: list[str] = []
    task_keys: frozenset[str] = frozenset()
    for section in ("agent", "reward"):
        target = dict(raw.get(section) or {}).get("_target_")
        if target is None:
            problems.append(f"{section}._target_: name the class to use")
            continue
        try:
            cls = load_class(target, f"{section}._target_")
        except ConfigError as error:
            problems += error.problems
            continue
        task_keys |= getattr(cls, "top_level_keys", frozenset())
        problems += _errors(cls.Config, _without_target(raw[section]), f"{section}.")
    known = {k: v for k, v in raw.items() if k not in task_keys or k in PPOConfig.model_fields}
    problems += _errors(PPOConfig, known, "")
    if problems:
        raise ConfigError(problems)
    config = PPOConfig.model_validate(known)
    if problems := combination_problems(config):
        raise ConfigError(problems)
    return config


def _errors(model: type[Any], section: dict[str, Any], prefix: str) -> list[str]:
    try:
        model.model_validate(section)
    except ValidationError as error:
        return [f"{prefix}{'.'.join(map(str, e['loc']))}: {e['msg']} (got {e['input']!r})" for e in error.errors()]
    return []


def _without_target(section: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in section.items() if k != "_target_"}


def combination_problems(config: PPOConfig) -> list[str]:
    """Settings that are valid alone and cannot work together."""
    rollout, actor, critic = config.actor_rollout_ref.rollout, config.actor_rollout_ref.actor, config.critic
    batch = config.data.train_batch_size * rollout.n
    processes = config.trainer.nnodes * config.trainer.n_gpus_per_node
    problems: list[str] = []
    sections = [("actor_rollout_ref.actor", actor.ppo_mini_batch_size)]
    if config.use_critic:
        sections.append(("critic", critic.ppo_mini_batch_size))
    for name, mini in sections:
        if batch % mini:
            problems.append(
                f"{name}.ppo_mini_batch_size={mini} does not divide data.train_batch_size * rollout.n = {batch}"
            )
        if mini < processes:
            problems.append(f"{name}.ppo_mini_batch_size={mini} is less than the {processes} training processes")
    if config.compares and rollout.n < 2:
        problems.append(
            f"algorithm.adv_estimator={config.algorithm.adv_estimator} needs actor_rollout_ref.rollout.n >= 2: it "
            "compares trajectories of one prompt"
        )
    if rollout.temperature == 0:
        problems.append("actor_rollout_ref.rollout.temperature=0: training needs sampling")
    if processes % rollout.tensor_model_parallel_size:
        problems.append(f"rollout.tensor_model_parallel_size does not divide the {processes} training processes")
    if config.max_model_len < config.data.max_start_length + config.data.max_response_length:
        problems.append(
            f"actor_rollout_ref.rollout.max_model_len={config.max_model_len} holds less than "
            "data.max_start_length + data.max_response_length"
        )
    if config.data.max_start_length > config.data.max_prompt_length:
        problems.append("data.max_start_length is more than data.max_prompt_length, which bounds every context")
    return problems + loss_problems(config) + endpoint_problems(config)


def loss_problems(config: PPOConfig) -> list[str]:
    """Losses that their aggregation, or the number of optimizer steps, makes something else."""
    actor, estimator = config.actor_rollout_ref.actor, config.algorithm.adv_estimator
    agg, mode, key = actor.loss_agg_mode, actor.policy_loss.loss_mode, "actor_rollout_ref.actor"
    steps = config.num_mini_batches * actor.ppo_epochs
    norm = "seq-mean-token-sum-norm"
    found = {
        f"{key}.loss_scale_factor: name the divisor of loss_agg_mode={norm}":
            agg == norm and actor.loss_scale_factor is None,
        f"critic.loss_agg_mode={norm} has no divisor: set it on its own, for instance to token-mean":
            config.use_critic and config.critic.loss_agg_mode == norm,
        f"{key}.loss_agg_mode={agg} divides by lengths, which algorithm.adv_estimator=dr_grpo is to avoid: use {norm} "
        "(with loss_scale_factor) or token-sum":
            estimator == "dr_grpo" and agg not in (norm, "token-sum"),
        f"{key}.loss_agg_mode={agg}: policy_loss.loss_mode=gspo is defined for seq-mean-token-mean":
            mode == "gspo" and agg != "seq-mean-token-mean",
        f"{key}.policy_loss.loss_mode=reinforce has no trust region and would take {steps} optimizer steps on one "
        "rollout batch: set ppo_mini_batch_size to train_batch_size * rollout.n, and ppo_epochs to 1":
            mode == "reinforce" and steps > 1,
        f"{key}.state_masking=false trains on tokens of no turn, which adv_estimator=turn_level cannot credit":
            estimator == "turn_level" and not actor.state_masking,
    }  # fmt: skip
    return [problem for problem, holds in found.items() if holds]


def endpoint_problems(config: PPOConfig) -> list[str]:
    """What an endpoint in the place of an engine lacks."""
    rollout, model = config.actor_rollout_ref.rollout, config.actor_rollout_ref.model
    problems: list[str] = []
    if rollout.name != "openai":
        return problems
    if not rollout.endpoint.url:
        problems.append("actor_rollout_ref.rollout.endpoint.url: name the endpoint of rollout.name=openai")
    if model.tokenizer_path is None:
        problems.append(
            "actor_rollout_ref.model.tokenizer_path: an endpoint needs a tokenizer here, in whose tokens the budgets "
            "(data.max_*_length) are counted; any that is close to the model's own will do"
        )
    return problems


def environment_problems(config: PPOConfig, agent: Any) -> list[str]:
    """A model that cannot hold a trajectory, an endpoint or a retriever that does not answer."""
    rollout = config.actor_rollout_ref.rollout
    if rollout.name == "openai":
        problem = check_endpoint(rollout.endpoint)
        problems = [f"actor_rollout_ref.rollout.endpoint.url: {problem}"] if problem else []
    else:
        problems = context_problems(config)
    return problems + agent.preflight()


def context_problems(config: PPOConfig) -> list[str]:
    """Whether the model can hold a whole trajectory: the engine would refuse it only after everything has started."""
    from transformers import AutoConfig

    model = config.actor_rollout_ref.model
    text = AutoConfig.from_pretrained(model.path, trust_remote_code=model.trust_remote_code).get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    is_scaled = (getattr(text, "rope_parameters", None) or {}).get("rope_type", "default") != "default"
    if limit is None or is_scaled or config.max_model_len <= limit:
        return []
    return [
        f"data.max_prompt_length + data.max_response_length = {config.max_model_len} is more than the {limit} tokens "
        f"that {model.path} can hold (max_position_embeddings)"
    ]


def build_tokenizer(config: PPOConfig) -> Any:
    """The tokenizer of the policy. Raises ConfigError when there is none at the configured path.

    Of a chat endpoint it only counts and cuts: the endpoint applies its own template.
    """
    from transformers import AutoTokenizer

    model, rollout = config.actor_rollout_ref.model, config.actor_rollout_ref.rollout
    path = model.tokenizer_path or model.path
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=model.trust_remote_code)
    except (OSError, ValueError) as error:
        key = "actor_rollout_ref.model." + ("tokenizer_path" if model.tokenizer_path else "path")
        raise ConfigError([f"{key}={path}: no tokenizer could be loaded ({error})"]) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if rollout.name == "openai" and rollout.endpoint.api == "chat":
        tokenizer.chat_template = None
    return tokenizer


def build_agent(config: PPOConfig, tokenizer: Any) -> Any:
    """The agent loop that `agent._target_` names."""
    cls = load_class(config.agent["_target_"], "agent._target_")
    return cls(cls.Config.model_validate(_without_target(config.agent)), tokenizer)


def build_reward(config: PPOConfig, tokenizer: Any) -> Any:
    """The reward: `custom_reward_function` where given, else the class that `reward._target_` names."""
    custom = config.custom_reward_function
    if custom.path is not None:
        reward_cls = load_class("verl.utils.reward.FunctionReward", "reward")
        return reward_cls(load_function(custom.path, custom.name, "custom_reward_function"), tokenizer)
    cls = load_class(config.reward["_target_"], "reward._target_")
    return cls(cls.Config.model_validate(_without_target(config.reward)), tokenizer)
