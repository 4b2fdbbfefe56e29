"""Weights under the names of their checkpoint, which all engines can read.

transformers holds some weights in another form than checkpoints do: the experts of a layer in one
tensor, or a language model without the prefix that it has beside a vision tower. It also has the
conversion back, which is used here.
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
    """Converts `weights` to the form of the model's checkpoint, one decoder layer at a time.

    `weights` must be ordered by layer; weights that are converted together are always of one layer.
    Meta tensors can be converted too.
    """
    for _, group in groupby(weights, key=_block_of):
        yield from revert_weight_conversion(model, dict(group)).items()


def _block_of(weight: tuple[str, torch.Tensor]) -> str:
    """The layer that a weight belongs to; its own name outside of the layers."""
    found = BLOCK.match(weight[0])
    return found.group() if found else weight[0]
