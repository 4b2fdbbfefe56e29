"""What is wrong with a configuration whose keys and types are right; each problem with its key and
its reason."""

from typing import TYPE_CHECKING, Any

from verl.trainer.host import host_problems
from verl.utils import device
from verl.utils.endpoint import check_endpoint
from verl.workers.config import ModelConfig

if TYPE_CHECKING:
    from verl.trainer.config import PPOConfig


def combination_problems(config: "PPOConfig") -> list[str]:
    """Settings that are valid alone and cannot work together."""
    rollout = config.actor_rollout_ref.rollout
    actor = config.actor_rollout_ref.actor
    critic = config.critic
    batch = config.data.train_batch_size * rollout.n
    processes = config.trainer.nnodes * config.trainer.n_gpus_per_node
    problems: list[str] = []
    sections = [("actor_rollout_ref.actor", actor.ppo_mini_batch_size)]
    if config.use_critic:
        sections.append(("critic", critic.ppo_mini_batch_size))
    for name, mini in sections:
        if batch % mini:
            problems.append(
                f"{name}.ppo_mini_batch_size={mini} does not divide data.train_batch_size * "
                f"rollout.n = {batch}"
            )
        if mini < processes:
            problems.append(
                f"{name}.ppo_mini_batch_size={mini} is less than the {processes} training processes"
            )
    if config.compares and rollout.n < 2:
        problems.append(
            f"algorithm.adv_estimator={config.algorithm.adv_estimator} needs "
            "actor_rollout_ref.rollout.n >= 2: it "
            "compares trajectories of one prompt"
        )
    if rollout.temperature == 0:
        problems.append("actor_rollout_ref.rollout.temperature=0: training needs sampling")
    pool, section = engine_pool(config)
    if pool.n_gpus_per_node % rollout.tensor_model_parallel_size:
        problems.append(
            "actor_rollout_ref.rollout.tensor_model_parallel_size="
            f"{rollout.tensor_model_parallel_size} does not divide "
            f"{section}.n_gpus_per_node={pool.n_gpus_per_node}: an engine lives on one node"
        )
    if config.max_model_len < config.data.max_start_length + config.data.max_response_length:
        problems.append(
            f"actor_rollout_ref.rollout.max_model_len={config.max_model_len} holds less than "
            "data.max_start_length + data.max_response_length"
        )
    if config.data.max_start_length > config.data.max_prompt_length:
        problems.append(
            "data.max_start_length is more than data.max_prompt_length, which bounds every context"
        )
    rules = (
        loss_problems,
        sampling_problems,
        correction_problems,
        schedule_problems,
        async_problems,
        engine_problems,
        endpoint_problems,
        collapse_problems,
        deterministic_problems,
    )
    return problems + [problem for rule in rules for problem in rule(config)]


