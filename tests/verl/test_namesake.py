"""PyPI's `verl` beside this one is named once, and what is like it is not."""

import subprocess
import sys

from verl.namesake import namesake
from verl.utils.places import root


def test_only_that_distribution_counts(tmp_path):
    for name in ("verl_x-1.0.dist-info", "search_r1-0.1.0.dist-info", "verl", "verl-0.7-more"):
        (tmp_path / name).mkdir()
    assert namesake(["/nowhere", str(tmp_path)]) is None
    (tmp_path / "verl-0.7.0.dist-info").mkdir()
    assert namesake([str(tmp_path)]) == str(tmp_path / "verl-0.7.0.dist-info")


def test_the_import_warns_once_for_all_processes_of_a_run(tmp_path):
    (tmp_path / "verl-0.7.0.dist-info").mkdir()
    code = "import verl, subprocess, sys; subprocess.run([sys.executable, '-c', 'import verl'])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": f"{root()}:{tmp_path}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr.count("PyPI's verl is installed too") == 1
    assert "pip uninstall verl" in done.stderr
