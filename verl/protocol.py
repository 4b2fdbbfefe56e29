"""The batch that travels between the driver and the workers.

Shapes: B rows, P longest prompt, R longest response, T = P + R. A trajectory is one row, or several
where its context was written anew (`verl.agent.Trajectory.rewrite`).

| key                 | shape    | dtype   | written by | meaning |
|---|---|---|---|---|
| prompts             | [B, P]   | int64   | agent loop | prompt ids, padded left |
| responses           | [B, R]   | int64   | agent loop | what followed the prompt, padded right |
| attention_mask      | [B, P+R] | int64   | agent loop | 1 = real token |
| response_mask       | [B, R]   | int64   | agent loop | 1 = sampled by the policy: trained |
| rollout_log_probs   | [B, R]   | float32 | agent loop | log-prob as sampled, 0 elsewhere |
| policy_versions     | [B, R]   | int32   | agent loop | version that sampled it; -1 elsewhere |
| turns               | [B, R]   | int32   | agent loop | the policy's turn, from 0; -1 elsewhere |
| states              | [B, R]   | int64   | agent loop | what it had read before the turn; -1 |
| token_level_scores  | [B, R]   | float32 | reward     | score: of turns, and the rest at the end |
| token_level_rewards | [B, R]   | float32 | advantage  | scores, less any KL in the reward |
| old_log_probs       | [B, R]   | float32 | actor      | log-prob before the update |
| ref_log_prob        | [B, R]   | float32 | reference  | log-prob under the initial weights |
| teacher_log_prob    | [B, R]   | float32 | teacher    | log-prob under the teacher, if any |
| entropy             | [B, R]   | float32 | actor      | of recorded rows, else NaN |
| values              | [B, R]   | float32 | critic     | value of the state it was chosen in |
| advantages, returns | [B, R]   | float32 | advantage  | see core_algos |
| pixels              | [B, M, 3, H, W] | float32 | agent loop | tiles of images, 0 behind |
| truncated           | [B]      | bool    | agent loop | cut off by a token limit |
| void_turns          | [B]      | int64   | agent loop | turns that neither acted nor answered |
| rollout_is_weights  | [B, R]   | float32 | trainer    | importance weight, where these are on |
| trajectory          | [B]      | int64   | agent loop | number of the row's trajectory |
| row                 | [B]      | int64   | agent loop | number of the row in its trajectory |
| seq_tokens          | [B]      | int64   | trainer    | trained tokens of all its rows |
| greedy_scores       | [B]      | float32 | trainer    | of the prompt's greedy trajectory |
| trees               | [B]      | int64   | trainer    | number of its tree in the group |
| mini_batch          | [B]      | int64   | trainer    | the actor's optimizer step of the row |
| critic_mini_batch   | [B]      | int64   | trainer    | the critic's, where there is one |
| uid                 | [B]      | object  | trainer    | group of the row: one uuid per prompt |
| data_source         | [B]      | object  | data       | name of the question set |

Masks are carried from the agent loop, never recovered by comparing ids with the pad id.
"""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import torch

from verl.agent import Source, Trajectory, TrajectoryRow, context_digest
from verl.utils.images import pixels_of

ACTOR_MINI_BATCH = "mini_batch"
CRITIC_MINI_BATCH = "critic_mini_batch"

Index = slice | Sequence[int] | np.ndarray | torch.Tensor


