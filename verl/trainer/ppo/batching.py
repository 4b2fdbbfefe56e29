"""The layout of a batch: which row belongs to which optimizer step, and to which rank."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from verl.agent import Trajectory
from verl.protocol import DataProto, collate_trajectories
from verl.rollout.agent_worker import Job
from verl.utils.seqlen_balancing import balance


def build_batch(
    jobs: Sequence[Job],
    trajectories: Sequence[Trajectory],
    *,
    pad_token_id: int,
    num_mini_batches: Mapping[str, int],
    world_size: int,
    state_masking: bool,
) -> DataProto:
    """The batch, its rows ordered by rank, with `uid`, `data_source` and a column per role.

    `num_mini_batches` names the columns: for the actor, and for the critic where there is one, how
    many optimizer steps the batch takes. Consecutive rows form mini-batches, so that a group stays
    together; each mini-batch is spread over the ranks with nearly equal tokens.
    `meta_info["rank_sizes"]` is what each rank gets. Without `state_masking` every response token
    is trained on (the paper's ablation); this is the only place that decides it.
    """
    lengths = [len(t.prompt_ids) + t.response_length for t in trajectories]
    position = np.arange(len(lengths))
    mini_batches = {
        column: position * number // len(lengths) for column, number in num_mini_batches.items()
    }
    ranks = rows_of_ranks(lengths, list(mini_batches.values()), world_size)
    # ordered before there is a batch, which is too large to be copied for it
    order = [row for rank in ranks for row in rank]
    data = collate_trajectories([trajectories[row] for row in order], pad_token_id)
    if not state_masking:
        prompt_len = data.batch["prompts"].shape[1]
        data = data.with_tensors(response_mask=data.batch["attention_mask"][:, prompt_len:])
    return DataProto.from_dict(
        {
            **data.batch,
            **{column: torch.from_numpy(index[order]) for column, index in mini_batches.items()},
        },
        {
            "uid": np.array([jobs[row].uid for row in order], dtype=object),
            "data_source": np.array([jobs[row].row["data_source"] for row in order], dtype=object),
        },
        {"rank_sizes": [len(rank) for rank in ranks], "num_mini_batches": dict(num_mini_batches)},
    )


def rows_of_ranks(
    lengths: Sequence[int], mini_batches: Sequence[np.ndarray], world_size: int
) -> list[list[int]]:
    """The rows of each rank, which has nearly the same number of tokens of every mini-batch [B].

    Of several divisions into mini-batches (the actor's and the critic's), each piece between two
    borders is spread, so that the mini-batches of all divisions are. Where rows do not divide
    evenly, the parts with more rows go to another rank in each piece.
    """
    ranks: list[list[int]] = [[] for _ in range(world_size)]
    _, piece_of_row = np.unique(np.stack(mini_batches), axis=1, return_inverse=True)
    for piece in range(int(piece_of_row.max()) + 1):
        rows = np.flatnonzero(piece_of_row == piece).tolist()
        parts = balance([lengths[row] for row in rows], world_size)
        first = piece % world_size
        for rank, part in enumerate(parts[first:] + parts[:first]):
            ranks[rank] += [rows[i] for i in part]
    return ranks
