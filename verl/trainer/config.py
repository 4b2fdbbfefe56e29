"""The configuration of a run: its pydantic models, its validation, and the objects that it names.

It is validated once, when the run starts, and all problems of a kind are reported together.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    BaseModel,
    Field,
    FiniteFloat,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
)

from verl.agent import AgentLoop
from verl.trainer.checks import combination_problems
from verl.trainer.ppo.collapse import CollapseWatchConfig
from verl.trainer.ppo.gate import GateConfig
from verl.utils.config import Config, OneOf, problems_of
from verl.utils.errors import ConfigError
from verl.utils.images import ImageReader
from verl.utils.loading import load_class, load_function
from verl.utils.model_names import is_checkpoint, is_place, is_run
from verl.utils.reward import FunctionReward, check_signature
from verl.utils.schedule import Weight, check_shares
from verl.utils.tokenizer import template_problems
from verl.workers.config import ActorRolloutRefConfig, CriticConfig, KLPenalty, TeacherConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from verl.trainer.ppo.core_algos.advantages import AdvantageEstimator


Logger = Literal["console", "wandb", "tensorboard", "mlflow", "trackio", "swanlab"]


class DataConfig(Config):
    train_files: list[str]
    """Parquet files of training questions."""
    val_files: list[str]
    """Parquet files of held-out questions."""
    made_by: str | None = None
    """Command that makes these files, for the error where one is missing; null: unknown."""
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
    """Use a fixed random sample of this many training questions, with each data_source in
    proportion; null: all."""
    train_sample_seed: int = 0
    """Seed of that sample."""
    val_data_num: PositiveInt | None = None
    """Use a fixed random sample of this many validation questions, with each data_source in
    proportion; null: all."""
    val_sample_per_source: PositiveInt | None = None
    """Use a fixed random sample of this many validation questions per data_source; null: all."""
    val_sample_seed: int = 0
    """Seed of these two samples."""
    shuffle_train_dataloader: bool = True
    """Draw a new order of the questions every epoch, from trainer.seed."""
    source_weights: dict[str, Weight] = {}
    """Weight of every data_source in the batches, a number or a schedule `[[step, weight], ...]`,
    such as `{nq: 1, hotpotqa: [[0, 0], [100, 3]]}`. Empty: all questions in one order."""
    gate: GateConfig = GateConfig()
    apply_chat_template_kwargs: dict[str, Any] = {}
    """Further arguments of the tokenizer's chat template."""

    @field_validator("train_files", "val_files", mode="before")
    @classmethod
    def _one_file(cls, value: object) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("source_weights")
    @classmethod
    def _some_source_at_every_step(cls, value: dict[str, Weight]) -> dict[str, Weight]:
        check_shares(value)
        return value


class KLControlConfig(Config):
    type: Literal["fixed", "adaptive"] = "fixed"
    """adaptive moves the coefficient to keep the KL near target_kl (arXiv 1909.08593)."""
    kl_coef: NonNegativeFloat = 0.001
    """The coefficient; the first one where it is adaptive."""
    horizon: PositiveInt = 10_000
    """Trajectories over which the adaptive coefficient reacts."""
    target_kl: PositiveFloat = 0.1
    """The KL that the adaptive coefficient aims at."""


class FilterGroupsConfig(Config):
    """Dynamic sampling (DAPO, arXiv 2503.14476).

    Groups whose trajectories all score the same are replaced.
    """

    enable: bool = False
    """Roll out further prompts until data.train_batch_size groups have differing scores."""
    metric: str = "score"
    """Which number of the reward must differ: score, or a component that every trajectory has."""
    max_num_gen_batches: PositiveInt = 10
    """Most rollout batches per training step; after that the step trains on the groups it has."""


class InformationGainConfig(Config):
    """A reward for turns after which the right answer is likelier (IGPO, arXiv 2510.14967)."""

    weight: FiniteFloat = 0.0
    """Weight of the gain of each turn, in the probability that the policy gives to the first
    accepted answer; 0: it is not computed. It takes a forward pass for each turn."""
    before: str = "<answer>"
    """What stands between the context and the answer, as if the policy had written it."""
    answer: str = " {answer} </answer>"
    """The text whose probability is asked for, with `{answer}` for the answer."""

    @field_validator("answer")
    @classmethod
    def _has_the_answer(cls, value: str) -> str:
        if "{answer}" not in value:
            raise ValueError("expected a text with {answer} in the place of the answer")
        return value


Level = Annotated[str, OneOf("verl.trainer.ppo.core_algos.LEVELS")]


