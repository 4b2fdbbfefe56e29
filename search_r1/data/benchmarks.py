"""The benchmarks of the paper in the training schema, from the hub or from native files."""

import argparse
import asyncio
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from search_r1.data.rows import question_and_answers, read_rows, settle, training_row
from search_r1.data.shapes import normalise
from search_r1.prompts import TEMPLATES, WITH_CONTEXT, build_prompt, format_passages, with_mark
from search_r1.rewards.matching import normalize_answer
from search_r1.search.client import RetrievalClient
from search_r1.search.client.config import RetrieverConfig
from verl.utils.errors import DataError

HUB = "RUC-NLPIR/FlashRAG_datasets"
SPLITS = ("test", "dev", "train")
SIZES = {  # FlashRAG's, of the split that is tested on
    "nq": 3610,
    "triviaqa": 11313,
    "popqa": 14267,
    "hotpotqa": 7405,
    "2wikimultihopqa": 12576,
    "musique": 2417,
    "bamboogle": 125,
}
PAPER_FOLDER = "data/nq_hotpotqa_train"
HUB_SETS = (*SIZES, "web_questions", "strategyqa")


@dataclass(frozen=True)
class Source:
    """A benchmark and where it comes from: the hub, or a native file."""

    name: str
    file: Path | None = None


def read(source: Source, split: str, skip_bad: bool = False) -> tuple[str, list[dict[str, Any]]]:
    """Reads a benchmark; returns the split that was taken, and its rows.

    A row has `id`, `question`, `golden_answers` and what is known of gold passages. For the split
    "test" the first of test, dev and train is taken that the hub has. Raises DataError for data
    that cannot be read, and, unless bad rows are skipped, for rows without question or answer,
    which it lists up to a limit.
    """
    records: Iterable[tuple[str, Any]]
    if source.file is not None:
        records = read_rows(source.file)
    else:
        split, rows = read_hub(source.name, split)
        records = (
            (f"{source.name}, {split}, row {number}", row) for number, row in enumerate(rows)
        )
    kept = []
    problems = []
    for number, (location, record) in enumerate(records):
        row = normalise(record) if isinstance(record, dict) else record
        if isinstance(row, str):
            problems.append(f"{location}: {row}")
            continue
        try:
            question, answers = question_and_answers(row)
        except ValueError as error:
            problems.append(f"{location}: {error}")
            continue
        id = str(row.get("id") or f"{split}_{number}")
        kept.append({**row, "id": id, "question": question, "golden_answers": answers})
    settle(problems, skip_bad)
    if not kept:
        raise DataError(f"{source.file or source.name}: no rows")
    return split, kept


def read_hub(name: str, split: str) -> tuple[str, Any]:
    """Loads a split from the hub; returns its name and rows. Raises DataError where it cannot."""
    if name not in HUB_SETS:
        raise DataError(f"{name}: not one of {', '.join(HUB_SETS)}; name its file: {name}=FILE")
    try:
        from datasets import load_dataset

        found: Any = load_dataset(HUB, name)
    except (OSError, ValueError, ImportError) as error:
        raise DataError(
            f"{name}: {HUB} could not be loaded ({error}); a native file does too: {name}=FILE"
        ) from error
    wanted = SPLITS[SPLITS.index(split) :] if split == "test" else (split,)
    taken = next((s for s in wanted if s in found), None)
    if taken is None:
        raise DataError(f"{name}: has no split {split}, only {', '.join(found)}")
    return taken, found[taken]


def to_training_row(
    row: dict[str, Any], name: str, split: str, index: int, prompt: str
) -> dict[str, Any]:
    """The row in the form of the original's scripts.

    What is known of gold passages stands in `extra_info`.
    """
    gold = {key: row[key] for key in ("gold_titles", "gold_ids", "hops") if row.get(key)}
    question = with_mark(row["question"])
    answers = row["golden_answers"]
    return {
        "id": row["id"],
        "question": question,
        "golden_answers": answers,
        **training_row(question, answers, name, prompt, split=split, index=index, **gold),
    }


async def retrieve_contexts(questions: Sequence[str], config: RetrieverConfig) -> list[str]:
    """Retrieves the passages of each question as one text. Raises SearchError if a search fails."""
    client = RetrievalClient(config)
    try:
        found = await asyncio.gather(*(client.search(question) for question in questions))
    finally:
        await client.close()
    contexts: list[str] = []
    for passages in found:
        contexts.append(format_passages([(p.title, p.text) for p in passages]))
    return contexts


