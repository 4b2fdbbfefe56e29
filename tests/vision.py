"""A tiny model that reads images: a random Idefics3, the family of SmolVLM, with its processor."""

from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image as Pictures
from tokenizers import AddedToken
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
)

from tests.models import make_tokenizer, perturb

TILES = [f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)]
SPECIAL = ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", *TILES]
SIDE = 56
"""Pixels of a side of a tile."""


def make_tiny_idefics3(folder: Path | str, *, seed: int = 0) -> Path:
    """Saves a random Idefics3 in float32 with its processor in `folder`; returns the folder.

    An image of up to 56 by 56 pixels is one tile, and four tokens between three that mark it.
    """
    tokenizer = make_tokenizer(folder)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [AddedToken(token, special=True) for token in SPECIAL]}
    )
    text = {
        "model_type": "llama",
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    tower = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": SIDE,
        "patch_size": 14,
    }
    config = Idefics3Config(
        text_config=text,
        vision_config=tower,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id,
        scale_factor=2,
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    model = Idefics3ForConditionalGeneration(config)
    perturb(model, seed=seed, scale=0.1)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    images = Idefics3ImageProcessorPil(
        size={"longest_edge": SIDE}, max_image_size={"longest_edge": SIDE}
    )
    Idefics3Processor(images, tokenizer, image_seq_len=4).save_pretrained(folder)
    return Path(folder)


def picture(seed: int, width: int = 40, height: int = 50) -> bytes:
    """A PNG file of random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = BytesIO()
    Pictures.fromarray(pixels).save(file, "PNG")
    return file.getvalue()