class RolloutCorrectionConfig(Config):
    """Correction for tokens that were not sampled from the policy that is trained."""

    rollout_is: Level | None = None
    """Weigh the loss by truncated importance weights of tokens, sequences, or their geometric mean;
    null: do not."""
    rollout_is_threshold: PositiveFloat = 2.0
    """Largest weight."""
    rollout_rs: Level | None = None
    """Leave tokens, or whole sequences, out of the loss if their ratio is outside of the
    thresholds; null: do not."""
    rollout_rs_threshold: PositiveFloat = 2.0
    """Largest ratio that stays."""
    rollout_rs_threshold_lower: PositiveFloat | None = None
    """Smallest ratio that stays; null: 1 / rollout_rs_threshold."""
    rollout_token_veto_threshold: float | None = Field(default=None, gt=0, lt=1)
    """Leave out a sequence if the ratio of any of its tokens is below this, such as 1e-4; null: do
    not."""
    bypass_mode: bool = False
    """Use the sampler's log-probs as old log-probs: the clip is then a trust region around the
    policy that sampled, even if that is stale. False: compute old log-probs with the weights before
    the update (decoupled PPO, arXiv 2505.24298)."""

    @property
    def corrects(self) -> bool:
        """Whether tokens from another distribution are weighed or left out."""
        return self.rollout_is is not None or self.rollout_rs is not None

    @property
    def lowest_ratio(self) -> float:
        """Smallest ratio that `rollout_rs` keeps."""
        return self.rollout_rs_threshold_lower or 1 / self.rollout_rs_threshold


Estimator = Annotated[str, OneOf("verl.trainer.ppo.core_algos.ADVANTAGE_ESTIMATORS")]
LossFilter = Annotated[str, OneOf("verl.trainer.ppo.filters.FILTERS")]


class AlgorithmConfig(Config):
    adv_estimator: Estimator = "gae"
    """How rewards become advantages; docs/algorithms.md says what each does and needs. gae is PPO,
    with a critic. none leaves everything to the teacher."""
    gamma: float = Field(default=1.0, gt=0, le=1)
    """Discount per token of the policy; with gigpo and igpo, per turn."""
    lam: float = Field(default=1.0, ge=0, le=1)
    """GAE lambda."""
    norm_adv_by_std_in_grpo: bool = True
    """Divide by the group's standard deviation; false: do not, as in Dr. GRPO."""
    step_advantage_w: float = Field(default=1.0, ge=0)
    """Weight of the advantage of a turn beside that of its trajectory, with gigpo."""
    information_gain: InformationGainConfig = InformationGainConfig()
    filter_groups: FilterGroupsConfig = FilterGroupsConfig()
    loss_filters: list[LossFilter] = []
    """Filters that leave trajectories out of the policy loss, after the advantages of their group
    were computed. zero_variance: groups that all score the same. void_turn: trajectories with a
    turn that neither acts nor answers (SimpleTIR, arXiv 2509.02479). truncated: trajectories cut
    off by a limit."""
    rollout_correction: RolloutCorrectionConfig = RolloutCorrectionConfig()
    use_kl_in_reward: bool = False
    """Subtract the KL to the reference from the rewards (PPO)."""
    kl_penalty: KLPenalty = "kl"
    """Estimator of the KL in the reward."""
    kl_ctrl: KLControlConfig = KLControlConfig()


class AsyncTrainingConfig(Config):
    """Rolling out while the weights are updated."""

    max_staleness: NonNegativeInt = 0
    """Batches of prompts that are rolled out ahead; tokens are at most this many weight versions
    old when they are trained on. 0: synchronous; 1 with partial_rollout=false: one step off."""
    partial_rollout: bool = True
    """Give new weights to trajectories under way between two of their turns; false: wait with the
    weights until all trajectories have ended."""


class TrajectoryRecordsConfig(Config):
    """What the records of trajectories hold of single tokens (docs/viewer.md)."""

    tokens: bool = True
    """Write where the text of each token of the policy ends, and with what it was trained: mask,
    log-probs, entropy, advantage, value."""
    prompts: NonNegativeInt | None = 4
    """Prompts of a recorded training step whose trajectories are written with that; null: all."""