def loss_problems(config: "PPOConfig") -> list[str]:
    """Losses that their aggregation, or the number of optimizer steps, makes something else."""
    actor = config.actor_rollout_ref.actor
    estimator = config.algorithm.adv_estimator
    rollout = config.actor_rollout_ref.rollout
    correction = config.algorithm.rollout_correction
    agg = actor.loss_agg_mode
    mode = actor.policy_loss.loss_mode
    key = "actor_rollout_ref.actor"
    steps = config.rollout_batch_size // actor.ppo_mini_batch_size * actor.ppo_epochs
    norm = "seq-mean-token-sum-norm"
    cuts_sampling = rollout.top_p < 1 or rollout.top_k > 0
    problems: list[str] = []
    if cuts_sampling and not correction.corrects:
        problems.append(
            f"actor_rollout_ref.rollout.top_p={rollout.top_p}, top_k={rollout.top_k}: tokens are "
            "sampled from another "
            "distribution than the one that is trained: set "
            "algorithm.rollout_correction.rollout_is or rollout_rs"
        )
    if agg == norm and actor.loss_scale_factor is None:
        problems.append(f"{key}.loss_scale_factor: name the divisor of loss_agg_mode={norm}")
    if agg != norm and actor.loss_scale_factor is not None:
        problems.append(
            f"{key}.loss_scale_factor={actor.loss_scale_factor} has no effect with "
            f"loss_agg_mode={agg}: it is the "
            f"divisor of {norm}"
        )
    if config.use_critic and config.critic.loss_agg_mode == norm:
        problems.append(
            f"critic.loss_agg_mode={norm} has no divisor: set it on its own, for instance to "
            "token-mean"
        )
    if estimator == "dr_grpo" and agg not in (norm, "token-sum"):
        problems.append(
            f"{key}.loss_agg_mode={agg} divides by lengths, which algorithm.adv_estimator=dr_grpo "
            "is to avoid: use "
            f"{norm} (with loss_scale_factor) or token-sum"
        )
    if mode == "gspo" and agg != "seq-mean-token-mean":
        problems.append(
            f"{key}.loss_agg_mode={agg}: policy_loss.loss_mode=gspo is defined for "
            "seq-mean-token-mean"
        )
    if mode == "reinforce" and steps > 1:
        problems.append(
            f"{key}.policy_loss.loss_mode=reinforce has no trust region and would take {steps} "
            "optimizer steps on one "
            "rollout batch: set ppo_mini_batch_size to train_batch_size * rollout.n, and "
            "ppo_epochs to 1"
        )
    if estimator == "turn_level" and not actor.state_masking:
        problems.append(
            f"{key}.state_masking=false trains on tokens of no turn, which "
            "adv_estimator=turn_level cannot credit"
        )
    if actor.policy_loss.llds_coef and steps == 1 and not correction.bypass_mode:
        problems.append(
            f"{key}.policy_loss.llds_coef={actor.policy_loss.llds_coef:g} has no effect with one "
            "optimizer step on a "
            "rollout batch: log-probs cannot have fallen before it. Set ppo_mini_batch_size to "
            "less than "
            "train_batch_size * rollout.n, or ppo_epochs to 2"
        )
    return problems


def sampling_problems(config: "PPOConfig") -> list[str]:
    """Filters of groups where there are none."""
    algorithm = config.algorithm
    n = config.actor_rollout_ref.rollout.n
    needs_groups = {
        "algorithm.filter_groups.enable=true": algorithm.filter_groups.enable,
        "algorithm.loss_filters=[zero_variance]": "zero_variance" in algorithm.loss_filters,
    }
    return [
        f"{setting} needs actor_rollout_ref.rollout.n >= 2: the one trajectory of a prompt never "
        "differs from itself, "
        "so all of them would be left out"
        for setting, is_set in needs_groups.items()
        if is_set and n < 2
    ]


def correction_problems(config: "PPOConfig") -> list[str]:
    """Corrections that correct twice, that correct nothing, or that leave everything out."""
    correction = config.algorithm.rollout_correction
    mode = config.actor_rollout_ref.actor.policy_loss.loss_mode
    key = "algorithm.rollout_correction"
    problems: list[str] = []
    if correction.bypass_mode and mode == "reinforce":
        problems.append(
            f"{key}.bypass_mode has no effect with actor.policy_loss.loss_mode=reinforce, whose "
            "loss has no ratio: set "
            "rollout_is instead"
        )
    elif correction.bypass_mode and correction.rollout_is is not None:
        problems.append(
            f"{key}.bypass_mode with rollout_is={correction.rollout_is}: the ratio to the sampler "
            "is in the loss "
            "already and would be multiplied a second time: set rollout_is to null (rollout_rs may "
            "stay: it leaves "
            "tokens out, and weighs none)"
        )
    lowest = correction.lowest_ratio
    if correction.rollout_rs is not None and lowest >= correction.rollout_rs_threshold:
        problems.append(
            f"{key}: no ratio is above {lowest:g} (rollout_rs_threshold_lower, by default 1 / "
            "rollout_rs_threshold) "
            f"and below rollout_rs_threshold={correction.rollout_rs_threshold:g}: every token "
            "would be left out"
        )
    return problems


def schedule_problems(config: "PPOConfig") -> list[str]:
    """Steps in which nothing would learn, and a coefficient that nothing reads."""
    trainer = config.trainer
    control = config.algorithm.kl_ctrl
    problems: list[str] = []
    if trainer.critic_warmup and not config.use_critic:
        problems.append(
            f"trainer.critic_warmup={trainer.critic_warmup}: "
            f"algorithm.adv_estimator={config.algorithm.adv_estimator} "
            "has no critic, so nothing would learn in these steps"
        )
    total = trainer.total_training_steps
    if config.use_critic and total is not None and trainer.critic_warmup >= total:
        problems.append(
            f"trainer.critic_warmup={trainer.critic_warmup} leaves none of the {total} training "
            "steps to the policy"
        )
    if control.type == "adaptive" and not config.algorithm.use_kl_in_reward:
        problems.append(
            "algorithm.kl_ctrl.type=adaptive has no effect with algorithm.use_kl_in_reward=false: "
            "the KL of the loss "
            "(actor.use_kl_loss) has the constant weight actor.kl_loss_coef"
        )
    return problems