@dataclass
class DataProto:
    """Rows of tensors (`batch`) and of objects (`non_tensor_batch`), with `meta_info` about them.

    Every operation returns a new object; tensors may be shared with the old one.

    >>> uids = np.array(list("abcd"), dtype=object)
    >>> data = DataProto.from_dict({"x": torch.arange(4)}, {"uid": uids})
    >>> len(data), data[1:3].batch["x"].tolist(), [len(part) for part in data.chunk(3)]
    (4, [1, 2], [2, 1, 1])
    """

    batch: dict[str, torch.Tensor] = field(default_factory=dict)
    non_tensor_batch: dict[str, np.ndarray] = field(default_factory=dict)
    meta_info: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_dict(
        cls,
        tensors: dict[str, torch.Tensor],
        non_tensors: dict[str, np.ndarray] | None = None,
        meta_info: dict[str, Any] | None = None,
    ) -> "DataProto":
        """Makes a batch of these columns. Raises ValueError when they differ in length."""
        data = cls(dict(tensors), dict(non_tensors or {}), dict(meta_info or {}))
        lengths = {key: len(column) for key, column in data._columns()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"columns of one batch must have one length, got {lengths}")
        return data

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a file that `load` reads: tensors, and JSON of the rest.

        Raises TypeError for what JSON cannot hold, OSError or torch's RuntimeError when it cannot
        be written.
        """
        objects = {key: column.tolist() for key, column in self.non_tensor_batch.items()}
        rest = json.dumps({"non_tensor_batch": objects, "meta_info": self.meta_info})
        torch.save(
            {"batch": {key: column.cpu() for key, column in self.batch.items()}, "rest": rest}, path
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "DataProto":
        """Reads the batch from a file that `save` wrote.

        Code that a file may contain is never run: UnpicklingError is raised instead.
        """
        content = torch.load(path, weights_only=True)
        rest = json.loads(content["rest"])
        objects = {
            key: np.fromiter(column, dtype=object)
            for key, column in rest["non_tensor_batch"].items()
        }
        return cls.from_dict(content["batch"], objects, rest["meta_info"])

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled: the tensors as arrays of these rows alone, in host memory.

        A tensor is pickled with its whole storage, so a part of a batch would bring the whole batch
        along. Ray also puts arrays into shared memory without converting them.
        """
        arrays = {key: column.detach().cpu().numpy() for key, column in self.batch.items()}
        return {**vars(self), "batch": arrays}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Makes tensors of the arrays. Those in shared memory are read-only and are copied."""
        vars(self).update(state)
        arrays: dict[str, np.ndarray] = state["batch"]
        self.batch = {
            key: torch.from_numpy(array if array.flags.writeable else array.copy())
            for key, array in arrays.items()
        }

    def _columns(self) -> Iterator[tuple[str, torch.Tensor | np.ndarray]]:
        yield from self.batch.items()
        yield from self.non_tensor_batch.items()

    def __len__(self) -> int:
        return next((len(column) for _, column in self._columns()), 0)

    def __getitem__(self, index: Index) -> "DataProto":
        """Rows by slice, by positions, or by boolean mask."""
        rows = index if isinstance(index, slice) else torch.as_tensor(np.asarray(index))
        picked = rows if isinstance(rows, slice) else rows.numpy()
        return DataProto(
            {k: v[rows] for k, v in self.batch.items()},
            {k: v[picked] for k, v in self.non_tensor_batch.items()},
            dict(self.meta_info),
        )

    def select(
        self, batch_keys: Sequence[str], non_tensor_batch_keys: Sequence[str] = ()
    ) -> "DataProto":
        """A batch of the named columns only. Raises KeyError for a missing one."""
        return DataProto(
            {k: self.batch[k] for k in batch_keys},
            {k: self.non_tensor_batch[k] for k in non_tensor_batch_keys},
            dict(self.meta_info),
        )

    def union(self, other: "DataProto") -> "DataProto":
        """Columns and meta_info of both; `other` wins."""
        return DataProto.from_dict(
            {**self.batch, **other.batch},
            {**self.non_tensor_batch, **other.non_tensor_batch},
            {**self.meta_info, **other.meta_info},
        )

    def with_tensors(self, **tensors: torch.Tensor) -> "DataProto":
        """This batch with further (or replaced) tensor columns."""
        return self.union(DataProto(tensors))

    def split(self, sizes: Sequence[int]) -> list["DataProto"]:
        """Consecutive parts of the given sizes. Raises ValueError unless they cover all rows."""
        if sum(sizes) != len(self):
            raise ValueError(f"parts of sizes {list(sizes)} do not cover {len(self)} rows")
        ends = np.cumsum(sizes)
        return [self[int(end - size) : int(end)] for end, size in zip(ends, sizes, strict=True)]

    def chunk(self, chunks: int) -> list["DataProto"]:
        """`chunks` consecutive parts whose sizes differ by at most one."""
        return self.split([len(part) for part in np.array_split(np.arange(len(self)), chunks)])

    @staticmethod
    def concat(parts: Sequence["DataProto"]) -> "DataProto":
        """The rows of all parts, with the meta_info of the first."""
        if not parts:
            return DataProto()
        first = parts[0]
        tensors: dict[str, torch.Tensor] = {}
        for key in first.batch:
            tensors[key] = torch.cat([part.batch[key] for part in parts])
        objects: dict[str, np.ndarray] = {}
        for key in first.non_tensor_batch:
            objects[key] = np.concatenate([part.non_tensor_batch[key] for part in parts])
        return DataProto.from_dict(tensors, objects, first.meta_info)

    def repeat(self, repeat_times: int, interleave: bool = True) -> "DataProto":
        """Each row `repeat_times` times: side by side (`interleave`), or batch after batch."""
        rows = np.arange(len(self))
        return self[np.repeat(rows, repeat_times) if interleave else np.tile(rows, repeat_times)]

    def to(self, device: torch.device | str) -> "DataProto":
        """Tensors on `device`."""
        return DataProto(
            {k: v.to(device) for k, v in self.batch.items()},
            dict(self.non_tensor_batch),
            dict(self.meta_info),
        )


@dataclass(frozen=True)
class BatchRow:
    """A row of a batch and where it comes from."""

    trajectory: Trajectory
    row: TrajectoryRow
    trajectory_number: int
    row_number: int
    is_last: bool
    """Whether it is the last row of its trajectory, which carries the score."""


def rows_of(trajectories: Sequence[Trajectory]) -> list[BatchRow]:
    """The rows of all trajectories, in their order."""
    found: list[BatchRow] = []
    for number, trajectory in enumerate(trajectories):
        rows = trajectory.rows
        for row_number, row in enumerate(rows):
            is_last = row_number == len(rows) - 1
            found.append(BatchRow(trajectory, row, number, row_number, is_last))
    return found


def collate_trajectories(trajectories: Sequence[Trajectory], pad_token_id: int) -> DataProto:
    """The batch of `trajectories`, in their order. Raises ValueError as `collate_rows` does."""
    return collate_rows(rows_of(trajectories), pad_token_id)


def collate_rows(rows: Sequence[BatchRow], pad_token_id: int) -> DataProto:
    """The batch of `rows`, in their order.

    It has the columns that the schema gives to the agent loop and the reward. A row with prompt [p,
    q] and response m m o o m (m sampled, o observed), where P = 3, R = 6:

    prompts        . p q          attention_mask  0 1 1 | 1 1 1 1 1 0
    responses      m m o o m .    response_mask           1 1 0 0 1 0
    scores         0 t 0 0 s 0

    The first turn is paid t, and s is the rest of the score.

    Raises ValueError for a trajectory without a sampled token, which cannot be trained on (callers
    drop and count these beforehand), and for a sampled segment without a log-prob for every token.
    """
    prompts, prompt_real = pad_left([r.row.prompt_ids for r in rows], pad_token_id)
    tokens = response_tokens([r.row for r in rows])
    lengths = np.array([r.row.response_length for r in rows])
    real = np.arange(lengths.max()) < lengths[:, None]
    response_mask = spread(tokens.turns >= 0, real, False)
    sampled = response_mask.any(axis=1)
    if not sampled.all():
        number = rows[int(np.argmin(sampled))].trajectory_number
        raise ValueError(f"trajectory {number} has no token of the policy")
    columns = {
        "prompts": prompts,
        "responses": spread(tokens.ids, real, pad_token_id),
        "attention_mask": np.concatenate([prompt_real, real], axis=1).astype(np.int64),
        "response_mask": response_mask.astype(np.int64),
        "rollout_log_probs": spread(tokens.log_probs, real, 0.0),
        "policy_versions": spread(tokens.versions, real, -1),
        "turns": spread(tokens.turns, real, -1),
        "states": spread(tokens.states, real, -1),
        "token_level_scores": token_level_scores(rows, response_mask),
        "truncated": np.array([r.trajectory.truncated for r in rows]),
        "void_turns": np.array([r.trajectory.void_turns for r in rows]),
        "trajectory": np.array([r.trajectory_number for r in rows]),
        "row": np.array([r.row_number for r in rows]),
    }
    greedy_scores = [r.trajectory.greedy_score for r in rows]
    if None not in greedy_scores:
        columns["greedy_scores"] = np.array(greedy_scores, dtype=np.float32)
    if any(r.row.images for r in rows):
        columns["pixels"] = pixels_of([r.row.images for r in rows])
    return DataProto.from_dict({key: torch.from_numpy(column) for key, column in columns.items()})


def token_level_scores(rows: Sequence[BatchRow], response_mask: np.ndarray) -> np.ndarray:
    """What each trajectory is paid, by token: [B, R], float32.

    A turn's reward is on its last token. What these rewards leave of the score is on the last
    policy token of the trajectory, so that all of them together are the score.
    """
    # the first true entry from the right; every row has one
    last = response_mask.shape[1] - 1 - np.argmax(response_mask[:, ::-1], axis=1)
    scores = np.zeros(response_mask.shape, dtype=np.float64)
    for number, row in enumerate(rows):
        for end, reward in turn_rewards(row.row):
            scores[number, end] += reward
        if row.is_last:
            scores[number, last[number]] += rest_of_score(row.trajectory)
    return scores.astype(np.float32)


def turn_rewards(row: TrajectoryRow) -> Iterator[tuple[int, float]]:
    """Yields the place of the last token of each turn that is paid, and what it is paid."""
    end = 0
    for segment in row.segments:
        end += len(segment.token_ids)
        if segment.reward and segment.token_ids:
            yield end - 1, segment.reward


def rest_of_score(trajectory: Trajectory) -> float:
    """The score without what turns are paid. A turn without tokens cannot be paid."""
    paid = [segment.reward for segment in trajectory.turns if segment.token_ids]
    return trajectory.reward["score"] - sum(paid)


@dataclass(frozen=True)
class ResponseTokens:
    """The response tokens of many rows, one after the other: arrays [N]."""

    ids: np.ndarray
    log_probs: np.ndarray
    """Float32; 0 where the policy did not write."""
    versions: np.ndarray
    """Int32: the weight version that sampled the token, -1 where none did."""
    turns: np.ndarray
    """Int32: the number of the policy's turn, -1 for what others wrote."""
    states: np.ndarray
    """Int64: a digest of what the policy read right before the turn, -1 for what others wrote."""


