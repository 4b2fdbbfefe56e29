"""What processes of a failed run wrote is shown with the failure."""

from collections.abc import Generator
from pathlib import Path

import pytest

TAIL_LINES = 60
LOGS = ("logs/console.log", "stacks/*.txt")
"""Below a run folder: what engines and ranks wrote, and where they hung."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Adds the last lines of the logs below `tmp_path` to the report of a test that failed."""
    report = yield
    folder = getattr(item, "funcargs", {}).get("tmp_path")
    if report.failed and folder is not None:
        report.sections += [(str(path), tail(path)) for path in logs_below(folder)]
    return report


def logs_below(folder: Path) -> list[Path]:
    """The logs of all run folders below a folder."""
    return sorted(path for pattern in LOGS for path in folder.glob(f"**/{pattern}"))


def tail(path: Path) -> str:
    """The last lines of a text file."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(lines[-TAIL_LINES:])
