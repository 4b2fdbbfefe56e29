"""Writes the paper's table, methods by sets, with our results beside the published ones.

python -m search_r1.evaluation.table NAME=runs/A [NAME=runs/B ...] [--published MODEL] [--out DIR]

A run folder must hold a summary.json from `search_r1.evaluate`. --out also writes table.md and
page.html to a folder.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from search_r1.evaluation.page import page, set_names
from search_r1.evaluation.summary import AVERAGE

PUBLISHED = Path(__file__).with_name("published.json")
SETS = {
    "nq": "NQ",
    "triviaqa": "TriviaQA",
    "popqa": "PopQA",
    "hotpotqa": "HotpotQA",
    "2wikimultihopqa": "2Wiki",
    "musique": "MuSiQue",
    "bamboogle": "Bamboogle",
}


def paper_table(results: dict[str, dict[str, Any]], published: str | None = None) -> str:
    """A Markdown table of the EM of our results by set, with 95 % intervals.

    The average is given for results that have all sets. If any of our results has one of the
    paper's sets, the table also has the paper's columns and the published rows, of the model
    `published` or of all models.
    """
    found = set_names(results)
    is_papers = bool(set(found) & set(SETS))
    columns = [*(SETS if is_papers else ()), *(name for name in found if name not in SETS)]
    lines = [["method", *(SETS.get(name, name) for name in columns), "average"]]
    lines.append(["---"] * len(lines[0]))
    lines += [own_line(name, summary, columns) for name, summary in results.items()]
    if is_papers:
        lines += [published_line(row, columns) for row in published_rows(published)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def own_line(name: str, summary: dict[str, Any], columns: Sequence[str]) -> list[str]:
    """The cells of one of our results."""
    cells = [with_interval(summary[c]) if c in summary else "-" for c in columns]
    has_all = all(c in summary for c in columns)
    return [f"**{name}**", *cells, f"{summary[AVERAGE]['em']:.3f}" if has_all else "-"]


def published_line(row: dict[str, Any], columns: Sequence[str]) -> list[str]:
    """The cells of a published row."""
    values = [row["em"].get(c) for c in columns] + [row["average"]]
    cells = ["-" if value is None else f"{value:.3f}" for value in values]
    return [f"{row['model']}, {row['method']} ({row['source']})", *cells]


def with_interval(row: dict[str, Any]) -> str:
    """EM with its interval."""
    low, high = row["em_interval"]
    return f"{row['em']:.3f} ({low:.3f}-{high:.3f})"


def published_rows(model: str | None) -> list[dict[str, Any]]:
    """The rows of published.json, those of the paper before those of reproductions.

    Exits with a list of the models if `model` is not one of them.
    """
    rows = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    models = sorted({row["model"] for row in rows})
    if model is not None and model not in models:
        sys.exit(f"error: --published {model}: there are {', '.join(models)}")
    wanted = [row for row in rows if model in (None, row["model"])]
    return sorted(wanted, key=lambda row: (row["model"], row["kind"] != "paper"))


def read_results(runs: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Reads the summaries of `NAME=FOLDER` or `FOLDER`. Exits if a folder has none."""
    results: dict[str, dict[str, Any]] = {}
    for run in runs:
        name, _, folder = run.rpartition("=")
        path = Path(folder) / "summary.json"
        if not path.is_file():
            sys.exit(
                f"error: {path}: no such file; `python -m search_r1.evaluate` leaves it in its run "
                "folder"
            )
        results[name or Path(folder).resolve().name] = json.loads(path.read_text(encoding="utf-8"))
    return results


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the table of the results on the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m search_r1.evaluation.table",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "runs", nargs="+", metavar="NAME=FOLDER", help="evaluations, in the order of the rows"
    )
    parser.add_argument(
        "--published", metavar="MODEL", help="published rows of this model only, such as Qwen2.5-7B"
    )
    parser.add_argument(
        "--out", type=Path, help="folder for table.md and page.html (default: none written)"
    )
    args = parser.parse_args(argv)
    results = read_results(args.runs)
    text = paper_table(results, args.published)
    sys.stdout.write(text)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "table.md").write_text(text)
        (args.out / "page.html").write_text(page(results, args.out.resolve().name))
    return 0


if __name__ == "__main__":
    sys.exit(main())