def response_tokens(rows: Sequence[TrajectoryRow]) -> ResponseTokens:
    """All response tokens of `rows`.

    The lists of all rows become one array, which is much faster than one array for each
    row. Raises ValueError for a sampled segment with another number of log-probs than tokens.
    """
    segments = [segment for row in rows for segment in row.segments]
    lengths = np.array([len(segment.token_ids) for segment in segments], dtype=np.int64)
    turns = np.array([turn for row in rows for turn in turn_numbers(row)], dtype=np.int32)
    states = np.array([state for row in rows for state in turn_states(row)], dtype=np.int64)
    versions = np.array([segment.policy_version for segment in segments], dtype=np.int32)
    own = [segment for segment in segments if segment.source is Source.MODEL]
    for segment in own:
        if len(segment.log_probs) != len(segment.token_ids):
            raise ValueError(
                f"{len(segment.token_ids)} sampled tokens have {len(segment.log_probs)} log-probs"
            )
    turn_of_token = np.repeat(turns, lengths)
    log_probs = np.zeros(len(turn_of_token), dtype=np.float32)
    log_probs[turn_of_token >= 0] = flat([segment.log_probs for segment in own], np.float32)
    return ResponseTokens(
        ids=flat([segment.token_ids for segment in segments], np.int64),
        log_probs=log_probs,
        versions=np.repeat(versions, lengths),
        turns=turn_of_token,
        states=np.repeat(states, lengths),
    )


