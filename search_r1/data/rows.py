"""Reads question files of every form row by row, with the location of each row for messages."""

import csv
import gzip
import io
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from search_r1.data.shapes import unfold, unprinted
from verl.utils.answers import answers_of, kind_of
from verl.utils.errors import DataError, listed

LIST_COLUMNS = ("golden_answers", "answers", "answer", "gold_ids", "gold_titles")
QUESTION_COLUMNS = {"question", "Question", "utterance"}
SEPARATORS = (",", ";", "\t", "|")
KINDS = (
    ".jsonl, .json, .csv, .tsv, .txt (question, tab, answers) or .parquet, all but the last also "
    "gzipped"
)
Record = dict[str, Any] | str
"""A record, or what is wrong with its line."""


def read_rows(path: Path) -> Iterator[tuple[str, Record]]:
    """Yields the location of each row of a file, and its record or what is wrong with it.

    Blank lines are skipped. Raises DataError for a file that cannot be read.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    kind = Path(path.name.removesuffix(".gz")).suffix
    if kind not in READERS:
        raise DataError(f"{path}: expected {KINDS}")
    yield from READERS[kind](path)


def parquet_rows(path: Path) -> Iterator[tuple[str, Record]]:
    """`read_rows` of a parquet file."""
    try:
        records = pq.read_table(path).to_pylist()
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a readable parquet file ({error})") from error
    for number, record in enumerate(records):
        yield f"{path}, row {number}", record


def csv_rows(path: Path) -> Iterator[tuple[str, Record]]:
    """`read_rows` of a table whose separator is found in its first line."""
    text = read_text(path)
    separator = separator_of(first_line(text))
    if separator is None:
        raise DataError(
            f"{path}, line 1: no column named question, separated by one of "
            f"{' '.join(map(repr, SEPARATORS))}; found {first_line(text)[:100]!r}"
        )
    yield from table_rows(path, text, separator)


def tab_rows(path: Path) -> Iterator[tuple[str, Record]]:
    """`read_rows` of a table with tabs, or of lines `question <tab> answers` without a header."""
    text = read_text(path)
    if "\t" in first_line(text) and separator_of(first_line(text)) == "\t":
        yield from table_rows(path, text, "\t")
        return
    for where, line in numbered(path, text):
        yield where, parse_topic(line)


def json_rows(path: Path) -> Iterator[tuple[str, Record]]:
    """`read_rows` of JSONL, of a JSON array, or of one object that holds the records."""
    text = read_text(path)
    parse = parse_array if text.lstrip().startswith("[") else parse_document
    entries = parse(path, text)
    if entries is None:
        for where, line in numbered(path, text):
            yield where, parse_line(line)
        return
    for number, entry in enumerate(entries):
        yield f"{path}, entry {number}", entry


READERS: dict[str, Callable[[Path], Iterator[tuple[str, Record]]]] = {
    ".parquet": parquet_rows,
    ".csv": csv_rows,
    ".tsv": tab_rows,
    ".txt": tab_rows,
    ".jsonl": json_rows,
    ".json": json_rows,
}
"""The reader of each form, by the ending of the file's name."""


def first_line(text: str) -> str:
    """The first line that is not blank."""
    return text.lstrip().partition("\n")[0].rstrip("\r")


def separator_of(header: str) -> str | None:
    """The first separator with which the header has a column of questions, None without one."""
    for separator in SEPARATORS:
        columns = next(csv.reader([header], delimiter=separator), [])
        if QUESTION_COLUMNS & {column.strip() for column in columns}:
            return separator
    return None


def table_rows(path: Path, text: str, separator: str) -> Iterator[tuple[str, Record]]:
    """Yields the location and the record of each row of a table with a header.

    Raises DataError for a text that is not a table.
    """
    table = text.lstrip()
    blank_lines = text[: len(text) - len(table)].count("\n")
    reader = csv.DictReader(io.StringIO(table, newline=""), delimiter=separator)
    reader.fieldnames = [column.strip() for column in reader.fieldnames or ()]
    try:
        for record in reader:
            yield f"{path}, line {reader.line_num + blank_lines}", parse_cells(record)
    except csv.Error as error:
        raise DataError(
            f"{path}, line {reader.line_num + blank_lines}: not a table ({error})"
        ) from error


