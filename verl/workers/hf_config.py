"""What the configuration of a Hugging Face model says of it, read without importing or building any model."""

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Head = Literal["lm", "value"]
EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
LENGTH_DEPENDENT = ("dynamic", "longrope")
"""Kinds of RoPE whose frequencies depend on the longest position of a forward pass."""


def rope_kinds(config: "PretrainedConfig") -> set[str]:
    """The kinds of RoPE of a configuration: of all layers, or of each layer type."""
    parameters = getattr(config.get_text_config(), "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return {entry["rope_type"] for entry in (nested or [parameters]) if "rope_type" in entry}


def rope_limit(config: "PretrainedConfig") -> int:
    """Tokens up to which RoPE of the kinds `LENGTH_DEPENDENT` is not stretched."""
    text = config.get_text_config()
    parameters = text.rope_parameters
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    named = [entry.get("original_max_position_embeddings") for entry in (nested or [parameters])]
    return min(value or text.max_position_embeddings for value in named)
