"""Records of training steps: trajectories with what each token was trained with.

They are written by a thread of their own while the policy is updated.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from verl.agent import Segment, Source, Trajectory
from verl.protocol import DataProto
from verl.rollout.records import TokenFacts, by_segment, trajectory_record
from verl.trainer.config import TrainerConfig
from verl.trainer.ppo.batch_source import Rollouts
from verl.utils.tracking import Tracking

TRAINED = "mask"
COLUMNS = {
    "log_probs": "old_log_probs",
    "ref_log_probs": "ref_log_prob",
    "entropy": "entropy",
    "advantages": "advantages",
    "values": "values",
}
"""By its name in a record, the column of a batch with that fact of every trained token."""
DIGITS = 4
"""Significant digits of a number in a record."""
SHOWN = 8
"""Trajectories of a step that services are sent."""


@dataclass(frozen=True)
class Due:
    """A step whose trajectories are to be written."""

    step: int
    rollouts: Rollouts
    uids: frozenset[str]
    """The prompts whose trajectories get the facts of their tokens."""


class StepRecords:
    """Writes the trajectories of every `trainer.rollout_data_freq`-th step."""

    def __init__(
        self, config: TrainerConfig, tokenizer: PreTrainedTokenizerBase, tracking: Tracking
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.tracking = tracking
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="records")
        self._due: Due | None = None
        self._under_way: tuple[int, Future[list[dict[str, Any]]]] | None = None

    def begin(self, step: int, rollouts: Rollouts) -> None:
        """Notes what is trained on in `step`, if that is a step to be written."""
        frequency = self.config.rollout_data_freq
        is_due = frequency > 0 and step % frequency == 0
        self._due = Due(step, rollouts, self._uids_with_tokens(rollouts)) if is_due else None

    def keep_nonfinite(
        self, step: int, role: str, batch: DataProto, metrics: Mapping[str, float]
    ) -> None:
        """Writes the batch of a skipped optimizer step to the run folder, to reproduce it."""
        if metrics["skipped_steps"]:
            where = self.tracking.keep(batch, f"nonfinite/{role}_{step:06d}.pt")
            self.tracking.message(
                f"step {step}: loss or gradient of the {role} not finite, "
                f"{metrics['skipped_steps']:.0f} optimizer step(s) skipped; the batch {where}"
            )

    def _uids_with_tokens(self, rollouts: Rollouts) -> frozenset[str]:
        section = self.config.trajectory_records
        if not section.tokens:
            return frozenset()
        uids = dict.fromkeys(job.uid for job in rollouts.jobs)
        return frozenset(list(uids)[: section.prompts])

    def rows_with_tokens(self, batch: DataProto) -> np.ndarray:
        """Which rows of the batch are written with the facts of their tokens: boolean, [B]."""
        uids = frozenset() if self._due is None else self._due.uids
        return np.array([uid in uids for uid in batch.non_tensor_batch["uid"]], dtype=bool)

    def with_entropy(
        self, batch: DataProto, compute: Callable[[DataProto], DataProto]
    ) -> DataProto:
        """Adds the entropy that `compute` gives for these rows; it is NaN in all others."""
        rows = self.rows_with_tokens(batch)
        if not rows.any():
            return batch
        part = batch[rows]
        del part.meta_info["rank_sizes"]  # these few are spread over the ranks anew
        entropy = torch.full(batch.batch["responses"].shape, torch.nan)
        entropy[torch.from_numpy(rows)] = compute(part).batch["entropy"]
        return batch.with_tensors(entropy=entropy)

    def write(self, batch: DataProto, trained: torch.Tensor) -> None:
        """Starts to write the step that `begin` noted, if any.

        `batch` has advantages; `trained` [B, R] says which of its tokens the policy's loss counts.
        """
        if self._due is None:
            return
        columns = ["trajectory", "row", TRAINED]
        columns += [column for column in COLUMNS.values() if column in batch.batch]
        data = batch.with_tensors(**{TRAINED: trained}).select(columns)
        rows = data[self.rows_with_tokens(batch)]  # a copy, because the batch may change
        self._under_way = (self._due.step, self._thread.submit(self._write, self._due, rows))
        self._due = None

    def complete(self) -> None:
        """Waits until the step under way is written, and shows some of it by the services."""
        if self._under_way is None:
            return
        step, future = self._under_way
        self._under_way = None
        self.tracking.show_trajectories("train", future.result(), step)

    def _write(self, due: Due, rows: DataProto) -> list[dict[str, Any]]:
        """Writes the records of a step; returns the first of them."""
        records = step_records(due, rows, self.tokenizer)
        self.tracking.write_trajectories("train", records, due.step)
        return records[:SHOWN]


def step_records(
    due: Due, rows: DataProto, tokenizer: PreTrainedTokenizerBase
) -> list[dict[str, Any]]:
    """The record of each trajectory of a step. `rows`: those with facts of their tokens."""
    places: dict[tuple[int, int], int] = {}
    numbers = zip(rows.batch["trajectory"].tolist(), rows.batch["row"].tolist(), strict=True)
    for place, number in enumerate(numbers):
        places[number] = place
    records: list[dict[str, Any]] = []
    pairs = zip(due.rollouts.jobs, due.rollouts.trajectories, strict=True)
    for number, (job, trajectory) in enumerate(pairs):
        facts: Sequence[TokenFacts | None] = [None] * len(trajectory.segments)
        if job.uid in due.uids:
            facts = facts_of(trajectory, number, places, rows)
        record = trajectory_record(job, trajectory, tokenizer, facts)
        records.append({"step": due.step, **record})
    return records


def facts_of(
    trajectory: Trajectory, number: int, places: dict[tuple[int, int], int], rows: DataProto
) -> list[TokenFacts]:
    """The facts of the tokens of each segment of a trajectory, which may be several rows.

    `places`: where the rows of a trajectory are among `rows`, by its number and theirs.
    """
    of_rows: dict[int, list[TokenFacts]] = {}
    for row_number, row in enumerate(trajectory.rows):
        data = rows[[places[number, row_number]]]
        of_rows[row_number] = []
        start = 0
        for segment in row.segments:
            end = start + len(segment.token_ids)
            of_rows[row_number].append(facts_of_segment(segment, data, start, end))
            start = end
    return by_segment(trajectory, of_rows)


def facts_of_segment(segment: Segment, row: DataProto, start: int, end: int) -> TokenFacts:
    """What the tokens of a segment were trained with: columns `start` to `end` of its row [1, R].

    There is nothing to say of what others wrote, unless that is trained on as well.
    """
    trained: list[int] = row.batch[TRAINED][0, start:end].long().tolist()
    if segment.source is not Source.MODEL and not any(trained):
        return {}
    facts: TokenFacts = {TRAINED: trained}
    if segment.source is Source.MODEL:
        facts["rollout_log_probs"] = rounded(segment.log_probs)
    for name, column in COLUMNS.items():
        if column in row.batch:
            facts[name] = rounded(row.batch[column][0, start:end].tolist())
    return facts


def rounded(values: Sequence[float]) -> list[float | None]:
    """The values with few digits; None for what is not finite, because JSON lacks it."""
    return [float(f"{x:.{DIGITS}g}") if math.isfinite(x) else None for x in values]
