"""Low-rank adapters (LoRA, arXiv 2106.09685) by PEFT, and their merging into the weights."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from verl.utils.errors import ConfigError
from verl.workers.config import ModelConfig

PREFIX = "base_model.model."
BASE = ".base_layer"
VALUE_HEAD = "score"


def add_adapters(model: PreTrainedModel, config: ModelConfig) -> PreTrainedModel:
    """Freezes `model` and adds trained adapters at `target_modules`.

    A value head is new, so it is trained as well. Raises ConfigError for adapters that could not be
    merged into plain weights, and for a value head with an unexpected name.
    """
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        target_modules=config.target_modules,
        exclude_modules=[VALUE_HEAD] if hasattr(model, VALUE_HEAD) else None,
        lora_dropout=0.0,
    )
    adapted = get_peft_model(model, lora)
    names = [name for name, _ in adapted.named_parameters() if ".lora_" in name]
    if any(".lm_head." in name or ".embed_tokens." in name for name in names):
        raise ConfigError(
            [
                f"model.target_modules={config.target_modules}: not the embedding or the head, "
                "only layers"
            ]
        )
    if hasattr(model, VALUE_HEAD):
        getattr(model, VALUE_HEAD).requires_grad_(True)
    elif model.get_output_embeddings() is None:
        raise ConfigError(
            [
                f"model.lora_rank: the value head of {model.config.model_type} is not called "
                f"{VALUE_HEAD}"
            ]
        )
    return cast(PreTrainedModel, adapted)


def base_model(model: PreTrainedModel) -> PreTrainedModel:
    """The Hugging Face model without PEFT's wrapper."""
    return cast(PreTrainedModel, model.get_base_model()) if isinstance(model, PeftModel) else model


def scaling(model: PreTrainedModel) -> float:
    """The factor of the product of the two adapter matrices; 0 without adapters."""
    if not isinstance(model, PeftModel):
        return 0.0
    lora = cast(LoraConfig, model.peft_config["default"])
    return lora.lora_alpha / lora.r


def plain_name(name: str) -> str | None:
    """The Hugging Face name of a parameter, None for that of an adapter."""
    return None if ".lora_" in name else name.removeprefix(PREFIX).replace(BASE, "")


def merged(
    parameters: Mapping[str, Any], scale: float, whole: Callable[[Any], torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Hugging Face names and whole tensors, with adapters merged: W + scale * B A.

    `whole` gathers a parameter.
    """
    for name, value in parameters.items():
        if (plain := plain_name(name)) is None:
            continue
        tensor = whole(value)
        (stem, found, _) = name.partition(f"{BASE}.weight")
        if found:
            a, b = (whole(parameters[f"{stem}.lora_{x}.default.weight"]).float() for x in "AB")
            tensor = (tensor.float() + scale * (b @ a)).to(tensor.dtype)
        yield plain, tensor
