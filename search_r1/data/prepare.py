"""Makes training files from questions and answers.

    python -m search_r1.data.prepare --questions FILE --out DIR

FILE is JSONL, JSON, CSV, TSV or parquet with `question` and `answer`, `answers` or
`golden_answers`, or in the native form of a benchmark (docs/data.md). Rows that have the training
columns already are kept. All rows are checked before anything is written.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from search_r1.data.made import is_current, making, sha256
from search_r1.data.rows import question_and_answers, read_rows, settle, texts_under, training_row
from search_r1.data.shapes import normalise
from search_r1.program import program_name
from search_r1.prompts import TEMPLATES, WITH_CONTEXT, build_prompt
from search_r1.rewards.matching import normalize_answer
from verl.utils.dataset import read_row
from verl.utils.errors import DataError

LISTS = ("gold_ids", "gold_titles")
SCALARS = {"hops": int, "id": str}
NATIVE = {"data_source", "prompt", "reward_model"}
TRAIN = "train.parquet"
TEST = "test.parquet"


def convert(record: dict[str, Any], source: str, template: str, index: int) -> dict[str, Any]:
    """The training row of a record. Raises ValueError that says what is wrong with the record."""
    if record.keys() >= NATIVE:
        return read_row(record)
    if record.get("images"):
        raise ValueError(
            "images: a question with images is prepared as a whole row (data_source, prompt, "
            "reward_model, images; docs/images.md)"
        )
    native = normalise(record)
    if isinstance(native, str):
        raise ValueError(native)
    record = {**record, **native}
    question, answers = question_and_answers(native)
    kept: dict[str, Any] = {
        key: texts_under(key, record) for key in LISTS if record.get(key) is not None
    }
    for key, kind in SCALARS.items():
        try:
            kept |= {key: kind(record[key])} if record.get(key) is not None else {}
        except (ValueError, TypeError) as error:
            raise ValueError(f"{key}: expected {kind.__name__}, got {record[key]!r}") from error
    source = str(record.get("data_source") or source)
    return training_row(
        question, answers, source, build_prompt(question, template), index=index, **kept
    )


def prepare(path: Path, template: str, skip_bad: bool = False) -> list[dict[str, Any]]:
    """Reads all rows of a file as training rows.

    Unless bad rows are skipped, raises DataError that lists the first ones and their number.
    """
    rows = []
    problems = []
    for index, (location, record) in enumerate(read_rows(path)):
        if isinstance(record, str):
            problems.append(f"{location}: {record}")
            continue
        try:
            rows.append(convert(record, path.stem, template, index))
        except ValueError as error:
            problems.append(f"{location}: {error}")
    settle(problems, skip_bad)
    if not rows:
        raise DataError(f"{path}: no rows")
    return rows


def inputs_of(path: Path, template: str, test_size: int, skip_bad: bool = False) -> dict[str, Any]:
    """The inputs that the training files are made from. Raises DataError for a missing file."""
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    return {
        "name": path.stem,  # becomes the data_source of rows without one
        "questions": sha256(path),
        "template": template,
        "test_size": test_size,
        "skip_bad": skip_bad,
    }


def questions(rows: list[dict[str, Any]]) -> set[str]:
    """The distinct prompts of the rows, normalised like answers: without case, articles and
    punctuation."""
    return {normalize_answer(row["prompt"][-1]["content"]) for row in rows}


def write_split(folder: Path, rows: list[dict[str, Any]], test_size: int) -> None:
    """Writes the last `test_size` rows as test questions and the others as training questions."""
    pq.write_table(pa.Table.from_pylist(rows[:-test_size]), folder / TRAIN)
    pq.write_table(pa.Table.from_pylist(rows[-test_size:]), folder / TEST)


def build_parser() -> argparse.ArgumentParser:
    """The flags of the command."""
    parser = argparse.ArgumentParser(
        prog=program_name("search_r1.data.prepare"), description="Make training files."
    )
    add = parser.add_argument
    add(
        "--questions",
        type=Path,
        required=True,
        help="JSONL, CSV or parquet of questions and answers",
    )
    add("--out", type=Path, required=True, help="folder for train.parquet and test.parquet")
    add(
        "--template",
        choices=sorted(set(TEMPLATES) - WITH_CONTEXT),
        default="search",
        help="prompt (default: search, the paper's)",
    )
    add("--test-size", type=int, default=100, help="rows held out, the last ones (default: 100)")
    add(
        "--skip-bad",
        action="store_true",
        help="leave rows without question or answer out, and say how many",
    )
    add(
        "--overwrite",
        action="store_true",
        help="make the files even where others stand, or they were changed by hand",
    )
    return parser


def main() -> None:
    """Makes the files that the command line asks for, unless they are up to date."""
    args = build_parser().parse_args()
    try:
        inputs = inputs_of(args.questions, args.template, args.test_size, args.skip_bad)
        if not args.overwrite and is_current(args.out, inputs, (TRAIN, TEST)):
            sys.stdout.write(f"{args.out}: already made from {args.questions}\n")
            return
        rows = prepare(args.questions, args.template, args.skip_bad)
        if not 0 < args.test_size < len(rows):
            raise DataError(
                f"--test-size {args.test_size}: expected 1 to {len(rows) - 1} of the {len(rows)} "
                "rows"
            )
    except DataError as error:
        sys.exit(f"error: {error}")
    with making(args.out, inputs) as folder:
        write_split(folder, rows, args.test_size)
    train = rows[: -args.test_size]
    test = rows[-args.test_size :]
    duplicates = len(rows) - len(questions(rows))
    shared = len(questions(train) & questions(test))
    sys.stdout.write(
        f"{args.out}: {len(train)} training and {len(test)} test questions; "
        f"{duplicates} duplicates, {shared} of the test questions are also training questions\n"
    )


if __name__ == "__main__":
    main()
