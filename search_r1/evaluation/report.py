"""Numbers and behaviour of finished evaluations: tables, `summary.json`, comparison with another
result, a page.

python -m search_r1.evaluation.report runs/A/evaluation.jsonl [--compare OTHER.jsonl] [--out DIR]
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
from verl.utils.errors import DataError

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
    """Markdown: a row per set, one for all, and the unweighted average."""
    head = ["set", "n", "EM", "95 %", "F1", "sub-EM", *(name.replace("_", " ") for name in SHOWN)]
    lines = [head, ["---"] * len(head)]
    hops = {
        f"{name}, {n}-hop": row
        for name, s in summary.items()
        for n, row in s.get("by_hops", {}).items()
    }
    average = {AVERAGE: summary[AVERAGE]}
    for name, row in ({n: s for n, s in summary.items() if n != AVERAGE} | hops | average).items():
        scores = [f"{row['em']:.3f}", "", f"{row['f1']:.3f}", f"{row['sub_em']:.3f}"]
        if name == AVERAGE:
            lines.append([name, "", *scores, *[""] * len(SHOWN)])
            continue
        scores[1] = f"{row['em_interval'][0]:.3f}-{row['em_interval'][1]:.3f}"
        figures = [
            f"{row['behaviour'][key]:.3f}" if key in row["behaviour"] else "-" for key in SHOWN
        ]
        lines.append([name, str(row["questions"]), *scores, *figures])
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
    passed = {name: row["pass@k"] for name, row in summary.items() if "pass@k" in row}
    return text + "".join(
        f"{n}: {', '.join(f'pass@{k} {v:.3f}' for k, v in p.items())}\n" for n, p in passed.items()
    )


def comparison(first: Sequence[Record], second: Sequence[Record]) -> tuple[str, dict[str, Any]]:
    """(text, figures) of the second result against the first. Raises DataError unless the questions
    are the same."""
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
        "difference": found.difference,
        "interval": found.interval,
        "p": found.p_value,
        "gained": found.gained,
        "lost": found.lost,
    }


def name_of(path: Path) -> str:
    """A result's name: what tells its folders and file from those of other results."""
    parts = [*path.resolve().parent.parts[-2:], path.stem]
    return (
        "/".join(part for part in parts if part not in ("runs", "evaluation", "trajectories"))
        or path.stem
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m search_r1.evaluation.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("result", type=Path, help="trajectories of a validation, JSONL")
    parser.add_argument(
        "--compare", type=Path, metavar="FILE", help="another result on the same questions"
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
    args = parser.parse_args(argv)
    try:
        records = read_records(args.result)
        closed = by_question(read_records(args.closed_book), "em") if args.closed_book else None
        summary = summarize(records, closed)
        results = {name_of(args.result): summary}
        text = f"{table(summary)}\n{paper_table(results, args.published)}"
        if args.compare:
            other = read_records(args.compare)
            line, summary["comparison"] = comparison(other, records)
            results[name_of(args.compare)] = summarize(other, closed)
            text += f"\nagainst {args.compare}: {line}"
    except (DataError, KeyError) as error:
        sys.exit(f"error: {error}")
    sys.stdout.write(text)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
        (args.out / "table.md").write_text(text)
        (args.out / "page.html").write_text(page(results, name_of(args.result)))
        sys.stdout.write(f"\n{args.out / 'page.html'}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
