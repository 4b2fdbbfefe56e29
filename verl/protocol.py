"""The batch that travels between the driver and the workers.

Shapes: B trajectories, P longest prompt, R longest response, T = P + R.

| key                 | shape   | dtype   | written by | meaning |
|---|---|---|---|---|
| prompts             | [B, P]  | int64   | agent loop | prompt ids, padded on the left |
| responses           | [B, R]  | int64   | agent loop | everything after the prompt, padded on the right |
| attention_mask      | [B, P+R]| int64   | agent loop | 1 = real token |
| response_mask       | [B, R]  | int64   | agent loop | 1 = token that the policy sampled and is trained on |
| rollout_log_probs   | [B, R]  | float32 | agent loop | log-prob under the distribution it was sampled from, else 0 |
| policy_versions     | [B, R]  | int32   | agent loop | weight version that sampled the token, -1 elsewhere |
| turns               | [B, R]  | int32   | agent loop | number of the policy's turn, from 0, -1 elsewhere |
| token_level_scores  | [B, R]  | float32 | reward     | score on the last policy token, 0 elsewhere |
| token_level_rewards | [B, R]  | float32 | advantage  | scores minus the KL penalty, where KL is in the reward |
| old_log_probs       | [B, R]  | float32 | actor      | log-prob under the weights before the update |
| ref_log_prob        | [B, R]  | float32 | reference  | log-prob under the initial weights |
| values              | [B, R]  | float32 | critic     | value of the state in which the token was chosen |
| advantages, returns | [B, R]  | float32 | advantage  | see core_algos |
| truncated           | [B]     | bool    | agent loop | cut off by a token limit |
| void_turns          | [B]     | int64   | agent loop | turns that neither acted nor answered |
| rollout_is_weights  | [B, R]  | float32 | trainer    | weight of the token's loss, where importance weights are on |
| mini_batch          | [B]     | int64   | trainer    | optimizer step of this batch that the row belongs to |
| uid                 | [B]     | object  | trainer    | group of the row: one uuid per prompt |
| data_source         | [B]     | object  | data       | name of the question set |

Masks are carried from the agent loop, never recovered by comparing ids with the pad id.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from verl.agent import Source, Trajectory

Index = slice | Sequence[int] | np.ndarray | torch.Tensor


@dataclass
class DataProto:
    """Rows of tensors (`batch`) and of objects (`non_tensor_batch`), with `meta_info` about all of them.

    Every operation returns a new object; tensors may be shared with the old one.

    >>> data = DataProto.from_dict({"x": torch.arange(4)}, {"uid": np.array(list("abcd"), dtype=object)})
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
        """Raises ValueError when the columns differ in length."""
        data = cls(dict(tensors), dict(non_tensors or {}), dict(meta_info or {}))
        lengths = {key: len(column) for key, column in data._columns()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"columns of one batch must have one length, got {lengths}")
        return data

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

    def select(self, batch_keys: Sequence[str], non_tensor_batch_keys: Sequence[str] = ()) -> "DataProto":
        """The named columns only. Raises KeyError for a missing one."""
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
        return DataProto.from_dict(
            {k: torch.cat([p.batch[k] for p in parts]) for k in parts[0].batch},
            {k: np.concatenate([p.non_tensor_batch[k] for p in parts]) for k in parts[0].non_tensor_batch},
            parts[0].meta_info,
        )

    def repeat(self, repeat_times: int, interleave: bool = True) -> "DataProto":
        """Each row `repeat_times` times: side by side (`interleave`), or the whole batch over and over."""
        rows = np.arange(len(self))
        return self[np.repeat(rows, repeat_times) if interleave else np.tile(rows, repeat_times)]

    def to(self, device: torch.device | str) -> "DataProto":
        """Tensors on `device`."""
        return DataProto(
            {k: v.to(device) for k, v in self.batch.items()}, dict(self.non_tensor_batch), dict(self.meta_info)
        )


def collate_trajectories(trajectories: Sequence[Trajectory], pad_token_id: int) -> DataProto:
    """The batch of `trajectories`, in their order: the columns that the schema gives to the agent loop and reward.

    A row with prompt [p, q] and response  m m o o m  (m sampled, o observed), in a batch with P = 3 and R = 6:

        prompts        . p q          attention_mask  0 1 1 | 1 1 1 1 1 0
        responses      m m o o m .    response_mask           1 1 0 0 1 0
        scores         0 0 0 0 s 0

    Raises ValueError for a trajectory without a sampled token: it has nothing to train, the caller drops and counts it.
    """
    size = len(trajectories)
    prompt_len = max(len(t.prompt_ids) for t in trajectories)
    response_len = max(len(t.response_ids) for t in trajectories)
    prompts = torch.full((size, prompt_len), pad_token_id)
    responses = torch.full((size, response_len), pad_token_id)
    attention_mask = torch.zeros(size, prompt_len + response_len, dtype=torch.long)
    response_mask = torch.zeros(size, response_len, dtype=torch.long)
    log_probs = torch.zeros(size, response_len)
    versions = torch.full((size, response_len), -1, dtype=torch.int32)
    turns = torch.full((size, response_len), -1, dtype=torch.int32)
    scores = torch.zeros(size, response_len)
    for row, trajectory in enumerate(trajectories):
        start, ids = prompt_len - len(trajectory.prompt_ids), trajectory.response_ids
        prompts[row, start:] = torch.tensor(trajectory.prompt_ids)
        responses[row, : len(ids)] = torch.tensor(ids)
        attention_mask[row, start : prompt_len + len(ids)] = 1
        response_mask[row, : len(ids)] = torch.tensor(trajectory.response_mask)
        log_probs[row, : len(ids)] = torch.tensor(trajectory.rollout_log_probs)
        versions[row, : len(ids)] = torch.tensor([s.policy_version for s in trajectory.segments for _ in s.token_ids])
        turns[row, : len(ids)] = torch.tensor(turn_numbers(trajectory), dtype=torch.int32)
        if not response_mask[row].any():
            raise ValueError(f"trajectory {row} has no token of the policy")
        scores[row, response_mask[row].nonzero()[-1]] = trajectory.reward["score"]
    return DataProto.from_dict(
        {
            "prompts": prompts,
            "responses": responses,
            "attention_mask": attention_mask,
            "response_mask": response_mask,
            "rollout_log_probs": log_probs,
            "policy_versions": versions,
            "turns": turns,
            "token_level_scores": scores,
            "truncated": torch.tensor([t.truncated for t in trajectories]),
            "void_turns": torch.tensor([t.void_turns for t in trajectories]),
        }
    )


def turn_numbers(trajectory: Trajectory) -> list[int]:
    """For each response token the number of the policy's turn that wrote it, -1 for what others wrote."""
    numbers: list[int] = []
    turn = -1
    for segment in trajectory.segments:
        own = segment.source is Source.MODEL
        turn += own
        numbers += [turn if own else -1] * len(segment.token_ids)
    return numbers
