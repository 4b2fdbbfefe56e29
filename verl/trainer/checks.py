"""Checks of a configuration whose keys and types are right: settings that contradict each other.

Each check returns its problems as texts that name the key and the reason. They read the
configuration alone; `verl.trainer.environment` looks at what it names.
"""

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from verl.trainer.config import PPOConfig

ACTOR = "actor_rollout_ref.actor"
ROLLOUT = "actor_rollout_ref.rollout"
CORRECTION = "algorithm.rollout_correction"
NORM = "seq-mean-token-sum-norm"
"""The aggregation that has a constant divisor."""
OF_SEQUENCES = ("gspo", "geo_mean")
"""Losses of whole sequences, which are averaged over sequences."""


class GPUPool(Protocol):
    """A section of the configuration that counts GPUs."""

    @property
    def nnodes(self) -> int: ...
    @property
    def n_gpus_per_node(self) -> int: ...


def combination_problems(config: "PPOConfig") -> list[str]:
    """Settings that are valid by themselves but cannot work together."""
    rules = (
        mini_batch_problems,
        group_problems,
        gate_problems,
        branch_problems,
        estimator_problems,
        information_problems,
        sampling_problems,
        parallelism_problems,
        context_length_problems,
        truncation_problems,
        aggregation_problems,
        loss_mode_problems,
        kl_problems,
        teacher_problems,
        image_problems,
        correction_problems,
        schedule_problems,
        async_problems,
        engine_problems,
        endpoint_problems,
        collapse_problems,
        deterministic_problems,
    )
    return [problem for rule in rules for problem in rule(config)]


def mini_batch_problems(config: "PPOConfig") -> list[str]:
    """Mini-batches that do not divide the rollout batch, or leave processes without a row."""
    batch = config.rollout_batch_size
    processes = config.trainer.nnodes * config.trainer.n_gpus_per_node
    sizes = {ACTOR: config.actor_rollout_ref.actor.ppo_mini_batch_size}
    if config.use_critic:
        sizes["critic"] = config.critic.ppo_mini_batch_size
    problems: list[str] = []
    for section, size in sizes.items():
        key = f"{section}.ppo_mini_batch_size={size}"
        if batch % size:
            problems.append(f"{key} does not divide data.train_batch_size * rollout.n = {batch}")
        if size < processes:
            problems.append(f"{key} is less than the {processes} training processes")
    return problems


def group_problems(config: "PPOConfig") -> list[str]:
    """Algorithms and filters that compare the trajectories of a prompt, but there is only one."""
    algorithm = config.algorithm
    if config.actor_rollout_ref.rollout.n >= 2:
        return []
    problems: list[str] = []
    if config.uses_groups:
        problems.append(
            f"algorithm.adv_estimator={algorithm.adv_estimator} needs {ROLLOUT}.n >= 2: it "
            "compares trajectories of one prompt"
        )
    filters: list[str] = []
    if algorithm.filter_groups.enable:
        filters.append("algorithm.filter_groups.enable=true")
    if "zero_variance" in algorithm.loss_filters:
        filters.append("algorithm.loss_filters=[zero_variance]")
    for setting in filters:
        problems.append(
            f"{setting} needs {ROLLOUT}.n >= 2: the one trajectory of a prompt never differs from "
            "itself, so all of them would be left out"
        )
    return problems


def gate_problems(config: "PPOConfig") -> list[str]:
    """A gate that cannot see that a question is solved sometimes, or settings of none."""
    gate = config.data.gate
    if gate.is_on and config.actor_rollout_ref.rollout.n < 2:
        return [
            f"data.gate needs {ROLLOUT}.n >= 2: the one trajectory of a prompt solves it always or "
            "never, so every question would rest"
        ]
    if not gate.is_on and gate != type(gate)():
        return [
            "data.gate: metric and solved_at have no effect without rest_solved or rest_unsolved"
        ]
    return []


def branch_problems(config: "PPOConfig") -> list[str]:
    """Trees that do not fill a group, that are missing, or that would wait for other batches."""
    rollout = config.actor_rollout_ref.rollout
    branches = rollout.branches
    problems: list[str] = []
    if not branches.rounds:
        if config.uses_trees:
            problems.append(
                f"algorithm.adv_estimator={config.algorithm.adv_estimator} needs "
                f"{ROLLOUT}.branches.rounds >= 1: it compares trajectories that branched off each "
                "other"
            )
        if branches.per_round > 1:
            problems.append(
                f"{ROLLOUT}.branches.per_round={branches.per_round} has no effect with rounds=0"
            )
        return problems
    if rollout.n % branches.tree_size:
        problems.append(
            f"{ROLLOUT}.n={rollout.n} is no multiple of the {branches.tree_size} trajectories of a "
            f"tree ({ROLLOUT}.branches: 1 + rounds * per_round)"
        )
    if config.async_training.max_staleness:
        problems.append(
            f"{ROLLOUT}.branches with async_training.max_staleness="
            f"{config.async_training.max_staleness}: what branches off would wait behind the "
            "trajectories of later batches, and begin with turns of older weights than its own"
        )
    return problems