def build(
    sources: Sequence[Source],
    split: str,
    template: str,
    retriever: RetrieverConfig | None = None,
    skip_bad: bool = False,
) -> list[dict[str, Any]]:
    """Builds the training rows of all sources in order. Prompts with passages need a retriever."""
    rows: list[dict[str, Any]] = []
    for source in sources:
        taken, records = read(source, split, skip_bad)
        questions = [with_mark(record["question"]) for record in records]
        contexts = (
            asyncio.run(retrieve_contexts(questions, retriever))
            if retriever
            else [""] * len(records)
        )
        prompts = [build_prompt(q, template, c) for q, c in zip(questions, contexts, strict=True)]
        rows += [
            to_training_row(record, source.name, taken, index, prompt)
            for index, (record, prompt) in enumerate(zip(records, prompts, strict=True))
        ]
    return rows


def leakage(train: Sequence[dict[str, Any]], test: Sequence[dict[str, Any]]) -> list[str]:
    """Test questions that are also training questions, both normalised."""
    known = {normalize_answer(row["question"]) for row in train}
    return [row["question"] for row in test if normalize_answer(row["question"]) in known]


def write(rows: Sequence[dict[str, Any]], path: Path) -> str:
    """Writes the parquet file; returns a line that says what it holds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows)), path)
    counts = Counter(row["data_source"] for row in rows)
    duplicates = len(rows) - len(
        {(row["data_source"], normalize_answer(row["question"])) for row in rows}
    )
    parts = ", ".join(f"{name} {count}" for name, count in counts.items())
    return f"{path}: {len(rows)} questions ({parts}); {duplicates} duplicates\n"


def parse_sources(text: str) -> list[Source]:
    """The sources in a text such as `nq,hotpotqa=FILE`; those without a file are on the hub."""
    sources = []
    for part in text.split(","):
        name, _, file = part.strip().partition("=")
        sources.append(Source(name, Path(file) if file else None))
    return sources


def command(
    description: str, default_sources: str, default_dir: str, splits: Sequence[str], template: str
) -> int:
    """Runs the command line that the scripts of `scripts/data_process` share.

    Writes a parquet file for each of `splits`; returns the exit status.
    """
    args = make_parser(description, default_sources, default_dir, template).parse_args()
    try:
        written = write_splits(args, splits)
    except DataError as error:
        sys.exit(f"error: {error}")
    if len(written) == 2:
        shared = leakage(written["train"], written["test"])
        sys.stdout.write(f"{len(shared)} of the test questions are also training questions\n")
    return 0


def paper_train_set() -> int:
    """Makes the training questions of the paper, or those of other sets; returns the status."""
    return command(
        "Training questions of several sets with the search prompt: train.parquet.",
        "nq,hotpotqa",
        PAPER_FOLDER,
        ("train",),
        "search",
    )


def paper_test_set() -> int:
    """Makes the test questions of the paper's seven sets, or of others; returns the status."""
    return command(
        "Test questions of several sets with the search prompt: test.parquet.",
        ",".join(SIZES),
        PAPER_FOLDER,
        ("test",),
        "search",
    )


def make_parser(
    description: str, default_sources: str, default_dir: str, template: str
) -> argparse.ArgumentParser:
    """The parser of the command line, with these defaults."""
    parser = argparse.ArgumentParser(description=description)
    add = parser.add_argument
    add(
        "--local_dir",
        type=Path,
        default=Path(default_dir),
        help=f"folder to write (default: {default_dir})",
    )
    add(
        "--data_sources",
        default=default_sources,
        help="NAME or NAME=FILE, with commas (default: %(default)s)",
    )
    add("--test_sources", help="the same for test.parquet, where native files hold one split each")
    add(
        "--template",
        choices=sorted(TEMPLATES),
        default=template,
        help=f"prompt (default: {template})",
    )
    add(
        "--template_type",
        default="base",
        help="as the original has it; base and chat models get the same text",
    )
    add(
        "--retriever_url",
        default="http://127.0.0.1:8000/retrieve",
        help="rag: the retrieval server",
    )
    add("--topk", type=int, default=3, help="rag: passages per question (default: 3)")
    add(
        "--skip-bad",
        action="store_true",
        help="leave rows without question or answer out, and say how many",
    )
    return parser


def write_splits(
    args: argparse.Namespace, splits: Sequence[str]
) -> dict[str, list[dict[str, Any]]]:
    """Builds each split and writes its file, saying so; returns the rows by split.

    Raises DataError as `read` does.
    """
    retriever = (
        RetrieverConfig(url=args.retriever_url, topk=args.topk)
        if args.template in WITH_CONTEXT
        else None
    )
    written: dict[str, list[dict[str, Any]]] = {}
    for split in splits:
        named = args.test_sources if split == "test" and args.test_sources else args.data_sources
        rows = build(parse_sources(named), split, args.template, retriever, args.skip_bad)
        written[split] = rows
        sys.stdout.write(write(rows, args.local_dir / f"{split}.parquet"))
    return written
