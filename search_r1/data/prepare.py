"""`python -m search_r1.data.prepare --questions FILE --out DIR`: questions and answers into training files.

FILE is JSONL, CSV or parquet with `question` and `answer`, `answers` or `golden_answers`; a parquet file that already has
the training columns passes through. Every row is checked before anything is written.
"""

import argparse
import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from search_r1.prompts import TEMPLATES, build_prompt
from verl.utils.errors import DataError

ANSWER_KEYS = ("golden_answers", "answers", "answer")
KEPT = ("gold_ids", "gold_titles", "hops", "id")
NATIVE = {"data_source", "prompt", "reward_model"}
MAX_LISTED = 20


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place for messages, record) of each row. Raises DataError for a file or line that cannot be read."""
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    if path.suffix == ".parquet":
        for number, record in enumerate(pq.read_table(path).to_pylist()):
            yield f"{path}, row {number}", record
    elif path.suffix == ".csv":
        with path.open(newline="", encoding="utf-8") as file:
            for number, record in enumerate(csv.DictReader(file), 2):
                yield f"{path}, line {number}", record
    elif path.suffix in (".jsonl", ".json"):
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                try:
                    record = json.loads(line)
                except ValueError as error:
                    raise DataError(f"{path}, line {number}: not JSON ({error})") from error
                if not isinstance(record, dict):
                    raise DataError(f"{path}, line {number}: expected an object, got {type(record).__name__}")
                yield f"{path}, line {number}", record
    else:
        raise DataError(f"{path}: expected a .jsonl, .csv or .parquet file")


def golden_answers(record: dict[str, Any]) -> list[str]:
    """The accepted answers of a record, empty when it has none."""
    values = next((record[key] for key in ANSWER_KEYS if record.get(key) is not None), [])
    values = values if isinstance(values, list) else [values]
    return [text for value in values if (text := str(value).strip())]


def convert(record: dict[str, Any], source: str, template: str, index: int) -> dict[str, Any] | str:
    """The training row of a record, or what is wrong with it."""
    if record.keys() >= NATIVE:
        return record
    question, answers = str(record.get("question") or "").strip(), golden_answers(record)
    if not question:
        return "no question"
    if not answers:
        return f"no answer (looked for {', '.join(ANSWER_KEYS)})"
    return {
        "data_source": record.get("data_source") or source,
        "prompt": [{"role": "user", "content": build_prompt(question, template)}],
        "ability": "fact-reasoning",
        "reward_model": {"style": "rule", "ground_truth": {"target": answers}},
        "extra_info": {"index": index, **{k: record[k] for k in KEPT if record.get(k) is not None}},
    }


def prepare(path: Path, template: str) -> list[dict[str, Any]]:
    """All rows of a file. Raises DataError listing the first problems and their number."""
    rows, problems = [], []
    for index, (place, record) in enumerate(read_rows(path)):
        row = convert(record, path.stem, template, index)
        if isinstance(row, str):
            problems.append(f"{place}: {row}")
        else:
            rows.append(row)
    if problems:
        more = [f"... and {len(problems) - MAX_LISTED} more"] if len(problems) > MAX_LISTED else []
        raise DataError("\n".join(problems[:MAX_LISTED] + more))
    if not rows:
        raise DataError(f"{path}: no rows")
    return rows


def count_duplicates(rows: list[dict[str, Any]]) -> int:
    """Rows whose prompt occurred before."""
    return len(rows) - len({row["prompt"][0]["content"].lower() for row in rows})


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m search_r1.data.prepare", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--questions", type=Path, required=True, help="JSONL, CSV or parquet of questions and answers")
    add("--out", type=Path, required=True, help="folder for train.parquet and test.parquet")
    add("--template", choices=sorted(TEMPLATES), default="search", help="prompt (default: search, the paper's)")
    add("--test-size", type=int, default=100, help="rows held out, the last ones (default: 100)")
    args = parser.parse_args()
    try:
        rows = prepare(args.questions, args.template)
        if not 0 < args.test_size < len(rows):
            raise DataError(f"--test-size {args.test_size}: expected 1 to {len(rows) - 1}, the file has {len(rows)} rows")
    except DataError as error:
        sys.exit(f"error: {error}")
    args.out.mkdir(parents=True, exist_ok=True)
    split = len(rows) - args.test_size
    pq.write_table(pa.Table.from_pylist(rows[:split]), args.out / "train.parquet")
    pq.write_table(pa.Table.from_pylist(rows[split:]), args.out / "test.parquet")
    duplicates = count_duplicates(rows)
    sys.stdout.write(f"{args.out}: {split} training and {args.test_size} test questions, {duplicates} duplicates\n")


if __name__ == "__main__":
    main()