def estimator_problems(config: "PPOConfig") -> list[str]:
    """Settings that the estimator does not read, or that its baseline does not have."""
    problems: list[str] = []
    if config.uses_greedy and config.algorithm.information_gain.weight:
        problems.append(
            f"algorithm.information_gain.weight with adv_estimator={config.algorithm.adv_estimator}"
            ": the greedy trajectory, with which the others are compared, is not paid the gain"
        )
    return problems + [
        f"algorithm.{name}={str(value).lower()} has no effect with "
        f"algorithm.adv_estimator={config.algorithm.adv_estimator}: docs/algorithms.md says which "
        "estimators read it"
        for name, value in config.ignored_by_estimator.items()
    ]


def information_problems(config: "PPOConfig") -> list[str]:
    """Settings of a gain of information that is not computed."""
    section = config.algorithm.information_gain
    if section.weight:
        return []
    defaults = type(section)()
    return [
        f"algorithm.information_gain.{name}={getattr(section, name)!r} has no effect with "
        "algorithm.information_gain.weight=0"
        for name in ("before", "answer")
        if getattr(section, name) != getattr(defaults, name)
    ]


def sampling_problems(config: "PPOConfig") -> list[str]:
    """Sampling from which nothing can be learned."""
    if config.actor_rollout_ref.rollout.temperature == 0:
        return [f"{ROLLOUT}.temperature=0: training needs sampling"]
    return []


def parallelism_problems(config: "PPOConfig") -> list[str]:
    """Engines whose GPUs would not be those of one node."""
    size = config.actor_rollout_ref.rollout.tensor_model_parallel_size
    pool, section = engine_pool(config)
    if pool.n_gpus_per_node % size == 0:
        return []
    return [
        f"{ROLLOUT}.tensor_model_parallel_size={size} does not divide "
        f"{section}.n_gpus_per_node={pool.n_gpus_per_node}: an engine lives on one node"
    ]


def context_length_problems(config: "PPOConfig") -> list[str]:
    """Limits of lengths that leave no room for a prompt and its first turn."""
    data = config.data
    problems: list[str] = []
    if config.max_model_len < data.max_start_length + data.max_response_length:
        problems.append(
            f"{ROLLOUT}.max_model_len={config.max_model_len} holds less than "
            "data.max_start_length + data.max_response_length"
        )
    if data.max_start_length > data.max_prompt_length:
        problems.append(
            "data.max_start_length is more than data.max_prompt_length, which bounds every context"
        )
    return problems


def truncation_problems(config: "PPOConfig") -> list[str]:
    """Sampling from a truncated distribution without anything that corrects for it."""
    rollout = config.actor_rollout_ref.rollout
    is_truncated = rollout.top_p < 1 or rollout.top_k > 0
    if not is_truncated or config.algorithm.rollout_correction.corrects:
        return []
    return [
        f"{ROLLOUT}.top_p={rollout.top_p}, top_k={rollout.top_k}: tokens are sampled from another "
        f"distribution than the one that is trained: set {CORRECTION}.rollout_is or rollout_rs"
    ]


def aggregation_problems(config: "PPOConfig") -> list[str]:
    """Aggregations of the loss that lack their divisor or contradict the algorithm."""
    actor = config.actor_rollout_ref.actor
    mode = actor.loss_agg_mode
    problems: list[str] = []
    if mode == NORM and actor.loss_scale_factor is None:
        problems.append(f"{ACTOR}.loss_scale_factor: name the divisor of loss_agg_mode={NORM}")
    if mode != NORM and actor.loss_scale_factor is not None:
        problems.append(
            f"{ACTOR}.loss_scale_factor={actor.loss_scale_factor} has no effect with "
            f"loss_agg_mode={mode}: it is the divisor of {NORM}"
        )
    if config.use_critic and config.critic.loss_agg_mode == NORM:
        problems.append(
            f"critic.loss_agg_mode={NORM} has no divisor: set it on its own, for instance to "
            "token-mean"
        )
    if config.algorithm.adv_estimator == "dr_grpo" and mode not in (NORM, "token-sum"):
        problems.append(
            f"{ACTOR}.loss_agg_mode={mode} divides by lengths, which "
            f"algorithm.adv_estimator=dr_grpo is to avoid: use {NORM} (with loss_scale_factor) or "
            "token-sum"
        )
    if actor.policy_loss.loss_mode in OF_SEQUENCES and mode != "seq-mean-token-mean":
        problems.append(
            f"{ACTOR}.loss_agg_mode={mode}: policy_loss.loss_mode={actor.policy_loss.loss_mode} is "
            "defined for seq-mean-token-mean"
        )
    return problems


