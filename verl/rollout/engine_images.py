"""Prompts with images, in the form in which vLLM's engine takes them when they are prepared."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature
from vllm.inputs.engine import mm_input
from vllm.multimodal.inputs import (
    MultiModalFieldConfig,
    MultiModalKwargsItems,
    PlaceholderRange,
)

from verl.agent import Image

MODALITY = "image"


def prompt_with_images(prompt_ids: list[int], images: Sequence[Image], image_token: int) -> Any:
    """The prompt with the tiles of its images and the places where they stand.

    vLLM would otherwise process the images itself, and find their places by a token that a policy
    can write too.
    """
    tiles = torch.tensor([len(image.pixels) for image in images])
    pixels = torch.from_numpy(np.concatenate([image.pixels for image in images]))
    whole = torch.ones((len(pixels), *pixels.shape[-2:]), dtype=torch.bool)
    of_tiles = MultiModalFieldConfig.flat_from_sizes(MODALITY, tiles)
    arguments = MultiModalKwargsItems.from_hf_inputs(
        BatchFeature({"pixel_values": pixels, "pixel_attention_mask": whole, "num_patches": tiles}),
        {
            "pixel_values": of_tiles,
            "pixel_attention_mask": of_tiles,
            "num_patches": MultiModalFieldConfig.batched(MODALITY, keep_on_cpu=True),
        },
    )
    places = [
        PlaceholderRange(place, len(image.token_ids), torch.tensor(image.token_ids) == image_token)
        for place, image in zip(places_of(prompt_ids, images), images, strict=True)
    ]
    return mm_input(
        prompt_ids,
        arguments,
        {MODALITY: [image.digest for image in images]},
        {MODALITY: places},
    )


def places_of(prompt_ids: Sequence[int], images: Sequence[Image]) -> list[int]:
    """Where the tokens of each image begin, in their order.

    Raises ValueError for an image whose tokens do not stand in the prompt behind those before it.
    """
    places: list[int] = []
    start = 0
    for number, image in enumerate(images):
        length = len(image.token_ids)
        candidates = range(start, len(prompt_ids) - length + 1)
        place = next((p for p in candidates if prompt_ids[p : p + length] == image.token_ids), None)
        if place is None:
            raise ValueError(f"image {number} does not stand in the prompt")
        places.append(place)
        start = place + length
    return places
