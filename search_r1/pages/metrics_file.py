"""Follows `metrics.jsonl` of a run: reads only what is new, also after the file was replaced."""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from verl.utils.trackers import STEP

Row = dict[str, float | None]
STEP_SECONDS = "timing_s/step"
"""What every line of a training step has, and no line of a validation alone."""
DIGITS = 6
"""Significant digits of a number that a page gets."""
LARGEST = 2**53
"""Largest integer that a page can tell from the next."""
MOST_PROBLEMS = 50
"""Unreadable lines of a file that are kept, each with its reason."""
EXCERPT = 200


@dataclass(frozen=True)
class UnreadableLine:
    """A line of the file that is no line of metrics."""

    line: int
    """From 1."""
    reason: str
    excerpt: str
    """Its beginning."""


class MetricsFile:
    """The rows of a file of metrics, by step, as far as it was read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._forget()

    def _forget(self) -> None:
        """Begins anew, as if nothing had been read."""
        self.rows: dict[int, Row] = {}
        self.problems: list[UnreadableLine] = []
        self.num_problems = 0
        self.unfinished: UnreadableLine | None = None
        """The last line, while its end is missing: it is being written, or was cut off."""
        self._inode = 0
        self._offset = 0
        self._last_line = b""
        self._num_lines = 0

    def poll(self) -> int | None:
        """Reads what is new, and returns the first step whose row changed; None without one.

        A file that was replaced or became shorter is read from its beginning, and -1 is returned:
        all rows may have changed.
        """
        try:
            with self.path.open("rb") as file:
                status = os.fstat(file.fileno())
                is_other = status.st_ino != self._inode or not self._goes_on(file)
                had_rows = bool(self.rows)
                if is_other:
                    self._forget()
                    self._inode = status.st_ino
                file.seek(self._offset)
                changed = self._take(file.read())
        except FileNotFoundError:
            had_rows = bool(self.rows)
            self._forget()
            return -1 if had_rows else None
        return -1 if is_other and had_rows else changed

    def _goes_on(self, file: BinaryIO) -> bool:
        """Whether the last line that was read still stands where it stood.

        A file that was replaced twice may have the number of the first one.
        """
        file.seek(self._offset - len(self._last_line))
        return file.read(len(self._last_line)) == self._last_line

    def _take(self, new: bytes) -> int | None:
        """Reads the complete lines of `new`; the rest is read again with what follows it."""
        *lines, rest = new.split(b"\n")
        self._offset += len(new) - len(rest)
        if lines:
            self._last_line = lines[-1] + b"\n"
        changed = [self._add(line) for line in lines]
        self.unfinished = None
        if rest.strip():
            reason = "its end is missing: it is being written, or was cut off"
            self.unfinished = UnreadableLine(self._num_lines + 1, reason, beginning_of(rest))
        return min((step for step in changed if step is not None), default=None)

    def _add(self, line: bytes) -> int | None:
        """Adds a line to the rows; returns its step, None if it is none."""
        self._num_lines += 1
        if not line.strip():
            return None
        try:
            row = row_of(line)
        except ValueError as error:
            self.num_problems += 1
            if len(self.problems) < MOST_PROBLEMS:
                found = UnreadableLine(self._num_lines, str(error), beginning_of(line))
                self.problems.append(found)
            return None
        step = int(row.pop(STEP) or 0)
        merge(self.rows, step, row)
        return step


def row_of(line: bytes) -> Row:
    """The numbers of a line of metrics. Raises ValueError for anything else.

    What is no number is left out; a number that is not finite becomes None.
    """
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"no metrics by name but a {type(values).__name__}")
    step = values.get(STEP)
    if type(step) is not int or step < 0:
        raise ValueError(f"{STEP} is {step!r}, expected the number of a step")
    return {
        str(name): number_of(value)
        for name, value in values.items()
        if value is None or (isinstance(value, int | float) and not isinstance(value, bool))
    }


def number_of(value: float | None) -> float | None:
    """A number with few digits; integers stay whole."""
    if value is None or isinstance(value, int):
        return value if value is None or abs(value) <= LARGEST else None
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None


def merge(rows: dict[int, Row], step: int, row: Row) -> None:
    """Adds a row to the rows by step, which stay in ascending order.

    Of what is written twice the later counts: a step that is trained again takes the place of the
    row that it had, and of all rows behind it, which the run has given up. A validation that ended
    after its step is added to the row of that step.
    """
    is_last = not rows or step > next(reversed(rows))
    if not is_last and STEP_SECONDS in row:
        later_steps = [later for later in rows if later >= step]
        if any(STEP_SECONDS in rows[later] for later in later_steps):
            for later in later_steps:
                del rows[later]
    rows[step] = {**rows.get(step, {}), **row}
    if not is_last:
        ordered = sorted(rows.items())
        rows.clear()
        rows.update(ordered)


def beginning_of(line: bytes) -> str:
    """The beginning of a line as text."""
    return line[:EXCERPT].decode("utf-8", errors="replace")


def trained(rows: dict[int, Row]) -> list[Row]:
    """The rows of training steps, in their order."""
    return [row for row in rows.values() if row.get(STEP_SECONDS) is not None]


def newest(rows: dict[int, Row], name: str) -> Any:
    """The newest value of a metric; None if no row has it."""
    values = (row[name] for row in reversed(rows.values()) if row.get(name) is not None)
    return next(values, None)