def loss_mode_problems(config: "PPOConfig") -> list[str]:
    """Loss settings that do not fit the number of optimizer steps, or training on all tokens."""
    actor = config.actor_rollout_ref.actor
    steps = config.rollout_batch_size // actor.ppo_mini_batch_size * actor.ppo_epochs
    bypasses = config.algorithm.rollout_correction.bypass_mode
    problems: list[str] = []
    has_advantages_by_token = config.credits_turns or config.use_critic or config.use_teacher
    if actor.policy_loss.loss_mode == "geo_mean" and has_advantages_by_token:
        problems.append(
            f"{ACTOR}.policy_loss.loss_mode=geo_mean has one advantage for all tokens of a "
            "trajectory, so that those of a critic, of turns or of a teacher would be averaged: "
            "use another loss"
        )
    if actor.policy_loss.loss_mode == "reinforce" and steps > 1:
        problems.append(
            f"{ACTOR}.policy_loss.loss_mode=reinforce has no trust region and would take {steps} "
            "optimizer steps on one rollout batch: set ppo_mini_batch_size to train_batch_size * "
            "rollout.n, and ppo_epochs to 1"
        )
    if config.credits_turns and not actor.state_masking:
        problems.append(
            f"{ACTOR}.state_masking=false trains on tokens of no turn, which "
            f"adv_estimator={config.algorithm.adv_estimator} cannot credit"
        )
    if actor.policy_loss.llds_coef and steps == 1 and not bypasses:
        problems.append(
            f"{ACTOR}.policy_loss.llds_coef={actor.policy_loss.llds_coef:g} has no effect with one "
            "optimizer step on a rollout batch: log-probs cannot have fallen before it. Set "
            "ppo_mini_batch_size to less than train_batch_size * rollout.n, or ppo_epochs to 2"
        )
    return problems


def kl_problems(config: "PPOConfig") -> list[str]:
    """A KL to the reference that is applied twice, or whose coefficient is never read."""
    algorithm = config.algorithm
    problems: list[str] = []
    if algorithm.use_kl_in_reward and config.actor_rollout_ref.actor.use_kl_loss:
        problems.append(
            f"algorithm.use_kl_in_reward=true with {ACTOR}.use_kl_loss=true: the KL to the "
            "reference would count twice, in the reward and in the loss: set one of them to false "
            "(algo=ppo has it in the reward, algo=grpo in the loss)"
        )
    if algorithm.kl_ctrl.type == "adaptive" and not algorithm.use_kl_in_reward:
        problems.append(
            "algorithm.kl_ctrl.type=adaptive has no effect with algorithm.use_kl_in_reward=false: "
            "the KL of the loss (actor.use_kl_loss) has the constant weight actor.kl_loss_coef"
        )
    return problems


def teacher_problems(config: "PPOConfig") -> list[str]:
    """A teacher that is named and not asked, or one that is missing."""
    teacher = config.teacher
    if config.use_teacher:
        return teaching_problems(config)
    problems: list[str] = []
    if teacher.model.path != config.actor_rollout_ref.model.path:
        problems.append(
            f"teacher.model.path={teacher.model.path} has no effect with teacher.weight=0: set "
            "teacher.weight, for instance to 1"
        )
    if config.algorithm.adv_estimator == "none":
        problems.append(
            "algorithm.adv_estimator=none takes nothing from the rewards, and with "
            "teacher.weight=0 there is no teacher either: nothing would be learned. Set "
            "teacher.weight and teacher.model.path, or another estimator"
        )
    return problems


