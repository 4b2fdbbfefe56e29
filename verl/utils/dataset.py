"""Questions from parquet files, and their order, which can be resumed."""

import hashlib
import json
import random
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq

from verl.agent import Row
from verl.utils.answers import answers_of, kind_of, plain
from verl.utils.errors import DataError, listed
from verl.utils.images import ImageReader, files_of, images_of
from verl.utils.tokenizer import encode_chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COLUMNS = ("data_source", "prompt", "reward_model")


class RLHFDataset:
    """Rows with their prompt ids. Every row is checked when it is loaded.

    Raises DataError naming file, row and key for a row that `read_row` refuses, and for a prompt
    that the chat template refuses or that has more than `max_prompt_length` tokens. With
    `max_samples` it holds a sample of this many rows, see `sample_spread`. `image_reader` reads the
    images of rows; without it rows have none.
    """

    def __init__(
        self,
        files: Sequence[str],
        tokenizer: "PreTrainedTokenizerBase",
        max_prompt_length: int,
        max_samples: int | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        sample_seed: int = 0,
        image_reader: ImageReader | None = None,
    ) -> None:
        places, self.rows = read_questions(files, max_samples, sample_seed)
        self.prompt_ids: list[list[int]] = []
        problems: list[str] = []
        for place, row in zip(places, self.rows, strict=True):
            try:
                images = [image.token_ids for image in images_of(row, image_reader)]
                ids = encode_chat(tokenizer, row["prompt"], images, **(chat_template_kwargs or {}))
            except DataError as error:
                problems.append(f"{place}: prompt: {error}")
                continue
            if len(ids) > max_prompt_length:
                problems.append(
                    f"{place}: the prompt has {len(ids)} tokens, more than "
                    f"data.max_start_length={max_prompt_length}"
                )
            self.prompt_ids.append(ids)
        if problems:
            raise DataError(listed(problems))

    def keep(self, numbers: Sequence[int]) -> None:
        """Drops all rows but these."""
        self.rows = [self.rows[i] for i in numbers]
        self.prompt_ids = [self.prompt_ids[i] for i in numbers]

    def __len__(self) -> int:
        return len(self.rows)


def read_questions(
    files: Sequence[str], max_samples: int | None = None, sample_seed: int = 0
) -> tuple[list[str], list[Row]]:
    """Reads the rows of all files; returns the place of each (file and number), and the rows.

    With `max_samples` they are the sample of `sample_spread`. Raises DataError listing the rows
    that `read_row` refuses.
    """
    places: list[str] = []
    rows: list[Row] = []
    problems: list[str] = []
    for path in files:
        for number, record in enumerate(read_parquet(path)):
            place = f"{path}, row {number}"
            try:
                rows.append(read_row(record))
                places.append(place)
            except ValueError as error:
                problems.append(f"{place}: {error}")
    if problems:
        raise DataError(listed(problems))
    if max_samples is None:
        return places, rows
    chosen = sample_spread(rows, max_samples, sample_seed)
    return [places[i] for i in chosen], [rows[i] for i in chosen]


def read_row(record: dict[str, Any]) -> Row:
    """Converts a record to the form that agents and rewards read.

    In that form the prompt is a list of messages, and answers are texts. A prompt that is a text
    becomes one user message, and an answer that is a number becomes a text. Raises ValueError, for
    a value that cannot be read, naming the key and what was expected.
    """
    source = record["data_source"]
    extra = record.get("extra_info")
    if not isinstance(source, str) or not source:
        raise ValueError(f"data_source: expected a text, got {kind_of(source)}")
    if not isinstance(extra, dict | None):
        raise ValueError(f"extra_info: expected an object, got {kind_of(extra)}")
    return {
        **record,
        "prompt": read_prompt(record["prompt"]),
        "reward_model": read_truth(record["reward_model"]),
    }


