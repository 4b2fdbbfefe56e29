"""Numbers and behaviour of finished validations: a table, `summary.json`, and comparison with another result.

python -m search_r1.evaluation.report runs/A/trajectories/val_000045.jsonl [--compare OTHER.jsonl] [--out DIR]
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from search_r1.evaluation.behaviour import behaviour, over_and_under_search, question_of, search_counts
from search_r1.evaluation.scores import bootstrap_interval, compare
from verl.utils.errors import DataError

Record = dict[str, Any]
SCORES = ("em", "f1", "sub_em")
ALL, AVERAGE = "all", "average"
SHOWN = ("searches", "gold_retrieved", "right_if_gold_retrieved", "premature_answers", "searches_after_gold",
         "duplicate_queries", "answered")  # fmt: skip


def read_records(path: Path) -> list[Record]:
    """The records of a file. Raises DataError naming file and line."""
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    records = []
    for number, line in enumerate(path.open(encoding="utf-8"), 1):
        try:
            record = json.loads(line)
            missing = {"data_source", "segments", "reward", "stop_reason", "info", "ground_truth"} - record.keys()
        except (ValueError, AttributeError) as error:
            raise DataError(f"{path}, line {number}: not a trajectory record ({error})") from error
        if missing:
            raise DataError(f"{path}, line {number}: not a trajectory record, it lacks {', '.join(sorted(missing))}")
        records.append(record)
    if not records:
        raise DataError(f"{path}: no records")
    return records


def by_set(records: Sequence[Record]) -> dict[str, list[Record]]:
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        groups[record["data_source"]].append(record)
    return dict(groups)


def by_question(records: Sequence[Record], score: str) -> dict[str, float]:
    """Mean score of each question over its samples."""
    scores: dict[str, list[float]] = defaultdict(list)
    for record in records:
        scores[question_of(record)].append(record["reward"].get(score, 0.0))  # without a token: no components
    return {question: sum(values) / len(values) for question, values in scores.items()}


def summarize(records: Sequence[Record], closed_book: dict[str, float] | None = None) -> dict[str, Any]:
    """Per set and over all: scores with 95 % intervals over questions, behaviour, distribution of searches.

    `average` is the unweighted mean of the sets' scores, as in the paper's table.
    """
    groups = by_set(records)
    summary: dict[str, Any] = {}
    for name, group in {**groups, ALL: list(records)}.items():
        scores = {score: list(by_question(group, score).values()) for score in SCORES}
        summary[name] = {
            "questions": len(scores["em"]),
            "samples": len(group),
            **{score: sum(values) / len(values) for score, values in scores.items()},
            **{f"{score}_interval": bootstrap_interval(values) for score, values in scores.items()},
            "behaviour": behaviour(group),
            "search_counts": search_counts(group),
        }
        if closed_book is not None:
            summary[name]["behaviour"] |= over_and_under_search(group, closed_book)
    summary[AVERAGE] = {score: sum(summary[name][score] for name in groups) / len(groups) for score in SCORES}
    return summary


def table(summary: dict[str, Any]) -> str:
    """Markdown: a row per set, one for all, and the unweighted average."""
    head = ["set", "n", "EM", "95 %", "F1", "sub-EM", *(name.replace("_", " ") for name in SHOWN)]
    lines = [head, ["---"] * len(head)]
    for name, row in summary.items():
        scores = [f"{row['em']:.3f}", "", f"{row['f1']:.3f}", f"{row['sub_em']:.3f}"]
        if name == AVERAGE:
            lines.append([name, "", *scores, *[""] * len(SHOWN)])
            continue
        scores[1] = f"{row['em_interval'][0]:.3f}-{row['em_interval'][1]:.3f}"
        figures = [f"{row['behaviour'][key]:.3f}" if key in row["behaviour"] else "-" for key in SHOWN]
        lines.append([name, str(row["questions"]), *scores, *figures])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def comparison(first: Sequence[Record], second: Sequence[Record]) -> tuple[str, dict[str, Any]]:
    """(text, figures) of the second result against the first. Raises DataError unless the questions are the same."""
    try:
        found = compare(by_question(first, "em"), by_question(second, "em"))
    except ValueError as error:
        raise DataError(f"cannot be compared: {error}") from error
    low, high = found.interval
    text = (
        f"EM {found.difference:+.3f} (95 % {low:+.3f} to {high:+.3f}) on {found.questions} questions; "
        f"{len(found.gained)} gained, {len(found.lost)} lost, McNemar p = {found.p_value:.2g}\n"
    )
    return text, {"difference": found.difference, "interval": found.interval, "p": found.p_value,
                  "gained": found.gained, "lost": found.lost}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m search_r1.evaluation.report", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("result", type=Path, help="trajectories of a validation, JSONL")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="another result on the same questions")
    parser.add_argument("--closed-book", type=Path, metavar="FILE", help="a result without search, for over-search")
    parser.add_argument("--out", type=Path, help="folder for summary.json and table.md (default: none written)")
    args = parser.parse_args(argv)
    try:
        records = read_records(args.result)
        closed = by_question(read_records(args.closed_book), "em") if args.closed_book else None
        summary = summarize(records, closed)
        text = table(summary)
        if args.compare:
            line, summary["comparison"] = comparison(read_records(args.compare), records)
            text += f"\nagainst {args.compare}: {line}"
    except (DataError, KeyError) as error:
        sys.exit(f"error: {error}")
    sys.stdout.write(text)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
        (args.out / "table.md").write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
