"""The table of docs/metrics.md: what a run writes must stand there."""

import re
from collections.abc import Iterable
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "metrics.md"
PLACEHOLDER = re.compile(r"[A-Z]{3,}")
COLUMNS = ["metric", "unit", "what it is", "healthy", "sick"]


def rows() -> list[dict[str, str]]:
    """The rows of all tables by column. Raises ValueError for one with another number of cells."""
    found = []
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("| `"):
            cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
            found.append(dict(zip(COLUMNS, cells, strict=True)))
    return found


def names_of(cell: str) -> list[str]:
    """The names in the first cell of a row.

    A bare last part repeats the rest of the name before it.

    >>> names_of("`critic/score/mean`, `max`")
    ['critic/score/mean', 'critic/score/max']
    """
    names: list[str] = []
    group = ""
    for name in re.findall(r"`([^`]+)`", cell):
        if "/" in name:
            group = name.rsplit("/", 1)[0]
            names.append(name)
        else:
            names.append(f"{group}/{name}")
    return names


def documented() -> list[re.Pattern[str]]:
    """A pattern for each name in the first column."""
    names = [name for row in rows() for name in names_of(row["metric"])]
    return [re.compile(PLACEHOLDER.sub(".+", name)) for name in names]


def undocumented(names: Iterable[str]) -> list[str]:
    """Those that no line of the page names."""
    patterns = documented()
    return sorted(
        name for name in names if not any(pattern.fullmatch(name) for pattern in patterns)
    )