def teaching_problems(config: "PPOConfig") -> list[str]:
    """A teacher that knows nothing more, and questions that are left out where it alone teaches."""
    algorithm = config.algorithm
    if algorithm.adv_estimator != "none":
        return []
    problems: list[str] = []
    if config.teacher.model.path == config.actor_rollout_ref.model.path:
        problems.append(
            "algorithm.adv_estimator=none with the initial policy as its own teacher: nothing "
            "would be learned. Name another model in teacher.model.path"
        )
    by_score = {
        "algorithm.filter_groups.enable=true": algorithm.filter_groups.enable,
        "algorithm.loss_filters=[zero_variance]": "zero_variance" in algorithm.loss_filters,
        "data.gate": config.data.gate.is_on,
    }
    problems += [
        f"{setting} leaves questions out by their scores, and with algorithm.adv_estimator=none "
        "scores say nothing of what the teacher teaches: remove it"
        for setting, is_set in by_score.items()
        if is_set
    ]
    return problems


def image_problems(config: "PPOConfig") -> list[str]:
    """What does not go together with a policy that reads images."""
    model = config.actor_rollout_ref.model
    blind = {"critic": config.critic.model, "teacher": config.teacher.model}
    problems = [
        f"{section}.model.reads_images=true: the policy alone reads images"
        for section, other in blind.items()
        if other.reads_images
    ]
    if not model.reads_images:
        return problems
    rollout = config.actor_rollout_ref.rollout
    options = {
        "a critic, which would read none (algo=ppo)": config.use_critic,
        "actor_rollout_ref.model.lora_rank": model.lora_rank > 0,
        "actor_rollout_ref.model.override_config": bool(model.architecture),
        f"{ACTOR}.state_masking=false": not config.actor_rollout_ref.actor.state_masking,
        f"{ROLLOUT}.name={rollout.name}, which is given text": rollout.name != "vllm",
        f"{ROLLOUT}.branches": rollout.branches.rounds > 0,
        "algorithm.information_gain.weight": config.algorithm.information_gain.weight > 0,
        "teacher.weight": config.use_teacher,
    }
    return problems + [
        f"actor_rollout_ref.model.reads_images=true: not with {text}"
        for text, is_on in options.items()
        if is_on
    ]


def correction_problems(config: "PPOConfig") -> list[str]:
    """Rollout corrections that are applied twice, have no effect, or reject every token."""
    correction = config.algorithm.rollout_correction
    problems: list[str] = []
    if correction.bypass_mode:
        loss_mode = config.actor_rollout_ref.actor.policy_loss.loss_mode
        if loss_mode == "reinforce":
            problems.append(
                f"{CORRECTION}.bypass_mode has no effect with "
                "actor.policy_loss.loss_mode=reinforce, whose loss has no ratio: set rollout_is "
                "instead"
            )
        elif correction.rollout_is is not None:
            problems.append(
                f"{CORRECTION}.bypass_mode with rollout_is={correction.rollout_is}: the ratio to "
                "the sampler is in the loss already and would be multiplied a second time: set "
                "rollout_is to null (rollout_rs may stay: it leaves tokens out, and weighs none)"
            )
    lowest = correction.lowest_ratio
    highest = correction.rollout_rs_threshold
    if correction.rollout_rs is not None and lowest >= highest:
        problems.append(
            f"{CORRECTION}: no ratio is above {lowest:g} (rollout_rs_threshold_lower, by default "
            f"1 / rollout_rs_threshold) and below rollout_rs_threshold={highest:g}: every token "
            "would be left out"
        )
    return problems


def schedule_problems(config: "PPOConfig") -> list[str]:
    """Critic warm-ups without a critic, or that leave no steps for the policy."""
    warmup = config.trainer.critic_warmup
    total = config.trainer.total_training_steps
    if warmup and not config.use_critic:
        return [
            f"trainer.critic_warmup={warmup}: "
            f"algorithm.adv_estimator={config.algorithm.adv_estimator} has no critic, so nothing "
            "would learn in these steps"
        ]
    if config.use_critic and total is not None and warmup >= total:
        return [
            f"trainer.critic_warmup={warmup} leaves none of the {total} training steps to the "
            "policy"
        ]
    return []


