"""Reading question files of every kind, row by row, with the place of each for messages."""

import ast
import csv
import gzip
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from verl.utils.errors import DataError

LIST_COLUMNS = ("golden_answers", "answers", "answer", "gold_ids", "gold_titles")
KINDS = ".jsonl, .json, .csv, .tsv, .txt (question, tab, answers) or .parquet, all but the last also gzipped"
Record = dict[str, Any] | str
"""A record, or what is wrong with its line."""


def read_rows(path: Path) -> Iterator[tuple[str, Record]]:
    """(place for messages, record or what is wrong with the line) of each row; blank lines are none.

    Raises DataError for a file that cannot be read.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    kind = Path(path.name.removesuffix(".gz")).suffix
    if kind == ".parquet":
        try:
            records = pq.read_table(path).to_pylist()
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: not a readable parquet file ({error})") from error
        yield from ((f"{path}, row {number}", record) for number, record in enumerate(records))
    elif kind == ".csv":
        reader = csv.DictReader(io.StringIO(read_text(path), newline=""))
        yield from ((f"{path}, line {reader.line_num}", parse_cells(record)) for record in reader)
    elif kind in (".tsv", ".txt"):
        yield from ((place, parse_topic(line)) for place, line in numbered(path, read_text(path)))
    elif kind in (".jsonl", ".json"):
        text = read_text(path)
        if text.lstrip().startswith("["):
            yield from ((f"{path}, entry {number}", entry) for number, entry in enumerate(parse_array(path, text)))
        else:
            yield from ((place, parse_line(line)) for place, line in numbered(path, text))
    else:
        raise DataError(f"{path}: expected {KINDS}")


def numbered(path: Path, text: str) -> Iterator[tuple[str, str]]:
    return ((f"{path}, line {number}", line) for number, line in enumerate(text.split("\n"), 1) if line.strip())


def read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
        return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 ({error})") from error
    except (OSError, EOFError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error


def parse_line(line: str) -> Record:
    """The object on a line of JSONL, or what is wrong with it."""
    try:
        record = json.loads(line)
    except ValueError as error:
        return f"not JSON ({error})"
    return record if isinstance(record, dict) else f"expected one object per line, got a {type(record).__name__}"


def parse_array(path: Path, text: str) -> list[Record]:
    """The objects of a JSON array. Raises DataError when it is none."""
    try:
        entries = json.loads(text)
    except ValueError as error:
        if "\n[" in text.strip() or "]\n" in text.strip():  # one array a line: JSONL of the wrong kind
            return [parse_line(line) for line in text.split("\n") if line.strip()]
        raise DataError(f"{path}: not JSON ({error})") from error
    return [entry if isinstance(entry, dict) else f"expected an object, got {entry!r:.40}" for entry in entries]


def parse_topic(line: str) -> Record:
    """`question <tab> answers`, the answers a printed list or a single one."""
    question, tab, answers = line.partition("\t")
    if not tab:
        return "expected a question, a tab and its answers"
    return parse_cells({"question": question, "answers": answers.strip()})


def parse_cells(record: dict[Any, Any]) -> Record:
    """The record of a line of CSV: in a column of answers or gold passages `["a"]` is a list; empty cells are None."""
    if None in record:
        return "more cells than columns (quote cells that hold a comma)"
    parsed: dict[str, Any] = {key: cell or None for key, cell in record.items()}
    for key in set(LIST_COLUMNS) & parsed.keys():
        cell = parsed[key] or ""
        if cell.startswith("[") and cell.endswith("]"):
            try:
                parsed[key] = ast.literal_eval(cell)
            except (ValueError, SyntaxError):
                return f"{key}: not a list ({cell[:60]})"
    return parsed


def texts(value: Any) -> list[str]:
    """The non-empty strings of a value or list of values."""
    values = value if isinstance(value, list) else [value]
    return [text for v in values if v is not None and (text := str(v).strip())]


def training_row(question: str, answers: list[str], source: str, prompt: str, **extra: Any) -> dict[str, Any]:
    """A line of the training parquet in the original's schema. `extra`: what else is known (split, index, gold)."""
    return {
        "data_source": source,
        "prompt": [{"role": "user", "content": prompt}],
        "ability": "fact-reasoning",
        "reward_model": {"style": "rule", "ground_truth": {"target": answers}},
        "extra_info": {"question": question, **extra},
    }
