"""Scores of the trajectories of one prompt, compared with each other."""

import numpy as np
import torch
from torch import Tensor

ROUNDING = 1e-6
"""Error of a sum of a few numbers in float32, relative to the largest, or absolute below 1."""


def group_rows(index: np.ndarray) -> list[Tensor]:
    """The row numbers of each group that `index` [B] names."""
    names, group_of = np.unique(np.asarray(index), return_inverse=True)
    return [torch.from_numpy(np.flatnonzero(group_of == group)) for group in range(len(names))]


def per_token(advantages: Tensor, response_mask: Tensor) -> Tensor:
    """Advantages [B] of rows, spread over their policy tokens [B, R]."""
    return torch.where(response_mask.bool(), advantages.unsqueeze(-1), 0.0)


def are_equal(scores: Tensor) -> bool:
    """Whether the scores [N] of a group are the same, up to the rounding of a sum in float32.

    A score is the sum of what single turns are paid, so equal scores may differ in their last bits.
    """
    largest = max(1.0, float(scores.abs().max()))
    return float(scores.max() - scores.min()) <= ROUNDING * largest


def centred(scores: Tensor) -> Tensor:
    """The scores [N] of a group of at least two, minus their mean.

    Equal scores become exactly 0, because a rounding error would become large when it is divided by
    their std.
    """
    if are_equal(scores):
        return torch.zeros_like(scores)
    members = scores - scores[0]
    return members - members.mean()


def standardised(scores: Tensor, by_std: bool, epsilon: float = 1e-6) -> Tensor:
    """The scores [N] of a group of at least two, minus their mean.

    With `by_std` they are divided by their unbiased std plus `epsilon`.
    """
    members = centred(scores)
    return members / (members.std() + epsilon) if by_std else members
