"""Weights under the names of their checkpoint, which every engine reads.

transformers keeps some weights in another form than the checkpoints: the experts of a layer in one
tensor, or a language model without the prefix that it has beside a vision tower. It knows the way
back.
"""

import re
from collections.abc import Iterable, Iterator
from itertools import groupby

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

BLOCK = re.compile(r"^.*?\.\d+\.")


def checkpoint_format(
    model: PreTrainedModel, weights: Iterable[tuple[str, torch.Tensor]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """`weights` as the checkpoint of `model` has them, a decoder layer at a time.

    `weights` come layer by layer. What belongs together lies within one layer. Works on tensors of
    the meta device too.
    """
    for _, group in groupby(weights, key=_block_of):
        yield from revert_weight_conversion(model, dict(group)).items()


def _block_of(weight: tuple[str, torch.Tensor]) -> str:
    """The layer that a weight belongs to; its own name outside of the layers."""
    found = BLOCK.match(weight[0])
    return found.group() if found else weight[0]
