"""The layout of a batch: which row belongs to which optimizer step, and to which rank."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from verl.agent import Trajectory
from verl.protocol import DataProto, collate_rows, rows_of
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
    """The batch, its rows ordered by rank, with `uid`, `data_source`, `trees`, mini-batch columns.

    `num_mini_batches`: for the actor, and the critic if there is one, the name of its mini-batch
    column and how many optimizer steps the batch takes. Consecutive trajectories form a mini-batch,
    so that the rows of a trajectory stay together; each mini-batch is spread over
    the ranks with nearly equal tokens. `meta_info["rank_sizes"]` is the number of rows of each
    rank. Without `state_masking` every response token is trained on (the paper's ablation); this is
    the only place that decides it.
    """
    rows = rows_of(trajectories)
    lengths = [r.row.length for r in rows]
    position = np.array([r.trajectory_number for r in rows])
    mini_batches = {
        column: position * number // len(trajectories)
        for column, number in num_mini_batches.items()
    }
    ranks = rows_of_ranks(lengths, list(mini_batches.values()), world_size)
    # ordered before the batch is made, to avoid a copy of its large tensors
    order = [row for rank in ranks for row in rank]
    data = collate_rows([rows[row] for row in order], pad_token_id)
    jobs_of_rows = [jobs[position[row]] for row in order]
    if not state_masking:
        prompt_len = data.batch["prompts"].shape[1]
        data = data.with_tensors(response_mask=data.batch["attention_mask"][:, prompt_len:])
    return DataProto.from_dict(
        {
            **data.batch,
            **{column: torch.from_numpy(index[order]) for column, index in mini_batches.items()},
            "trees": torch.tensor([job.tree for job in jobs_of_rows]),
        },
        {
            "uid": np.array([job.uid for job in jobs_of_rows], dtype=object),
            "data_source": np.array([job.row["data_source"] for job in jobs_of_rows], dtype=object),
        },
        {"rank_sizes": [len(rank) for rank in ranks], "num_mini_batches": dict(num_mini_batches)},
    )


def rows_of_ranks(
    lengths: Sequence[int], mini_batches: Sequence[np.ndarray], world_size: int
) -> list[list[int]]:
    """The rows of each rank, with nearly the same number of tokens from every mini-batch.

    `mini_batches`: one division of the rows into mini-batches [B] for the actor, and one for the
    critic. The borders of all divisions cut the batch into pieces. Each piece is spread over the
    ranks, and so are the mini-batches, which consist of pieces. Where rows do not divide evenly,
    another rank gets one more in each piece.
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