def numbered(path: Path, text: str) -> Iterator[tuple[str, str]]:
    """Yields the location and the text of each line that is not blank."""
    return (
        (f"{path}, line {number}", line)
        for number, line in enumerate(text.split("\n"), 1)
        if line.strip()
    )


def read_text(path: Path) -> str:
    """Reads the text of a file, gzipped or not. Raises DataError where it cannot."""
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
    return (
        record
        if isinstance(record, dict)
        else f"expected one object per line, got a {type(record).__name__}"
    )


def parse_array(path: Path, text: str) -> list[Record]:
    """The objects of a JSON array. Raises DataError for any other text."""
    try:
        entries = json.loads(text)
    except ValueError as error:
        # The file is JSONL, but holds arrays instead of objects.
        if "\n[" in text.strip() or "]\n" in text.strip():
            return [parse_line(line) for line in text.split("\n") if line.strip()]
        raise DataError(f"{path}: not JSON ({error})") from error
    return [
        entry if isinstance(entry, dict) else f"expected an object, got {entry!r:.40}"
        for entry in entries
    ]


def parse_document(path: Path, text: str) -> Sequence[Record] | None:
    """The records of a file that is one JSON object, as SQuAD is published; None for JSONL.

    Raises DataError for an object over several lines that holds no records.
    """
    try:
        document = json.loads(text)
    except ValueError:
        return None
    records = unfold(document)
    if records is None and "\n" in text.strip():
        raise DataError(
            f"{path}: one object with the keys {', '.join(document)}: expected one object per "
            "line, an array of them, or an object that holds them under data"
        )
    return records


def parse_topic(line: str) -> Record:
    """The record of a line `question <tab> answers`: a printed list of answers or one answer."""
    question, tab, answers = line.partition("\t")
    if not tab:
        return "expected a question, a tab and its answers"
    return parse_cells({"question": question, "answers": answers.strip()})


def parse_cells(record: dict[Any, Any]) -> Record:
    """The record of a row of a table.

    A printed list such as `["a"]` in a column of answers or gold passages becomes a list; empty
    cells become None.
    """
    if None in record:
        return "more cells than columns (quote cells that hold the separator)"
    parsed: dict[str, Any] = {key: cell or None for key, cell in record.items()}
    for key in set(LIST_COLUMNS) & parsed.keys():
        parsed[key] = unprinted(parsed[key])
        if (
            isinstance(parsed[key], str)
            and parsed[key].startswith("[")
            and parsed[key].endswith("]")
        ):
            return f"{key}: not a list ({parsed[key][:60]})"
    return parsed


def texts(value: object) -> list[str]:
    """The non-empty texts of a value or list of values. Raises ValueError for anything nested."""
    return [text.strip() for text in answers_of(value)]


def texts_under(key: str, record: dict[str, Any]) -> list[str]:
    """`texts` of the value under a key. Raises ValueError naming the key."""
    try:
        return texts(record.get(key))
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error


def question_and_answers(record: dict[str, Any]) -> tuple[str, list[str]]:
    """The question and the answers of a record in the form of `normalise`.

    Raises ValueError when one of them is missing or has another form.
    """
    question = record.get("question") or ""
    if not isinstance(question, str):
        raise ValueError(f"question: expected a text, got {kind_of(question)}")
    if not question.strip():
        raise ValueError("no question")
    answers = texts_under("golden_answers", record)
    if not answers:
        raise ValueError("no answer (looked for golden_answers, answers, answer)")
    return question.strip(), answers


def settle(problems: Sequence[str], skip_bad: bool) -> None:
    """Raises DataError with a list of `problems`, if there are any.

    With `skip_bad` it only reports on stderr how many rows are left out, and why the first one is.
    """
    if problems and not skip_bad:
        raise DataError(listed(problems))
    if problems:
        sys.stderr.write(f"{len(problems)} rows left out, the first: {problems[0]}\n")


def training_row(
    question: str, answers: list[str], source: str, prompt: str, **extra: Any
) -> dict[str, Any]:
    """A row of the training parquet in the original's schema.

    `extra` is what else is known (split, index, gold passages), and goes to `extra_info`.
    """
    return {
        "data_source": source,
        "prompt": [{"role": "user", "content": prompt}],
        "ability": "fact-reasoning",
        "reward_model": {"style": "rule", "ground_truth": {"target": answers}},
        "extra_info": {"question": question, **extra},
    }