def async_problems(config: "PPOConfig") -> list[str]:
    """Stale data without a loss that corrects for it, and engines that sleep during an update."""
    correction = config.algorithm.rollout_correction
    rollout = config.actor_rollout_ref.rollout
    staleness = config.async_training.max_staleness
    shares_gpus = config.device == "cuda" and config.actor_rollout_ref.hybrid_engine
    problems: list[str] = []
    if staleness > 0 and not correction.corrects and not correction.bypass_mode:
        problems.append(
            f"async_training.max_staleness={staleness}: tokens are sampled from older weights than "
            f"those that are trained: set {CORRECTION}.rollout_is or rollout_rs, or bypass_mode "
            "with a loss that clips (not actor.policy_loss.loss_mode=reinforce)"
        )
    if staleness > 0 and shares_gpus:
        problems.append(
            f"async_training.max_staleness={staleness}: engines roll out while the weights are "
            "updated, so they need GPUs of their own: actor_rollout_ref.hybrid_engine=false"
        )
    if rollout.num_val_replicas > 0 and shares_gpus:
        problems.append(
            f"{ROLLOUT}.num_val_replicas={rollout.num_val_replicas}: engines that validate during "
            "training need GPUs of their own: actor_rollout_ref.hybrid_engine=false"
        )
    return problems


def engine_pool(config: "PPOConfig") -> tuple[GPUPool, str]:
    """The section that counts the GPUs of the engines, and its name."""
    if config.actor_rollout_ref.hybrid_engine:
        return config.trainer, "trainer"
    return config.actor_rollout_ref.rollout, ROLLOUT


def engine_problems(config: "PPOConfig") -> list[str]:
    """More engines than their GPUs can hold."""
    rollout = config.actor_rollout_ref.rollout
    if config.device != "cuda":
        return []
    pool, section = engine_pool(config)
    gpus = pool.nnodes * pool.n_gpus_per_node
    engines = rollout.num_replicas or 1
    if not config.actor_rollout_ref.hybrid_engine:
        engines += rollout.num_val_replicas
    if engines * rollout.tensor_model_parallel_size <= gpus:
        return []
    return [
        f"{section}: nnodes * n_gpus_per_node = {gpus} GPUs do not hold {engines} engines of "
        f"tensor_model_parallel_size={rollout.tensor_model_parallel_size} GPUs each "
        f"({ROLLOUT}.num_replicas={rollout.num_replicas or 'null, at least one'}, "
        f"num_val_replicas={rollout.num_val_replicas})"
    ]


def deterministic_problems(config: "PPOConfig") -> list[str]:
    """Settings by which two deterministic runs would differ in their last bits."""
    if not config.trainer.deterministic:
        return []
    rollout = config.actor_rollout_ref.rollout
    missing: list[str] = []
    if rollout.num_replicas != 1:
        missing.append(f"{ROLLOUT}.num_replicas=1")
    if rollout.max_num_seqs != 1:
        missing.append(f"{ROLLOUT}.max_num_seqs=1")
    if rollout.enable_prefix_caching:
        missing.append(f"{ROLLOUT}.enable_prefix_caching=false")
    if not rollout.per_request_seed:
        missing.append(f"{ROLLOUT}.per_request_seed=true")
    if rollout.cpu_threads is None:
        missing.append(f"{ROLLOUT}.cpu_threads=1")
    if config.trainer.threads_per_rank is None:
        missing.append("trainer.threads_per_rank=1")
    if config.async_training.max_staleness != 0:
        missing.append("async_training.max_staleness=0")
    if not missing:
        return []
    return [f"trainer.deterministic=true needs {' '.join(missing)} (+mode=deterministic sets all)"]


def collapse_problems(config: "PPOConfig") -> list[str]:
    """A collapse watch that could never raise an alarm, or could not respond to one."""
    watch = config.trainer.collapse_watch
    problems: list[str] = []
    if 0 < len(watch.active) < watch.min_signals:
        problems.append(
            f"trainer.collapse_watch.min_signals={watch.min_signals} is more than the "
            f"{len(watch.active)} of trainer.collapse_watch.signals"
        )
    if watch.response == "roll_back" and config.trainer.save_freq <= 0:
        problems.append(
            "trainer.collapse_watch.response=roll_back needs checkpoints to roll back to: set "
            "trainer.save_freq"
        )
    return problems


def endpoint_problems(config: "PPOConfig") -> list[str]:
    """Missing settings of an endpoint that is used instead of the engine."""
    rollout = config.actor_rollout_ref.rollout
    problems: list[str] = []
    if rollout.name != "openai":
        return problems
    if not rollout.endpoint.url:
        problems.append(f"{ROLLOUT}.endpoint.url: name the endpoint of rollout.name=openai")
    if config.actor_rollout_ref.model.tokenizer_path is None:
        problems.append(
            "actor_rollout_ref.model.tokenizer_path: an endpoint needs a tokenizer here, in whose "
            "tokens the budgets (data.max_*_length) are counted; any that is close to the model's "
            "own will do"
        )
    return problems