def turn_numbers(row: TrajectoryRow) -> list[int]:
    """The number of the policy's turn for each segment, -1 for segments that others wrote."""
    numbers: list[int] = []
    turn = row.first_turn - 1
    for segment in row.segments:
        own = segment.source is Source.MODEL
        turn += own
        numbers.append(turn if own else -1)
    return numbers


def turn_states(row: TrajectoryRow) -> list[int]:
    """For each segment of the policy a digest of what it read since its last one, else -1.

    It reads the prompt before its first turn, then what the environment wrote: turns with the same
    digest were begun after the same observation, whatever stands before that.
    """
    states: list[int] = []
    unread = list(row.prompt_ids)
    for segment in row.segments:
        if segment.source is Source.MODEL:
            states.append(context_digest(unread))
            unread = []
        else:
            states.append(-1)
            unread += segment.token_ids
    return states


def flat(lists: Sequence[Sequence[float]], dtype: type[np.generic]) -> np.ndarray:
    """The numbers of all lists, one after the other, [N]."""
    return np.fromiter(chain.from_iterable(lists), dtype, count=sum(map(len, lists)))


def pad_left(rows: Sequence[Sequence[int]], pad: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows padded on the left, [B, longest] int64, and a mask of the real entries."""
    lengths = np.array([len(row) for row in rows])
    width = lengths.max()
    real = np.arange(width) >= width - lengths[:, None]
    return spread(flat(rows, np.int64), real, pad), real


def spread(values: np.ndarray, real: np.ndarray, pad: float) -> np.ndarray:
    """`values` [N] where `real` [B, L] is true, row by row, and `pad` elsewhere."""
    whole = np.full(real.shape, pad, dtype=values.dtype)
    whole[real] = values
    return whole
