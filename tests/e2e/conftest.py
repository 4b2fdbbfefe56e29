"""What processes of a failed run wrote is shown with the failure."""

from collections.abc import Generator

import pytest

from tests.e2e.runs import tails_of_logs


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Adds the last lines of the logs below `tmp_path` to the report of a test that failed."""
    report = yield
    folder = getattr(item, "funcargs", {}).get("tmp_path")
    if report.failed and folder is not None:
        report.sections += tails_of_logs(folder).items()
    return report