def async_problems(config: "PPOConfig") -> list[str]:
    """Stale data without anything that allows for it, and engines that could not roll out while
    weights change."""
    correction = config.algorithm.rollout_correction
    rollout = config.actor_rollout_ref.rollout
    staleness = config.async_training.max_staleness
    on_gpus = config.device == "cuda"
    hybrid = config.actor_rollout_ref.hybrid_engine
    problems: list[str] = []
    if staleness > 0 and not correction.corrects and not correction.bypass_mode:
        problems.append(
            f"async_training.max_staleness={staleness}: tokens are sampled from older weights than "
            "those that are "
            "trained: set algorithm.rollout_correction.rollout_is or rollout_rs, or bypass_mode "
            "with a loss that clips "
            "(not actor.policy_loss.loss_mode=reinforce)"
        )
    if staleness > 0 and on_gpus and hybrid:
        problems.append(
            f"async_training.max_staleness={staleness}: engines roll out while the weights are "
            "updated, so they need "
            "GPUs of their own: actor_rollout_ref.hybrid_engine=false"
        )
    if rollout.num_val_replicas > 0 and on_gpus and hybrid:
        problems.append(
            f"actor_rollout_ref.rollout.num_val_replicas={rollout.num_val_replicas}: engines that "
            "validate during "
            "training need GPUs of their own: actor_rollout_ref.hybrid_engine=false"
        )
    return problems


def engine_pool(config: "PPOConfig") -> tuple[Any, str]:
    """The section that counts the GPUs of the engines (`nnodes`, `n_gpus_per_node`), and its
    name."""
    if config.actor_rollout_ref.hybrid_engine:
        return config.trainer, "trainer"
    return config.actor_rollout_ref.rollout, "actor_rollout_ref.rollout"


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
        f"(actor_rollout_ref.rollout.num_replicas={rollout.num_replicas or 'null, at least one'}, "
        f"num_val_replicas={rollout.num_val_replicas})"
    ]


def deterministic_problems(config: "PPOConfig") -> list[str]:
    """What makes two runs of the same configuration differ in their last bits: timing, batches,
    threads."""
    rollout = config.actor_rollout_ref.rollout
    trainer = config.trainer
    found = {
        "actor_rollout_ref.rollout.num_replicas=1": rollout.num_replicas == 1,
        "actor_rollout_ref.rollout.max_num_seqs=1": rollout.max_num_seqs == 1,
        "actor_rollout_ref.rollout.enable_prefix_caching=false": not rollout.enable_prefix_caching,
        "actor_rollout_ref.rollout.per_request_seed=true": rollout.per_request_seed,
        "actor_rollout_ref.rollout.cpu_threads=1": rollout.cpu_threads is not None,
        "trainer.threads_per_rank=1": trainer.threads_per_rank is not None,
        "async_training.max_staleness=0": config.async_training.max_staleness == 0,
    }
    missing = [setting for setting, holds in found.items() if trainer.deterministic and not holds]
    return (
        [f"trainer.deterministic=true needs {' '.join(missing)} (+mode=deterministic sets all)"]
        if missing
        else []
    )


def collapse_problems(config: "PPOConfig") -> list[str]:
    """A collapse watch that could never raise an alarm, or has nothing to answer it with."""
    watch = config.trainer.collapse_watch
    problems = list[str]()
    if 0 < len(watch.active) < watch.min_signals:
        problems.append(
            f"trainer.collapse_watch.min_signals={watch.min_signals} is more than the "
            f"{len(watch.active)} of "
            "trainer.collapse_watch.signals"
        )
    if watch.response == "roll_back" and config.trainer.save_freq <= 0:
        problems.append(
            "trainer.collapse_watch.response=roll_back needs checkpoints to roll back to: set "
            "trainer.save_freq"
        )
    return problems


