"""What the studies share: named runs, one after the other, each leaving a row when it has
finished."""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
Row = dict[str, Any]


def read_rows(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.open()] if path.exists() else []


def main(
    doc: str,
    runs: Mapping[str, Sequence[Sequence[str]]],
    rows: Path,
    figures: Callable[[str], Row],
    table: Callable[[list[Row]], str],
) -> None:
    """Runs the commands of every name that `rows` lacks, appends `figures(name)`, prints the table
    of all rows."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "runs", nargs="*", metavar="RUN", help=f"some of: {', '.join(runs)} (default: all)"
    )
    parser.add_argument(
        "--commit", action="store_true", help="commit the file of rows after every run"
    )
    args = parser.parse_args()
    names = args.runs or list(runs)
    if unknown := sorted(set(names) - set(runs)):
        parser.error(f"unknown runs: {', '.join(unknown)}; there are {', '.join(runs)}")
    for name in names:
        run_missing(name, runs[name], rows, figures, args.commit)
    sys.stdout.write(table(read_rows(rows)))


def run_missing(
    name: str,
    commands: Sequence[Sequence[str]],
    rows: Path,
    figures: Callable[[str], Row],
    commit: bool,
    status: int = 0,
) -> None:
    """Runs the commands of `name`, each to end with `status`, and appends its row, unless `rows`
    has it."""
    if name in {row["run"] for row in read_rows(rows)}:
        return
    began = time.monotonic()
    for command in commands:
        ended = subprocess.run(
            command, cwd=ROOT, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)}
        )
        if ended.returncode != status:
            sys.exit(
                f"error: {name} ended with status {ended.returncode}, expected {status}: "
                f"{' '.join(command)}"
            )
    head = subprocess.check_output(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True
    ).strip()
    row = {"run": name, "commit": head, "wall_s": round(time.monotonic() - began), **figures(name)}
    with rows.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    if commit:
        subprocess.run(["git", "add", str(rows)], cwd=ROOT, check=True)
        subprocess.run(
            ["git", "commit", "-qm", f"{rows.stem}: {name}", "--", str(rows)], cwd=ROOT, check=True
        )
