"""Rows of a batch seen as trajectories: estimators and filters compare whole trajectories.

A trajectory whose context was written anew is several rows (`verl.agent.Trajectory.rewrite`). Where
every trajectory is one row, all of this changes nothing.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from verl.protocol import DataProto


def has_several_rows(data: DataProto) -> bool:
    """Whether some trajectory of the batch is more than one row."""
    return "row" in data.batch and bool(data.batch["row"].any())


def sum_of_trajectory(values: Tensor, data: DataProto) -> Tensor:
    """For each row [B] the sum of `values` [B] over all rows of its trajectory."""
    if not has_several_rows(data):
        return values
    trajectory = data.batch["trajectory"]
    sums = torch.zeros(int(trajectory.max()) + 1, dtype=values.dtype)
    return sums.index_add(0, trajectory, values)[trajectory]


def one_of_each(data: DataProto) -> Tensor | slice:
    """Selects one row of every trajectory, in the order of the batch."""
    if not has_several_rows(data):
        return slice(None)
    _, first = np.unique(data.batch["trajectory"].numpy(), return_index=True)
    return torch.from_numpy(np.sort(first))


def with_seq_tokens(data: DataProto) -> DataProto:
    """Adds `seq_tokens` if a trajectory has several rows: losses per trajectory divide by it."""
    if not has_several_rows(data):
        return data
    tokens = data.batch["response_mask"].sum(-1)
    return data.with_tensors(seq_tokens=sum_of_trajectory(tokens, data))


@dataclass(frozen=True)
class Joined:
    """The policy's tokens of a batch [B, R] with the rows of a trajectory one after the other.

    `join` gives [S, L]: S trajectories, L the most tokens that one has in all of its rows.
    """

    mask: Tensor
    """The tokens in question, boolean [B, R]."""
    rows: Tensor
    """The row of each token, [N]."""
    columns: Tensor
    """The column of each token, [N]."""
    numbers: Tensor
    """The trajectory of each token, [N]: its row in joined tensors."""
    places: Tensor
    """The place of each token in its trajectory, [N]: its column in joined tensors."""
    num_trajectories: int

    @classmethod
    def of(cls, data: DataProto, mask: Tensor) -> "Joined":
        """The layout of the tokens in `mask` [B, R]."""
        _, number_of_row = torch.unique(data.batch["trajectory"], return_inverse=True)
        rows, columns = mask.bool().nonzero(as_tuple=True)
        # stable: the tokens of a row are in order already
        order = torch.from_numpy(
            np.lexsort((data.batch["row"][rows].numpy(), number_of_row[rows].numpy()))
        )
        rows = rows[order]
        columns = columns[order]
        numbers = number_of_row[rows]
        counts = torch.bincount(numbers, minlength=int(number_of_row.max()) + 1)
        starts = counts.cumsum(0) - counts
        places = torch.arange(len(numbers)) - starts[numbers]
        return cls(mask.bool(), rows, columns, numbers, places, len(counts))

    @property
    def joined_mask(self) -> Tensor:
        """Where joined tensors have a token, boolean [S, L]."""
        return self.join(self.mask)

    def join(self, values: Tensor, pad: float = 0) -> Tensor:
        """[B, R] -> [S, L]."""
        width = int(self.places.max()) + 1 if len(self.places) else 1
        joined = torch.full((self.num_trajectories, width), pad, dtype=values.dtype)
        joined[self.numbers, self.places] = values[self.rows, self.columns]
        return joined

    def split(self, joined: Tensor) -> Tensor:
        """[S, L] -> [B, R], 0 where there is no token."""
        values = torch.zeros(self.mask.shape, dtype=joined.dtype)
        values[self.rows, self.columns] = joined[self.numbers, self.places]
        return values
