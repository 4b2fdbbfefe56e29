"""A shallow random copy of a model, built in about a second.

It has the model's real configuration, but few layers and narrow MLPs. Whether rows affect each
other depends only on structure: on the kinds of layers, their attention and the arguments that they
get. The widths of attention are the real ones, because families derive other sizes from them.
"""

from typing import Any, Literal

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    PretrainedConfig,
    PreTrainedModel,
)

Head = Literal["lm", "value"]
MOST_LAYERS = 12
VOCAB = 128
MLP = 64
EXPERTS = 8
WINDOW = 8
"""Window of sliding and chunked attention, in tokens."""
ROPE_LIMIT = 14
"""Tokens from which on RoPE is stretched. Some rows of a probe are shorter, some longer."""
MLP_KEYS = (
    "intermediate_size",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "shared_intermediate_size",
    "intermediate_size_mlp",
    "ffn_dim",
    "n_inner",
    "ffn_hidden_size",
)
EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
WINDOW_KEYS = ("sliding_window", "attention_chunk_size", "window_size", "attention_window_size")
LENGTH_DEPENDENT = ("dynamic", "longrope")
"""Kinds of RoPE whose frequencies depend on the longest position of a forward pass."""
Entries = dict[str, Any]


def shallow_model(
    config: PretrainedConfig,
    head: Head,
    *,
    stretched_rope: bool = True,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A random float32 model on the CPU with the layer types of `config`.

    It is the same in every process. `stretched_rope`: whether rows may be so long that RoPE of the
    kinds `LENGTH_DEPENDENT` is stretched. Raises whatever transformers raises for a configuration
    that it cannot build.
    """
    kept = _layers_to_keep(config, head, trust_remote_code)
    shrunk = shallow_config(config, kept, stretched_rope)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _build(shrunk, head, trust_remote_code).float().eval()
        _randomize(model)
    return model


def shallow_config(
    config: PretrainedConfig, layers: int, stretched_rope: bool = True
) -> PretrainedConfig:
    """`config` with few layers, small MLPs, few experts, a small vocabulary and short windows.

    It keeps the first `layers` layers.
    """
    entries = config.to_dict()
    text = config.get_text_config()
    if text is config:
        _shrink(entries, config, layers)
    else:
        for key, sub in entries.items():
            if not isinstance(sub, dict) or not isinstance(
                getattr(config, key, None), PretrainedConfig
            ):
                continue
            if getattr(config, key) is text:
                _shrink(sub, text, layers)
            else:  # towers for images or sound, which are built but not run
                _shrink(sub, getattr(config, key), 1)
    shrunk = type(config).from_dict(entries)
    if stretched_rope and rope_kinds(config) & set(LENGTH_DEPENDENT):
        _shorten_rope(shrunk.get_text_config())
    if hasattr(config, "auto_map"):
        shrunk._name_or_path = config._name_or_path
    return shrunk


def rope_kinds(config: PretrainedConfig) -> set[str]:
    """The kinds of RoPE in a configuration, which has one for all layers or one per layer type."""
    parameters = getattr(config.get_text_config(), "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return {entry["rope_type"] for entry in (nested or [parameters]) if "rope_type" in entry}


def rope_limit(config: PretrainedConfig) -> int:
    """The most tokens for which RoPE of the kinds `LENGTH_DEPENDENT` is not stretched."""
    text = config.get_text_config()
    parameters = text.rope_parameters
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    named = [entry.get("original_max_position_embeddings") for entry in (nested or [parameters])]
    return min(value or text.max_position_embeddings for value in named)


def _build(config: PretrainedConfig, head: Head, trust_remote_code: bool) -> PreTrainedModel:
    if head == "value":
        config.num_labels = 1
        return AutoModelForTokenClassification.from_config(
            config, trust_remote_code=trust_remote_code
        )
    return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)


def _layers_to_keep(config: PretrainedConfig, head: Head, trust_remote_code: bool) -> int:
    """How many first layers contain every kind of layer, `MOST_LAYERS` at most.

    The real model is built without storage to find out, so that no list of families is needed.
    """
    number = config.get_text_config().num_hidden_layers
    with torch.device("meta"):
        model = _build(type(config).from_dict(config.to_dict()), head, trust_remote_code)
    stacks = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == number]
    if not stacks:
        return min(number, MOST_LAYERS)
    seen: set[Any] = set()
    kept = 1
    for place, layer in enumerate(stacks[0]):
        kind = _kind(layer)
        if kind not in seen:
            seen.add(kind)
            kept = place + 1
    return min(max(kept, 2), number, MOST_LAYERS)


def _kind(layer: torch.nn.Module) -> tuple[Any, ...]:
    """The kind of a layer: its modules, with their shapes and settings.

    The index of the layer is not part of it.
    """
    parts: list[Any] = []
    for name, module in layer.named_modules():
        settings = tuple(item for item in sorted(vars(module).items()) if _is_setting(*item))
        parts.append((name, type(module).__name__, settings))
    shapes = tuple((name, tuple(parameter.shape)) for name, parameter in layer.named_parameters())
    return (*parts, shapes)


def _is_setting(name: str, value: object) -> bool:
    """Whether an attribute of a module is a plain value other than the index of its layer."""
    is_index = "idx" in name or "layer_id" in name
    return isinstance(value, (bool, int, float, str)) and not is_index


def _shrink(entries: Entries, config: PretrainedConfig, layers: int) -> None:
    """Reduces the sizes in `entries`, the dictionary of `config`, in place."""

    def key_of(name: str) -> str:
        return config.attribute_map.get(name, name)

    number = getattr(config, "num_hidden_layers", None)
    for key, value in entries.items():
        one_per_layer = isinstance(value, list) or (
            isinstance(value, str) and key == "hybrid_override_pattern"
        )
        if one_per_layer and number is not None and len(value) == number and number > layers:
            entries[key] = value[:layers]
    if isinstance(entries.get(key_of("num_hidden_layers")), int):
        entries[key_of("num_hidden_layers")] = layers
    _cap(entries, (key_of("vocab_size"),), VOCAB)
    for key, value in entries.items():
        if key.endswith("_token_id") and isinstance(value, int) and value >= VOCAB:
            entries[key] = VOCAB - 1
    _cap(entries, MLP_KEYS, MLP)
    _cap(entries, EXPERT_KEYS, max(EXPERTS, 2 * (entries.get(key_of("num_experts_per_tok")) or 1)))
    _cap(entries, WINDOW_KEYS, WINDOW)


def _cap(entries: Entries, keys: tuple[str, ...], most: int) -> None:
    for key in keys:
        if isinstance(entries.get(key), int) and not isinstance(entries[key], bool):
            entries[key] = min(entries[key], most)


def _shorten_rope(text: PretrainedConfig) -> None:
    """Makes RoPE be stretched from `ROPE_LIMIT` tokens on."""
    text.max_position_embeddings = ROPE_LIMIT
    if hasattr(text, "original_max_position_embeddings"):
        text.original_max_position_embeddings = ROPE_LIMIT
    nested = [value for value in text.rope_parameters.values() if isinstance(value, dict)]
    for entry in nested or [text.rope_parameters]:
        if "original_max_position_embeddings" in entry:
            entry["original_max_position_embeddings"] = ROPE_LIMIT


@torch.no_grad()
def _randomize(model: torch.nn.Module) -> None:
    """Sets random weights that keep activations near 1.

    Otherwise an effect of one row on another could be lost in rounding.
    """
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            continue
        if parameter.dim() >= 2:
            spread = float(parameter.std())
            wanted = parameter.shape[-1] ** -0.5
            if 0 < spread < float("inf"):
                parameter.mul_(wanted / spread)
            else:
                parameter.normal_(std=wanted)
        elif name.endswith("bias") or "norm" in name:
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
