"""The container files copy what exists, and keep the layer of the packages when code changes."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cpu"])
def test_what_is_copied_is_there_and_packages_come_before_the_code(name):
    text = (ROOT / name).read_text()
    copies = [line.split()[2:-1] for line in text.splitlines() if line.startswith("COPY")]
    missing = [path for paths in copies for path in paths if not (ROOT / path).exists()]
    assert not missing and copies[-1] == ["."]
    # scripts/setup.sh asks verl.utils.device, and importing it runs verl/__init__.py
    assert {"setup.py", "verl/__init__.py", "verl/namesake.py"} <= {p for c in copies for p in c}
    before, after = re.split(r"^RUN .*bash scripts/setup\.sh.*$", text, flags=re.MULTILINE)
    assert (
        "COPY --chown=search:search . ." in after and "COPY --chown=search:search . ." not in before
    )
    assert re.search(r"^USER 1000", before, re.MULTILINE), (
        "packages and runs belong to a plain user"
    )
