"""The counts of what there is to read, on a file counted by hand."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts" / "bench"))

TEXT = '''
"""A module."""
import os  # for nothing


def outer(first: Any, second: int, *rest: Any, third: "Any | None" = None):
    import json

    def inner(self):
        from os import path

    return [[1 for _ in range(2)] for _ in range(3)]
'''


def test_figures_of_a_file_counted_by_hand():
    import readability

    found = readability.figures({"verl/trainer/main_ppo.py": TEXT, "verl/x.py": "x = 1\n"})
    assert found["files"] == "2" and found["lines"] == "13"
    assert found["imports within functions"] == "2"
    assert found["imports within functions of verl/trainer/main_ppo.py"] == "2"
    assert found["comprehensions that hold another"] == "1"
    assert found["parameters that are bare `Any`"] == "50.0 %"
    assert found["nodes of the largest function"].endswith("(outer in verl/trainer/main_ppo.py)")
    assert found["lines over 100 characters"] == "0"
    assert readability.count_tokens("x = 1  # why\n\n") == 3


def test_the_table_has_a_column_for_each_package_of_each_revision(capsys):
    import readability

    sources = {"verl/x.py": "def g(): pass\n", "search_r1/y.py": "def f(a): pass\n"}
    rows = readability.table({"old": sources, "new": sources}).splitlines()
    assert rows[0] == "|  | verl, old | verl, new | search_r1, old | search_r1, new |"
    assert {row.count("|") for row in rows} == {6}


def test_a_revision_is_read_from_git():
    import readability

    try:
        sources = readability.of_revision("HEAD")
    except (FileNotFoundError, subprocess.CalledProcessError):
        pytest.skip("no Git, or no repository of it")
    assert "class DataProto" in sources["verl/protocol.py"]
    assert all(path.startswith(("verl/", "search_r1/")) for path in sources)
