"""The decision whether rows are packed: taken once, in the driver, before anything starts."""

import logging
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from verl.trainer.environment import hf_config_of
from verl.utils.errors import ConfigError
from verl.workers.config import FrozenModelConfig, FSDPConfig
from verl.workers.packing import OTHERS, Packing, packing_of
from verl.workers.shallow import EXPERT_KEYS, LENGTH_DEPENDENT, Head, rope_kinds, rope_limit

if TYPE_CHECKING:
    from verl.trainer.config import PPOConfig

AnyModel = TypeVar("AnyModel", bound=FrozenModelConfig)
logger = logging.getLogger(__name__)
WRONG_ON_CPU = ("lfm2",)
"""Model types for which vLLM 0.32 on the CPU gives other log-probs than transformers."""


def decide_packing(config: "PPOConfig") -> "PPOConfig":
    """Probes policy, critic and teacher; logs the verdicts and returns `config` with them.

    Raises ConfigError, with the key of the model, for one that cannot be trained here.
    """
    section = config.actor_rollout_ref
    critic = config.critic
    problems = rope_problems(config) + cpu_engine_problems(config)
    policy = _decide(
        config, "actor_rollout_ref.model", section.model, section.actor.fsdp_config, problems
    )
    update: dict[str, Any] = {"actor_rollout_ref": section.model_copy(update={"model": policy})}
    if config.use_critic:
        model = _decide(config, "critic.model", critic.model, critic.fsdp_config, problems)
        update["critic"] = critic.model_copy(update={"model": model})
    if config.use_teacher:
        teacher = config.teacher
        model = _decide(config, "teacher.model", teacher.model, teacher.fsdp_config, problems)
        update["teacher"] = teacher.model_copy(update={"model": model})
    if problems:
        raise ConfigError(problems)
    return config.model_copy(update=update)


def rope_problems(config: "PPOConfig") -> list[str]:
    """Contexts so long that trainer and engine would stretch RoPE differently.

    For longrope and dynamic RoPE, transformers chooses the frequencies by the length of each row,
    vLLM once by the longest context that it is configured for.
    """
    model = config.actor_rollout_ref.model
    hf_config = hf_config_of(model)
    kinds = rope_kinds(hf_config) & set(LENGTH_DEPENDENT)
    if not kinds or config.max_model_len <= rope_limit(hf_config):
        return []
    return [
        f"data.max_prompt_length + data.max_response_length = {config.max_model_len} is more than "
        f"the {rope_limit(hf_config)} tokens up to which RoPE of type {'/'.join(sorted(kinds))} is "
        f"not stretched ({model.path}): beyond, engine and trainer choose its frequencies "
        "differently. Shorten the contexts, or set "
        "++actor_rollout_ref.model.override_config.rope_parameters to a type without that choice, "
        "such as yarn"
    ]


def cpu_engine_problems(config: "PPOConfig") -> list[str]:
    """Families that vLLM computes wrongly on the CPU (docs/results/families.md has the figures).

    Mixtures of experts: the CPU kernels keep the experts in a packed form that a reload does not
    update, so that engine and trainer differ by 2.7 nats and more after a sync. Short convolutions
    of LFM2: engine and trainer differ by 1 nat from the start.
    """
    model = config.actor_rollout_ref.model
    text = hf_config_of(model).get_text_config()
    experts = max(getattr(text, key, None) or 0 for key in EXPERT_KEYS)
    if config.device == "cuda":
        return []
    where = f"actor_rollout_ref.model.path={model.path}: {text.model_type}"
    if experts > 1:
        return [
            f"{where} has {experts} experts, which an engine on the CPU does not take over in a "
            "weight sync: train it on GPUs, or take a dense model"
        ]
    if text.model_type in WRONG_ON_CPU:
        return [
            f"{where} is computed wrongly by an engine on the CPU: train it on GPUs, or take "
            "another family"
        ]
    return []


def _decide(
    config: "PPOConfig", key: str, model: AnyModel, fsdp: FSDPConfig, problems: list[str]
) -> AnyModel:
    """Probes `model` and returns it with the verdict, or adds the reason to `problems`."""
    head: Head = "value" if key.startswith("critic") else "lm"
    on_gpu = config.device == "cuda"
    dtype = getattr(torch, fsdp.dtype)
    try:
        packing = packing_of(model, head, on_gpu, dtype, longest=config.max_model_len)
    except ConfigError as error:
        problems += [f"{key}: {problem}" for problem in error.problems]
        return model
    logger.info("%s: %s", key, in_words(packing))
    return decided(model, packing)


def in_words(packing: Packing) -> str:
    """The verdict as one line for the log."""
    if packing.packs and packing.reason:
        return f"rows share forward passes, because {packing.reason}"
    if packing.packs:
        return (
            "rows share forward passes (a random copy gives each what it gets alone, to "
            f"{packing.gap:.0e})"
        )
    return (
        f"one row a forward pass, attention {packing.attention}, which is exact and slower, "
        f"because {packing.reason}"
    )


def decided(model: AnyModel, packing: Packing) -> AnyModel:
    """`model` with the verdict, so that no other process has to probe it again."""
    override = model.override_config
    if not packing.packs and packing.attention in OTHERS:
        override = override | {"attn_implementation": packing.attention}
    return model.model_copy(update={"pack_rows": packing.packs, "override_config": override})
