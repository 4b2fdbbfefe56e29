"""The names of docs/metrics.md as patterns: what a run writes must stand there."""

import re
from collections.abc import Iterable
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "metrics.md"
PLACEHOLDER = re.compile(r"[A-Z]{3,}")


def documented() -> list[re.Pattern[str]]:
    """A pattern for each name in the first column of the tables; a bare last part (`max`) repeats
    the one before."""
    patterns: list[re.Pattern[str]] = []
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if not line.startswith("| `"):
            continue
        cell = line.split(" | ")[0]
        group = ""
        for name in re.findall(r"`([^`]+)`", cell):
            if "/" in name:
                group = name.rsplit("/", 1)[0]
            else:
                name = f"{group}/{name}"
            patterns.append(re.compile(PLACEHOLDER.sub(".+", name)))
    return patterns


def undocumented(names: Iterable[str]) -> list[str]:
    """Those that no line of the page names."""
    patterns = documented()
    return sorted(
        name for name in names if not any(pattern.fullmatch(name) for pattern in patterns)
    )
