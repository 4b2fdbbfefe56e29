"""What is wrong with a configuration whose keys and types are right; each problem with its key and its reason."""

from typing import TYPE_CHECKING, Any

from verl.utils import device
from verl.utils.endpoint import check_endpoint
from verl.workers.config import ModelConfig

if TYPE_CHECKING:
    from verl.trainer.config import PPOConfig


def combination_problems(config: "PPOConfig") -> list[str]:
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
    pool, section = (config.trainer, "trainer") if config.actor_rollout_ref.hybrid_engine else (rollout, "rollout")
    if pool.n_gpus_per_node % rollout.tensor_model_parallel_size:
        problems.append(
            f"actor_rollout_ref.rollout.tensor_model_parallel_size={rollout.tensor_model_parallel_size} does not "
            f"divide {section}.n_gpus_per_node={pool.n_gpus_per_node}: an engine lives on one node"
        )
    if config.max_model_len < config.data.max_start_length + config.data.max_response_length:
        problems.append(
            f"actor_rollout_ref.rollout.max_model_len={config.max_model_len} holds less than "
            "data.max_start_length + data.max_response_length"
        )
    if config.data.max_start_length > config.data.max_prompt_length:
        problems.append("data.max_start_length is more than data.max_prompt_length, which bounds every context")
    rules = (loss_problems, endpoint_problems, collapse_problems, async_problems, deterministic_problems)
    return problems + [problem for rule in rules for problem in rule(config)]


def loss_problems(config: "PPOConfig") -> list[str]:
    """Losses that their aggregation, or the number of optimizer steps, makes something else."""
    actor, estimator = config.actor_rollout_ref.actor, config.algorithm.adv_estimator
    agg, mode, key = actor.loss_agg_mode, actor.policy_loss.loss_mode, "actor_rollout_ref.actor"
    steps = config.num_mini_batches * actor.ppo_epochs
    norm = "seq-mean-token-sum-norm"
    rollout = config.actor_rollout_ref.rollout
    found = {
        f"actor_rollout_ref.rollout.top_p={rollout.top_p}, top_k={rollout.top_k}: tokens are sampled from another "
        "distribution than the one that is trained: set algorithm.rollout_correction.rollout_is or rollout_rs":
            (rollout.top_p < 1 or rollout.top_k > 0) and not config.algorithm.rollout_correction.corrects,
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


def async_problems(config: "PPOConfig") -> list[str]:
    """Stale data without anything that allows for it, and engines that could not roll out while weights change."""
    correction, loss = config.algorithm.rollout_correction, config.actor_rollout_ref.actor.policy_loss.loss_mode
    rollout, staleness = config.actor_rollout_ref.rollout, config.async_training.max_staleness
    shares_gpus = config.actor_rollout_ref.hybrid_engine and config.device == "cuda"
    engine_gpus = rollout.nnodes * rollout.n_gpus_per_node
    found = {
        f"async_training.max_staleness={staleness}: tokens are sampled from older weights than those that are trained: "
        "set algorithm.rollout_correction.rollout_is or rollout_rs, or bypass_mode with a loss that clips (not "
        "actor.policy_loss.loss_mode=reinforce)":
            staleness > 0 and not correction.corrects and not (correction.bypass_mode and loss != "reinforce"),
        "algorithm.rollout_correction.bypass_mode: the ratio to the sampler is in the loss already, rollout_is and "
        "rollout_rs would correct it again: set them to null":
            correction.bypass_mode and correction.corrects,
        f"async_training.max_staleness={staleness}: engines roll out while the weights are updated, so they need GPUs "
        "of their own: actor_rollout_ref.hybrid_engine=false":
            staleness > 0 and shares_gpus,
        f"actor_rollout_ref.rollout.num_val_replicas={rollout.num_val_replicas}: engines that validate during training "
        "need GPUs of their own: actor_rollout_ref.hybrid_engine=false":
            rollout.num_val_replicas > 0 and shares_gpus,
        f"actor_rollout_ref.rollout: nnodes * n_gpus_per_node = {engine_gpus} GPUs hold no engine beside the "
        f"{rollout.num_val_replicas} of num_val_replicas, of tensor_model_parallel_size="
        f"{rollout.tensor_model_parallel_size} GPUs each":
            config.device == "cuda" and not config.actor_rollout_ref.hybrid_engine
            and engine_gpus < (rollout.num_val_replicas + 1) * rollout.tensor_model_parallel_size,
    }  # fmt: skip
    return [problem for problem, holds in found.items() if holds]


def deterministic_problems(config: "PPOConfig") -> list[str]:
    """What makes two runs of the same configuration differ in their last bits: timing, batches, threads."""
    rollout, trainer = config.actor_rollout_ref.rollout, config.trainer
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
    return [f"trainer.deterministic=true needs {' '.join(missing)} (+mode=deterministic sets all)"] if missing else []


def collapse_problems(config: "PPOConfig") -> list[str]:
    """A collapse watch that could never raise an alarm, or has nothing to answer it with."""
    watch, problems = config.trainer.collapse_watch, list[str]()
    if 0 < len(watch.active) < watch.min_signals:
        problems.append(
            f"trainer.collapse_watch.min_signals={watch.min_signals} is more than the {len(watch.active)} of "
            "trainer.collapse_watch.signals"
        )
    if watch.response == "roll_back" and config.trainer.save_freq <= 0:
        problems.append(
            "trainer.collapse_watch.response=roll_back needs checkpoints to roll back to: set trainer.save_freq"
        )
    return problems


def endpoint_problems(config: "PPOConfig") -> list[str]:
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


def environment_problems(config: "PPOConfig", agent: Any, gpus: int) -> list[str]:
    """GPUs that cannot be used, a model that cannot hold a trajectory, an endpoint or a retriever that does not answer.

    `gpus`: how many a run on CUDA needs on this machine, 0 if they are elsewhere.
    """
    rollout = config.actor_rollout_ref.rollout
    if rollout.name == "openai":
        problem = check_endpoint(rollout.endpoint)
        problems = [f"actor_rollout_ref.rollout.endpoint.url: {problem}"] if problem else []
    else:
        problems = device_problems(config, gpus)
        problems += context_problems(config) + critic_problems(config)
    return problems + agent.preflight()


def device_problems(config: "PPOConfig", gpus: int) -> list[str]:
    """Whether this machine can run what trainer.device asks for; `auto` never means the CPU where a GPU is meant."""
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
        "trainer.device=cpu: the installed vLLM is the build for CUDA, which cannot run on the CPU: make an "
        f"environment for the CPU ({device.CPU_ENVIRONMENT})"
    )


def hf_config_of(model: ModelConfig) -> Any:
    """The Hugging Face config of a model, as training and engine will see it."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(model.path, trust_remote_code=model.trust_remote_code, **model.architecture)


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
        f"critic.model.path={model.path}: transformers has no value head (token classification) for "
        f"{hf_config.model_type}: use an algorithm.adv_estimator without a critic, such as grpo"
    ]


def context_problems(config: "PPOConfig") -> list[str]:
    """Whether the model can hold a whole trajectory: the engine would refuse it only after everything has started."""
    model = config.actor_rollout_ref.model
    text = hf_config_of(model).get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    is_scaled = (getattr(text, "rope_parameters", None) or {}).get("rope_type", "default") != "default"
    if limit is None or is_scaled or config.max_model_len <= limit:
        return []
    return [
        f"data.max_prompt_length + data.max_response_length = {config.max_model_len} is more than the {limit} tokens "
        f"that {model.path} can hold (max_position_embeddings)"
    ]
