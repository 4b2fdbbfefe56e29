"""Compares the last validations of runs with that of the first one, question by question."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from search_r1.evaluation.report import comparison, last_validation
from search_r1.evaluation.summary import ALL, by_set, read_records
from search_r1.pages.records import step_of
from search_r1.trajectory import Record
from verl.utils.errors import DataError


class Comparison:
    """The comparison of some runs, made again when one of them was validated again."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self.folders = folders
        self.table: list[dict[str, Any]] = []
        """For each run but the first: `step`, `against` (the step of the first run), and `rows`,
        or a `problem`."""
        self._files: list[tuple[Path, int] | None] = []

    def poll(self) -> bool:
        """Compares the runs if there is something new; returns whether there was."""
        if len(self.folders) < 2:
            return False
        files = [file_of(folder) for folder in self.folders]
        if files == self._files:
            return False
        self._files = files
        first, *others = [None if file is None else file[0] for file in files]
        self.table = [compared(first, other) for other in others]
        return True


def file_of(folder: Path) -> tuple[Path, int] | None:
    """The last validation of a run, and when it was written; None before there is one."""
    try:
        path = last_validation(folder)
        return path, path.stat().st_mtime_ns
    except (DataError, OSError):
        return None


def compared(first: Path | None, other: Path | None) -> dict[str, Any]:
    """Compares two validations by set and over all questions."""
    if first is None or other is None:
        return {"problem": "not both have been validated yet"}
    steps = {"step": step_of(other)[1], "against": step_of(first)[1]}
    try:
        before, after = read_records(first), read_records(other)
        return {**steps, "rows": rows_of(before, after)}
    except DataError as error:
        return {**steps, "problem": str(error)}
    except (KeyError, ValueError, OSError) as error:
        return {**steps, "problem": f"cannot be read: {type(error).__name__}: {error}"}


def rows_of(before: Sequence[Record], after: Sequence[Record]) -> list[dict[str, Any]]:
    """The figures of each set, and of all questions where there are several sets.

    Raises DataError unless the questions are the same.
    """
    figures = {ALL: comparison(before, after)[1]}
    befores, afters = by_set(before), by_set(after)
    if len(befores) > 1:
        for name, records in befores.items():
            figures[name] = comparison(records, afters.get(name, []))[1]
    return [
        {
            **{key: found[key] for key in ("questions", "difference", "interval", "p")},
            "set": name,
            "gained": len(found["gained"]),
            "lost": len(found["lost"]),
        }
        for name, found in figures.items()
    ]