class TrainerConfig(Config):
    project_name: str = "search-r1"
    """Project in the services that show curves."""
    experiment_name: str
    """Run in the services that show curves; also the name of the run folder in the default of
    default_local_dir."""
    default_local_dir: str
    """The run folder: checkpoints, metrics.jsonl, trajectories, config.yaml."""
    logger: list[Logger] = ["console", "wandb"]
    """Where metrics go besides metrics.jsonl: the console, and services that show curves, each by
    its own client (docs/tracking.md). Without a key wandb and swanlab stay offline."""
    alert_webhook_env: str | None = "ALERT_WEBHOOK"
    """Environment variable that may hold the address of a webhook of a chat service, which is told
    of a collapse and of the end of the run; null: nobody is told."""
    panels: dict[str, str] = {}
    """Metrics to show again under another name, so that services group them: {panel: metric}."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto: cuda where torch sees one."""
    nnodes: PositiveInt = 1
    """Nodes of the training."""
    n_gpus_per_node: PositiveInt = 8
    """Training processes per node: GPUs, or gloo ranks on CPU."""
    threads_per_rank: PositiveInt | None = None
    """CPU threads of a training process on CPU; null: the ranks of a machine share its cores."""
    ray_address: str | None = None
    """Ray cluster to join; null: start one on this machine."""
    seed: int = 0
    """Seeds data order, sampling and initial value head."""
    total_epochs: PositiveInt = 15
    """Passes over the training data, unless total_training_steps says otherwise."""
    total_training_steps: PositiveInt | None = None
    """Training steps; null: total_epochs * questions // data.train_batch_size."""
    critic_warmup: NonNegativeInt = 0
    """Steps in which only the critic learns."""
    val_before_train: bool = True
    """Validate the initial policy."""
    val_only: bool = False
    """Validate and stop."""
    test_freq: int = -1
    """Steps between two validations, with another one at the end; -1: only at the end."""
    save_freq: int = -1
    """Steps between two checkpoints, with another one at the end; -1: only at the end."""
    max_ckpt_to_keep: PositiveInt | None = None
    """Number of newest checkpoints to keep, beside the best one and the one that a roll-back would
    need; null: all."""
    best_metric: str | None = "val/test_score/all"
    """Also keep the checkpoint of the step with the highest value of this metric; null: do not."""
    async_save: bool = True
    """Write checkpoints in the background, from a copy in host memory."""
    deterministic: bool = False
    """The same bits in every run of the same configuration; `+mode=deterministic` sets what that
    needs."""
    resume_mode: Literal["auto", "disable"] = "auto"
    """auto continues from the newest checkpoint in default_local_dir."""
    save_hf: bool = True
    """Write the final policy in Hugging Face format to default_local_dir/hf."""
    rollout_data_freq: int = 10
    """Training steps between two writes of trajectories; -1: never. Those of validations are always
    written."""
    trajectory_records: TrajectoryRecordsConfig = TrajectoryRecordsConfig()
    max_failed_share: float = Field(default=0.1, ge=0, le=1)
    """Stop when a larger share of a batch's trajectories failed (environment, not policy)."""
    max_skipped_steps: PositiveInt = 3
    """Stop after this many training steps in a row with a loss or gradient that is not finite."""
    max_restarts: NonNegativeInt = 3
    """Most restarts of the driver in a row without a new checkpoint in between. It is restarted
    when it, a rank or an engine was killed, and when it hung."""
    hang_timeout_s: PositiveFloat = 3600.0
    """Longest time without progress, in seconds: no verb of a training step begins, and no
    trajectory that is waited for finishes. After it all stacks are written to the run folder and
    the driver is restarted."""
    collapse_watch: CollapseWatchConfig = CollapseWatchConfig()


class CustomRewardConfig(Config):
    path: str | None = None
    """Python file."""
    name: str = "compute_score"
    """Function in that file, called with keywords: compute_score(data_source, solution_str,
    ground_truth, extra_info). It returns a number, or a dict with a number under `score`."""