def endpoint_problems(config: "PPOConfig") -> list[str]:
    """What an endpoint in the place of an engine lacks."""
    rollout = config.actor_rollout_ref.rollout
    model = config.actor_rollout_ref.model
    problems: list[str] = []
    if rollout.name != "openai":
        return problems
    if not rollout.endpoint.url:
        problems.append(
            "actor_rollout_ref.rollout.endpoint.url: name the endpoint of rollout.name=openai"
        )
    if model.tokenizer_path is None:
        problems.append(
            "actor_rollout_ref.model.tokenizer_path: an endpoint needs a tokenizer here, in whose "
            "tokens the budgets "
            "(data.max_*_length) are counted; any that is close to the model's own will do"
        )
    return problems


def environment_problems(config: "PPOConfig", agent: Any, gpus: int) -> list[str]:
    """GPUs that cannot be used, a model that cannot hold a trajectory, an endpoint or a retriever
    that does not answer, folders that cannot be written, shared memory that is too small.

    `gpus`: how many a run on CUDA needs on this machine, 0 if they are elsewhere.
    """
    rollout = config.actor_rollout_ref.rollout
    if rollout.name == "openai":
        problem = check_endpoint(rollout.endpoint)
        problems = [f"actor_rollout_ref.rollout.endpoint.url: {problem}"] if problem else []
    else:
        problems = device_problems(config, gpus)
        problems += context_problems(config) + critic_problems(config)
        if config.trainer.ray_address is None:
            problems += host_problems(config)
    return problems + agent.preflight()


def device_problems(config: "PPOConfig", gpus: int) -> list[str]:
    """Whether this machine can run what trainer.device asks for; `auto` never means the CPU where a
    GPU is meant."""
    wanted = config.trainer.device
    if wanted == "cpu":
        return [cpu_problem()] if device.has_cuda_engine() else []
    if gpus == 0 and wanted == "cuda":
        return []
    if config.device == "cpu" and not device.gpu_is_meant():
        return []
    problems: list[str] = []
    if unusable := device.cuda_problem() or device.toolchain_problem():
        instead = "" if device.has_cuda_engine() else "; trainer.device=cpu trains on the CPU"
        if gpus == 0:
            instead += "; trainer.device=cuda says that the nodes of the cluster have GPUs"
        problems.append(f"trainer.device={wanted}: {unusable}{instead}")
    elif missing := device.visible_problem(gpus):
        problems.append(f"trainer.n_gpus_per_node={config.trainer.n_gpus_per_node}: {missing}")
    return problems


def cpu_problem() -> str:
    """What is wrong with a run on the CPU where the packages are those for GPUs."""
    return (
        "trainer.device=cpu: the installed vLLM is the build for CUDA, which cannot run on the "
        "CPU: make an "
        f"environment for the CPU ({device.CPU_ENVIRONMENT})"
    )


def hf_config_of(model: ModelConfig) -> Any:
    """The Hugging Face config of a model, as training and engine will see it."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(
        model.path, trust_remote_code=model.trust_remote_code, **model.architecture
    )


def critic_problems(config: "PPOConfig") -> list[str]:
    """Whether transformers can put a value head on the critic's model."""
    from transformers import AutoModelForTokenClassification

    if not config.use_critic:
        return []
    model = config.critic.model
    hf_config = hf_config_of(model)
    mapped = type(hf_config) in AutoModelForTokenClassification._model_mapping
    if mapped or "AutoModelForTokenClassification" in getattr(hf_config, "auto_map", {}):
        return []
    return [
        f"critic.model.path={model.path}: transformers has no value head (token classification) "
        "for "
        f"{hf_config.model_type}: use an algorithm.adv_estimator without a critic, such as grpo"
    ]


def context_problems(config: "PPOConfig") -> list[str]:
    """Whether the model can hold a whole trajectory: the engine would refuse it only after
    everything has started."""
    model = config.actor_rollout_ref.model
    text = hf_config_of(model).get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    is_scaled = (getattr(text, "rope_parameters", None) or {}).get(
        "rope_type", "default"
    ) != "default"
    if limit is None or is_scaled or config.max_model_len <= limit:
        return []
    return [
        f"data.max_prompt_length + data.max_response_length = {config.max_model_len} is more than "
        f"the {limit} tokens "
        f"that {model.path} can hold (max_position_embeddings)"
    ]
