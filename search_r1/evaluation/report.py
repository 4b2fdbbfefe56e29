"""Reports finished evaluations: tables, `summary.json`, a comparison with another result, a page.

python -m search_r1.evaluation.report runs/A/evaluation.jsonl [OTHER.jsonl] [--out DIR]
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from search_r1.evaluation.page import page
from search_r1.evaluation.scores import compare
from search_r1.evaluation.summary import AVERAGE, Record, by_question, read_records, summarize
from search_r1.evaluation.table import paper_table
from search_r1.program import command_parser
from verl.utils.errors import DataError

EVALUATION = "evaluation.jsonl"
"""What an evaluation leaves in its folder."""
SHOWN = (
    "searches",
    "gold_retrieved",
    "right_if_gold_retrieved",
    "premature_answers",
    "searches_after_gold",
    "duplicate_queries",
    "answered",
)


def table(summary: dict[str, Any]) -> str:
    """A Markdown table with a row per set, one for all and the unweighted average; then pass@k."""
    head = ["set", "n", "EM", "95 %", "F1", "sub-EM", *(name.replace("_", " ") for name in SHOWN)]
    lines = [head, ["---"] * len(head)]
    sets = {name: row for name, row in summary.items() if name != AVERAGE}
    lines += [set_cells(name, row) for name, row in {**sets, **rows_by_hops(sets)}.items()]
    average = summary[AVERAGE]
    lines.append([AVERAGE, "", *scores(average, interval=""), *[""] * len(SHOWN)])
    text = "".join("| " + " | ".join(line) + " |\n" for line in lines)
    return text + "".join(pass_line(name, row) for name, row in sets.items() if "pass@k" in row)


def rows_by_hops(sets: dict[str, Any]) -> dict[str, Any]:
    """The rows of the questions with each number of hops, by name of set and hops."""
    rows: dict[str, Any] = {}
    for name, summary in sets.items():
        for hops, row in summary.get("by_hops", {}).items():
            rows[f"{name}, {hops}-hop"] = row
    return rows


def set_cells(name: str, row: dict[str, Any]) -> list[str]:
    """The cells of a row of the table."""
    low, high = row["em_interval"]
    found = row["behaviour"]
    figures = [f"{found[key]:.3f}" if key in found else "-" for key in SHOWN]
    return [name, str(row["questions"]), *scores(row, f"{low:.3f}-{high:.3f}"), *figures]


def scores(row: dict[str, Any], interval: str) -> list[str]:
    """The cells from EM to sub-EM."""
    return [f"{row['em']:.3f}", interval, f"{row['f1']:.3f}", f"{row['sub_em']:.3f}"]


def pass_line(name: str, row: dict[str, Any]) -> str:
    """A line with the pass@k of a set."""
    rates = ", ".join(f"pass@{k} {rate:.3f}" for k, rate in row["pass@k"].items())
    return f"{name}: {rates}\n"


def comparison(first: Sequence[Record], second: Sequence[Record]) -> tuple[str, dict[str, Any]]:
    """Compares the second result with the first; returns a text and the figures.

    Raises DataError unless the questions are the same.
    """
    try:
        found = compare(by_question(first, "em"), by_question(second, "em"))
    except ValueError as error:
        raise DataError(f"cannot be compared: {error}") from error
    low, high = found.interval
    text = (
        f"EM {found.difference:+.3f} (95 % {low:+.3f} to {high:+.3f}) on {found.questions} "
        "questions; "
        f"{len(found.gained)} gained, {len(found.lost)} lost, McNemar p = {found.p_value:.2g}\n"
    )
    return text, {
        "questions": found.questions,
        "difference": found.difference,
        "interval": found.interval,
        "p": found.p_value,
        "gained": found.gained,
        "lost": found.lost,
    }


def name_of(path: Path) -> str:
    """The name of a result: the parts of its path that tell it from other results."""
    parts = [*path.resolve().parent.parts[-2:], path.stem]
    return (
        "/".join(part for part in parts if part not in ("runs", "evaluation", "trajectories"))
        or path.stem
    )


def trajectories_at(path: Path) -> Path:
    """The file of trajectories that a path names.

    A folder stands for the evaluation in it; a run without one for its last validation. Raises
    DataError for a folder with neither.
    """
    if not path.is_dir():
        return path
    evaluation = path / EVALUATION
    return evaluation if evaluation.exists() else last_validation(path)


def last_validation(run: Path) -> Path:
    """The trajectories of the last validation of a run. Raises DataError if there is none."""
    files = sorted((run / "trajectories").glob("val_*.jsonl"))
    if not files:
        raise DataError(f"{run}: neither {EVALUATION} nor a validation (trajectories/val_*.jsonl)")
    return files[-1]


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = command_parser("search_r1.evaluation.report", __doc__)
    parser.add_argument(
        "result",
        type=Path,
        help=f"trajectories of a validation, JSONL, or a folder with {EVALUATION}, or of a run",
    )
    parser.add_argument(
        "other", type=Path, nargs="?", help="another result on the same questions, to compare with"
    )
    parser.add_argument(
        "--closed-book", type=Path, metavar="FILE", help="a result without search, for over-search"
    )
    parser.add_argument(
        "--published", metavar="MODEL", help="published rows of this model only, such as Qwen2.5-7B"
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="folder for summary.json, table.md and page.html (default: none written)",
    )
    return parser


def make_report(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Makes the text of the report and the summaries by name, the one of the result itself first.

    Raises DataError for files that do not hold trajectories, or not of the same questions. Raises
    KeyError for a question that the closed-book result lacks.
    """
    records = read_records(args.result)
    closed = by_question(read_records(args.closed_book), "em") if args.closed_book else None
    summary = summarize(records, closed)
    results = {name_of(args.result): summary}
    text = f"{table(summary)}\n{paper_table(results, args.published)}"
    if args.other:
        other = read_records(args.other)
        line, summary["comparison"] = comparison(other, records)
        results[name_of(args.other)] = summarize(other, closed)
        text += f"\nagainst {args.other}: {line}"
    return text, results


def main(argv: Sequence[str] | None = None) -> int:
    """Reports as the command line says; returns the exit status."""
    args = make_parser().parse_args(argv)
    try:
        args.result = trajectories_at(args.result)
        args.other = trajectories_at(args.other) if args.other else None
        text, results = make_report(args)
    except (DataError, KeyError) as error:
        sys.exit(f"error: {error}")
    sys.stdout.write(text)
    if args.out:
        name = name_of(args.result)
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "summary.json").write_text(json.dumps(results[name], indent=1) + "\n")
        (args.out / "table.md").write_text(text)
        (args.out / "page.html").write_text(page(results, name))
        sys.stdout.write(f"\n{args.out / 'page.html'}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
