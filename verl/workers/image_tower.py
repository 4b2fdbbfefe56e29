"""A policy that reads images: which class it is, what of it is trained, what it is given.

Its tower for images, with what leads from there to the language model, is not trained. So ranks
whose rows have no images need not run it, and an engine may keep what it has computed of an image
over updates of the weights.
"""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from verl.workers.config import FrozenModelConfig

PIXELS = "pixels"
"""The column of the tiles: [B, M, 3, H, W]."""
NEVER = -1e4
"""The logit of tokens that are never sampled: their probability is 0."""


def policy_class(config: FrozenModelConfig) -> Any:
    """The class of transformers that loads the model."""
    return AutoModelForImageTextToText if config.reads_images else AutoModelForCausalLM


def freeze_tower(model: PreTrainedModel) -> None:
    """Excludes everything from training that is neither the language model nor its head."""
    trained = {id(p) for p in language_model(model).parameters()}
    head = model.get_output_embeddings()
    if head is not None:
        trained |= {id(p) for p in head.parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.requires_grad and id(parameter) in trained)


def language_model(model: PreTrainedModel) -> PreTrainedModel:
    """The decoder of a model that reads images; the model itself if it reads none."""
    base = model.base_model
    return getattr(base, "text_model", None) or getattr(base, "language_model", None) or model


def forbid_image_tokens(model: PreTrainedModel) -> None:
    """Makes training know that the engine never samples the token that stands for an image.

    In a turn of the policy it would stand for an image that is not there.
    """
    model.never_sampled = torch.tensor([model.config.image_token_id])  # pyright: ignore


def sampled_logits(model: PreTrainedModel, logits: torch.Tensor) -> torch.Tensor:
    """The logits [n, V] of the distribution that the engine samples from."""
    never = getattr(model, "never_sampled", None)
    return logits if never is None else logits.index_fill(-1, never.to(logits.device), NEVER)


def image_arguments(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The model's arguments for the images of packed rows: their tiles, [1, tiles, 3, H, W].

    None if the rows have no images.
    """
    if PIXELS not in batch:
        return {}
    tiles = batch[PIXELS].flatten(0, 1)
    is_tile = (tiles != 0).flatten(1).any(1)
    return {"pixel_values": tiles[is_tile][None]} if is_tile.any() else {}