class PPOConfig(Config):
    """Everything the library reads.

    The sections `agent` and `reward` belong to the classes that their `_target_` names.
    """

    data: DataConfig
    actor_rollout_ref: ActorRolloutRefConfig
    critic: CriticConfig
    teacher: TeacherConfig
    algorithm: AlgorithmConfig = AlgorithmConfig()
    async_training: AsyncTrainingConfig = AsyncTrainingConfig()
    trainer: TrainerConfig
    agent: dict[str, Any] = {}
    reward: dict[str, Any] = {}
    custom_reward_function: CustomRewardConfig = CustomRewardConfig()

    @property
    def device(self) -> str:
        """`cuda` or `cpu`."""
        if self.trainer.device != "auto":
            return self.trainer.device
        from torch.cuda import is_available

        return "cuda" if is_available() else "cpu"

    @property
    def use_critic(self) -> bool:
        return self._estimator.uses_critic

    @property
    def ignored_by_estimator(self) -> dict[str, Any]:
        """Settings of the advantage that differ from the default and that its estimator ignores."""
        defaults = AlgorithmConfig()
        return {
            name: value
            for name in ("gamma", "lam", "norm_adv_by_std_in_grpo", "step_advantage_w")
            if (value := getattr(self.algorithm, name)) != getattr(defaults, name)
            and not self._estimator.takes(name)
            # without the std is what dr_grpo is
            and (name, self.algorithm.adv_estimator) != ("norm_adv_by_std_in_grpo", "dr_grpo")
        }

    @property
    def uses_groups(self) -> bool:
        """Whether advantages come from comparing the trajectories of one prompt."""
        return self._estimator.uses_groups

    @property
    def uses_greedy(self) -> bool:
        """Whether a greedy trajectory of each prompt is rolled out beside the trained ones."""
        return self._estimator.uses_greedy

    @property
    def uses_trees(self) -> bool:
        """Whether advantages come from comparing trajectories that branched off each other."""
        return self._estimator.uses_trees

    @property
    def credits_turns(self) -> bool:
        """Whether each turn of the policy has an advantage of its own."""
        return self._estimator.takes("turns")

    @property
    def _estimator(self) -> "AdvantageEstimator":
        # imported here because the estimators need torch, which delays --help by seconds
        from verl.trainer.ppo.core_algos import ADVANTAGE_ESTIMATORS

        return ADVANTAGE_ESTIMATORS[self.algorithm.adv_estimator]

    @property
    def use_reference(self) -> bool:
        return self.actor_rollout_ref.actor.use_kl_loss or self.algorithm.use_kl_in_reward

    @property
    def use_teacher(self) -> bool:
        return self.teacher.weight > 0

    @property
    def num_gpus(self) -> int:
        """The number of GPUs of the training and of engines with GPUs of their own.

        On the CPU it is the number of training processes.
        """
        training = self.trainer.nnodes * self.trainer.n_gpus_per_node
        if self.actor_rollout_ref.hybrid_engine or self.device == "cpu":
            return training
        rollout = self.actor_rollout_ref.rollout
        return training + rollout.nnodes * rollout.n_gpus_per_node

    @property
    def max_model_len(self) -> int:
        """Longest sequence of the engine, in tokens."""
        return self.actor_rollout_ref.rollout.max_model_len or (
            self.data.max_prompt_length + self.data.max_response_length
        )

    @property
    def rollout_batch_size(self) -> int:
        """Trajectories of one training step."""
        return self.data.train_batch_size * self.actor_rollout_ref.rollout.n

    @property
    def num_mini_batches(self) -> dict[str, int]:
        """Optimizer steps per rollout batch and epoch, for the actor and the critic if any."""
        # imported here because the protocol needs torch, which delays --help by seconds
        from verl.protocol import ACTOR_MINI_BATCH, CRITIC_MINI_BATCH

        actor = self.actor_rollout_ref.actor
        steps = {ACTOR_MINI_BATCH: self.rollout_batch_size // actor.ppo_mini_batch_size}
        if self.use_critic:
            critic_steps = self.rollout_batch_size // self.critic.ppo_mini_batch_size
            steps[CRITIC_MINI_BATCH] = critic_steps
        return steps

    def total_training_steps(self, num_rows: int) -> int:
        """trainer.total_training_steps, or the steps of trainer.total_epochs over `num_rows`."""
        if self.trainer.total_training_steps is not None:
            return self.trainer.total_training_steps
        return max(1, self.trainer.total_epochs * num_rows // self.data.train_batch_size)


def validate(raw: dict[str, Any]) -> PPOConfig:
    """Validates a composed configuration and returns it as a typed one.

    Raises ConfigError listing every wrong key and value or, if there is none, every combination of
    values that cannot work.
    """
    problems: list[str] = []
    keys_of_task: set[str] = set()
    further_sections: dict[str, type[BaseModel]] = {}
    for section in ("agent", "reward"):
        try:
            cls = section_class(section, raw.get(section))
        except ConfigError as error:
            problems += error.problems
            keys_of_task |= raw.keys()  # only the class knows which keys are the task's
            continue
        keys = getattr(cls, "top_level_keys", frozenset())
        keys_of_task |= raw.keys() if keys is None else keys
        further_sections |= getattr(cls, "sections", {})
        problems += _errors(cls.Config, _without_target(raw[section]), f"{section}.")
    of_others = keys_of_task - PPOConfig.model_fields.keys()
    known = {key: value for key, value in raw.items() if key not in of_others}
    problems += _errors(PPOConfig, known, "")
    for name, model in further_sections.items():
        problems += _errors(model, raw.get(name, {}), f"{name}.")
    if problems:
        raise ConfigError(problems)
    config = PPOConfig.model_validate(known)
    if problems := combination_problems(config):
        raise ConfigError(problems)
    return config


def section_class(name: str, section: object) -> Any:
    """Loads the class that a section names.

    Raises ConfigError if it does not exist or is not of the kind that the section needs.
    """
    target = section.get("_target_") if isinstance(section, dict) else None
    if not isinstance(target, str):
        raise ConfigError([f"{name}._target_: name the class to use"])
    cls = load_class(target, f"{name}._target_")
    if name == "agent" and not (isinstance(cls, type) and issubclass(cls, AgentLoop)):
        raise ConfigError([f"agent._target_={target}: expected a subclass of verl.agent.AgentLoop"])
    model = getattr(cls, "Config", None)
    if not (isinstance(model, type) and issubclass(model, BaseModel)):
        raise ConfigError(
            [
                f"{name}._target_={target}: expected a class with `Config`, the pydantic model of "
                f"{name}"
            ]
        )
    return cls


def _errors(model: type[Any], section: dict[str, Any], prefix: str) -> list[str]:
    try:
        model.model_validate(section)
    except ValidationError as error:
        return problems_of(error, prefix, model)
    return []


def _without_target(section: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in section.items() if k != "_target_"}


def build_tokenizer(config: PPOConfig) -> Any:
    """Loads the tokenizer of the policy.

    With a chat endpoint it is only used to count and cut tokens, because the endpoint applies its
    own template. Raises ConfigError when there is no tokenizer at the configured path, and for
    arguments that its chat template does not read.
    """
    from transformers import AutoTokenizer

    model = config.actor_rollout_ref.model
    rollout = config.actor_rollout_ref.rollout
    path = model.tokenizer_path or model.path
    key = "actor_rollout_ref.model." + ("tokenizer_path" if model.tokenizer_path else "path")
    if is_place(path) and not Path(path).exists():
        raise ConfigError([f"{key}={path}: no such folder, and no name on the hub"])
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=model.trust_remote_code)
    except (OSError, ValueError) as error:
        problem = f"{key}={path}: no tokenizer could be loaded ({error})"
        if is_checkpoint(Path(path)) or is_run(Path(path)):
            problem = f"{key}={path}: a checkpoint, not a Hugging Face model: export it first"
        raise ConfigError([problem]) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if rollout.name == "openai" and rollout.endpoint.api == "chat":
        tokenizer.chat_template = None
    if problems := template_problems(tokenizer, config.data.apply_chat_template_kwargs):
        raise ConfigError([f"data.apply_chat_template_kwargs.{problem}" for problem in problems])
    return tokenizer


def build_agent(config: PPOConfig, tokenizer: "PreTrainedTokenizerBase") -> Any:
    """Builds the agent loop that `agent._target_` names."""
    cls = load_class(config.agent["_target_"], "agent._target_")
    agent = cls(cls.Config.model_validate(_without_target(config.agent)), tokenizer)
    reader = build_image_reader(config)
    if reader is not None:
        if not agent.reads_images:
            raise ConfigError(
                [
                    "actor_rollout_ref.model.reads_images=true: the agent loop "
                    f"{config.agent['_target_']} puts no images into contexts"
                ]
            )
        agent.read_images_by(reader)
    return agent


def build_image_reader(config: PPOConfig) -> ImageReader | None:
    """Loads the image processor of the policy; None for a policy that reads no images.

    Raises ConfigError where there is none.
    """
    model = config.actor_rollout_ref.model
    if not model.reads_images:
        return None
    path = model.tokenizer_path or model.path
    try:
        return ImageReader(path, model.trust_remote_code)
    except (OSError, ValueError) as error:
        raise ConfigError(
            [
                "actor_rollout_ref.model.reads_images=true: no processor of images could be "
                f"loaded from {path} ({error})"
            ]
        ) from error


def build_reward(config: PPOConfig, tokenizer: "PreTrainedTokenizerBase") -> Any:
    """Builds the reward: a `custom_reward_function`, or the class that `reward._target_` names."""
    custom = config.custom_reward_function
    if custom.path is not None:
        function = load_function(custom.path, custom.name, "custom_reward_function")
        check_signature(function, f"custom_reward_function.name={custom.name}")
        return FunctionReward(function, tokenizer)
    cls = load_class(config.reward["_target_"], "reward._target_")
    return cls(cls.Config.model_validate(_without_target(config.reward)), tokenizer)
