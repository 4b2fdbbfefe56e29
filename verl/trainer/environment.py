"""Checks of what a run finds: its machine, and the models and endpoints that it names.

Each check returns its problems as texts that name the key and the cure.
"""

from typing import TYPE_CHECKING, Any, Protocol

from verl.trainer.host import host_problems
from verl.utils import device
from verl.utils.endpoint import check_endpoint
from verl.utils.images import FAMILIES
from verl.workers.config import FrozenModelConfig

if TYPE_CHECKING:
    from verl.trainer.config import PPOConfig


class Preflight(Protocol):
    """The part of an agent that is asked before the start."""

    needs_tokens: bool

    def preflight(self) -> list[str]: ...


def environment_problems(config: "PPOConfig", agent: Preflight, gpus: int) -> list[str]:
    """What a run needs from its environment and does not find.

    Checks for usable GPUs, a model that can hold a trajectory, an endpoint or a retriever that
    answers, folders that can be written, and enough shared memory. `gpus`: how many GPUs a run on
    CUDA needs on this machine, 0 if they are elsewhere.
    """
    rollout = config.actor_rollout_ref.rollout
    if rollout.name == "openai":
        problem = check_endpoint(rollout.endpoint)
        problems = [f"actor_rollout_ref.rollout.endpoint.url: {problem}"] if problem else []
        if agent.needs_tokens:
            problems.append(
                "actor_rollout_ref.rollout.name=openai: this agent speaks in the tokens of a chat "
                "template (agent.format), and an endpoint takes text; use agent.format=tags"
            )
    else:
        problems = device_problems(config, gpus)
        problems += context_problems(config) + critic_problems(config)
        problems += image_family_problems(config)
        problems += teacher_token_problems(config)
        if config.trainer.ray_address is None:
            problems += host_problems(config)
    return problems + agent.preflight()


def device_problems(config: "PPOConfig", gpus: int) -> list[str]:
    """Why this machine cannot run what trainer.device asks for.

    `auto` never falls back to the CPU on a machine or in an environment that is meant for GPUs.
    """
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
    """Why a run on the CPU cannot use an environment that is made for GPUs."""
    return (
        "trainer.device=cpu: the installed vLLM is the build for CUDA, which cannot run on the "
        f"CPU: make an environment for the CPU ({device.CPU_ENVIRONMENT})"
    )


def hf_config_of(model: FrozenModelConfig) -> Any:
    """The Hugging Face config of a model, as training and engine will see it."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(
        model.path, trust_remote_code=model.trust_remote_code, **model.architecture
    )


def image_family_problems(config: "PPOConfig") -> list[str]:
    """A policy that reads images, of a family whose images training does not know."""
    model = config.actor_rollout_ref.model
    if not model.reads_images:
        return []
    family = hf_config_of(model).model_type
    if family in FAMILIES:
        return []
    return [
        f"actor_rollout_ref.model.reads_images=true: model.path={model.path} is of the family "
        f"{family}, and images can be trained on with {', '.join(FAMILIES)} (docs/images.md)"
    ]


def critic_problems(config: "PPOConfig") -> list[str]:
    """A critic's model that transformers cannot put a value head on."""
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
        f"for {hf_config.model_type}: use an algorithm.adv_estimator without a critic, such as grpo"
    ]


def teacher_token_problems(config: "PPOConfig") -> list[str]:
    """A teacher that reads other tokens than the policy writes."""
    from transformers import AutoTokenizer

    if not config.use_teacher:
        return []
    policy = config.actor_rollout_ref.model
    teacher = config.teacher.model
    try:
        tokens = AutoTokenizer.from_pretrained(
            teacher.path, trust_remote_code=teacher.trust_remote_code
        ).get_vocab()
    except (OSError, ValueError) as error:
        return [
            f"teacher.model.path={teacher.path}: no tokenizer could be loaded, so that its tokens "
            f"cannot be compared with the policy's ({error})"
        ]
    written = AutoTokenizer.from_pretrained(
        policy.tokenizer_path or policy.path, trust_remote_code=policy.trust_remote_code
    ).get_vocab()
    differing = sorted(word for word in written if tokens.get(word) != written[word])
    if not differing:
        return []
    return [
        f"teacher.model.path={teacher.path}: {len(differing):,} of the policy's {len(written):,} "
        f"tokens have another number there, or none, such as {differing[0]!r}: a teacher needs the "
        "tokenizer of the policy, as models of one family have it"
    ]


def context_problems(config: "PPOConfig") -> list[str]:
    """Models whose context is too short for a whole trajectory.

    The engine would refuse the policy too, but only after everything has started.
    """
    models: list[FrozenModelConfig] = [config.actor_rollout_ref.model]
    if config.use_teacher:
        models.append(config.teacher.model)
    return [problem for model in models for problem in length_problems(config, model)]


def length_problems(config: "PPOConfig", model: FrozenModelConfig) -> list[str]:
    """A model whose context is too short for a whole trajectory."""
    text = hf_config_of(model).get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    rope = getattr(text, "rope_parameters", None) or {}
    is_scaled = rope.get("rope_type", "default") != "default"
    if limit is None or is_scaled or config.max_model_len <= limit:
        return []
    return [
        f"data.max_prompt_length + data.max_response_length = {config.max_model_len} is more than "
        f"the {limit} tokens that {model.path} can hold (max_position_embeddings)"
    ]
