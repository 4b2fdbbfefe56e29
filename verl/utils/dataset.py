"""Questions from parquet files, in an order that can be resumed."""

import hashlib
import json
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from verl.agent import Row
from verl.utils.errors import DataError, listed
from verl.utils.tokenizer import encode_chat

COLUMNS = ("data_source", "prompt", "reward_model")


class RLHFDataset:
    """Rows with their prompt ids. Every row is checked when it is loaded.

    Raises DataError naming file and row for a missing column, an empty prompt, an answerless row, a prompt that the
    chat template refuses, or one of more than `max_prompt_length` tokens.
    """

    def __init__(
        self,
        files: Sequence[str],
        tokenizer: Any,
        max_prompt_length: int,
        max_samples: int = -1,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> None:
        self.rows: list[Row] = []
        self.prompt_ids: list[list[int]] = []
        problems: list[str] = []
        for path in files:
            for number, row in enumerate(read_parquet(path)):
                if 0 <= max_samples <= len(self.rows):
                    break
                problem, ids = self._check(row, tokenizer, max_prompt_length, chat_template_kwargs or {})
                problems += [f"{path}, row {number}: {problem}"] if problem else []
                self.rows.append(row)
                self.prompt_ids.append(ids)
        if problems:
            raise DataError(listed(problems))

    def keep(self, numbers: Sequence[int]) -> None:
        """Drops all rows but these."""
        self.rows = [self.rows[i] for i in numbers]
        self.prompt_ids = [self.prompt_ids[i] for i in numbers]

    @staticmethod
    def _check(row: Row, tokenizer: Any, limit: int, kwargs: dict[str, Any]) -> tuple[str | None, list[int]]:
        messages = list(row["prompt"] if row["prompt"] is not None else [])
        if not messages or not all(str(m["content"]).strip() for m in messages):
            return "prompt is empty", []
        truth = (row["reward_model"] or {}).get("ground_truth")
        target = truth.get("target") if isinstance(truth, dict) else truth
        if target is None or len(target) == 0 or not any(str(t).strip() for t in list(target)):
            return "reward_model.ground_truth holds no answer", []
        try:
            ids = encode_chat(tokenizer, messages, **kwargs)
        except DataError as error:
            return f"prompt: {error}", []
        if len(ids) > limit:
            return f"the prompt has {len(ids)} tokens, more than data.max_start_length={limit}", []
        return None, ids

    def __len__(self) -> int:
        return len(self.rows)


def questions_digest(rows: Sequence[Row]) -> str:
    """What tells a list of questions from another one, or from the same in another order; answers do not count."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps([row["data_source"], row["prompt"]], default=str).encode())
    return digest.hexdigest()


def sample_per_source(rows: Sequence[Row], count: int, seed: int) -> list[int]:
    """Row numbers of up to `count` rows of every data_source; those of one do not depend on the other sources."""
    by_source: dict[str, list[int]] = defaultdict(list)
    for number, row in enumerate(rows):
        by_source[row["data_source"]].append(number)
    chosen = (
        random.Random(f"{seed}/{source}").sample(numbers, min(count, len(numbers)))
        for source, numbers in by_source.items()
    )
    return sorted(number for numbers in chosen for number in numbers)


def read_parquet(path: str) -> list[Row]:
    """The rows of one training file. Raises DataError if it is missing, unreadable, or lacks a column."""
    if not Path(path).is_file():
        raise DataError(f"{path}: no such file")
    try:
        table = pq.read_table(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a readable parquet file ({error})") from error
    if missing := [c for c in COLUMNS if c not in table.column_names]:
        raise DataError(f"{path}: missing column(s) {missing}; found {table.column_names}")
    rows = table.to_pylist()
    if not rows:
        raise DataError(f"{path}: no rows")
    return rows


class ResumableSampler:
    """Batches of row numbers, epoch after epoch; its whole state is (epoch, position, batches drawn).

    Each epoch is a new permutation drawn from (seed, epoch); the last, smaller part of an epoch is carried into the
    next, so that every batch is full and no row is dropped.
    """

    def __init__(self, size: int, batch_size: int, seed: int, shuffle: bool) -> None:
        self.size, self.batch_size, self.seed, self.shuffle = size, batch_size, seed, shuffle
        self.epoch = self.position = self.drawn = 0

    def _order(self) -> np.ndarray:
        if not self.shuffle:
            return np.arange(self.size)
        digest = hashlib.sha256(f"{self.seed}/{self.epoch}".encode()).digest()
        return np.random.default_rng(int.from_bytes(digest[:8], "little")).permutation(self.size)

    def __iter__(self) -> Iterator[list[int]]:
        while True:
            batch: list[int] = []
            while len(batch) < self.batch_size:
                part = self._order()[self.position : self.position + self.batch_size - len(batch)]
                batch += part.tolist()
                self.position += len(part)
                if self.position >= self.size:
                    self.epoch, self.position = self.epoch + 1, 0
            self.drawn += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position, "drawn": self.drawn}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.position, self.drawn = state["epoch"], state["position"], state["drawn"]