def read_prompt(prompt: object) -> list[dict[str, Any]]:
    """Chat messages. Raises ValueError for anything else and for empty messages."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else plain(prompt)
    if not messages and isinstance(messages, list | None):
        raise ValueError("prompt is empty")
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ValueError(
            "prompt: expected a text, or a list of messages with role and content, got "
            f"{kind_of(messages)}"
        )
    for number, message in enumerate(messages):
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise ValueError(
                    f"prompt[{number}].{key}: expected a text, got {kind_of(message.get(key))}"
                )
        if not message["content"].strip():
            raise ValueError(f"prompt is empty (message {number})")
    return messages


def read_truth(reward_model: object) -> dict[str, Any]:
    """`reward_model` with the accepted answers as texts.

    `ground_truth` is an answer, a list of answers, or a mapping with one of these under `target`.
    Raises ValueError if there is no answer, or something else instead.
    """
    if not isinstance(reward_model, dict | None):
        raise ValueError(
            f"reward_model: expected an object with ground_truth, got {kind_of(reward_model)}"
        )
    truth = (reward_model or {}).get("ground_truth")
    if isinstance(truth, dict) and "target" in truth:
        read: Any = {
            **truth,
            "target": read_target(truth["target"], "reward_model.ground_truth.target"),
        }
    else:
        read = read_target(truth, "reward_model.ground_truth")
    return {**(reward_model or {}), "ground_truth": read}


def read_target(target: object, key: str) -> str | list[str]:
    """One answer as a text, a list of them as a list. Raises ValueError naming `key`."""
    try:
        answers = answers_of(target)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error
    if not answers:
        raise ValueError("reward_model.ground_truth holds no answer")
    return answers if isinstance(plain(target), list | tuple) else answers[0]


def rows_by_source(rows: Sequence[Row]) -> dict[str, list[int]]:
    """The row numbers of each data_source, in their order."""
    by_source: dict[str, list[int]] = defaultdict(list)
    for number, row in enumerate(rows):
        by_source[row["data_source"]].append(number)
    return dict(by_source)


def sample_spread(rows: Sequence[Row], count: int, seed: int) -> list[int]:
    """Row numbers of a sample of `count` rows, drawn with `seed`.

    Every data_source is in it in proportion, with at least one row. A smaller sample is part of
    every larger one. If there are no more than `count` rows, the sample is all of them.
    """
    ranked: list[tuple[float, int]] = []
    for source, numbers in rows_by_source(rows).items():
        random.Random(f"{seed}/{source}").shuffle(numbers)
        ranked += [(place / len(numbers), number) for place, number in enumerate(numbers)]
    return sorted(number for _, number in sorted(ranked)[:count])


def questions_digest(rows: Sequence[Row]) -> str:
    """A digest of a list of questions and of their order. Answers are not part of it."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps([row["data_source"], row["prompt"]], default=str).encode())
        for file in files_of(row):
            digest.update(file)
    return digest.hexdigest()


def sample_per_source(rows: Sequence[Row], count: int, seed: int) -> list[int]:
    """Row numbers of up to `count` rows of every data_source.

    The sample of one source does not depend on the other sources.
    """
    chosen = (
        random.Random(f"{seed}/{source}").sample(numbers, min(count, len(numbers)))
        for source, numbers in rows_by_source(rows).items()
    )
    return sorted(number for numbers in chosen for number in numbers)


def read_parquet(path: str) -> list[Row]:
    """The rows of one training file.

    Raises DataError if the file is missing, unreadable, or lacks a column.
    """
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
    """Numbers of rows, epoch after epoch.

    Its whole state is the epoch and the position in it. Each epoch is a new permutation drawn from
    (seed, epoch). What an epoch cannot fill is filled from the next one, so that no row is dropped.
    """

    def __init__(self, size: int, seed: int | str, shuffle: bool) -> None:
        self.size = size
        self.seed = seed
        self.shuffle = shuffle
        self.epoch = self.position = 0

    def _order(self) -> np.ndarray:
        if not self.shuffle:
            return np.arange(self.size)
        digest = hashlib.sha256(f"{self.seed}/{self.epoch}".encode()).digest()
        return np.random.default_rng(int.from_bytes(digest[:8], "little")).permutation(self.size)

    def take(self, count: int) -> list[int]:
        """Returns the next `count` numbers."""
        taken: list[int] = []
        while len(taken) < count:
            part = self._order()[self.position : self.position + count - len(taken)]
            taken += part.tolist()
            self.position += len(part)
            if self.position >= self.size:
                self.epoch += 1
                self.position = 0
        return taken

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch = state["epoch"]
        self.position = state["position"]
