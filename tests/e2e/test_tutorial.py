"""The tutorial, done literally: its commands, in their order, in a fresh copy of the repository.

What differs from what a reader does: no environment is installed, because the one that runs the
tests is active and fits. `.venv/bin` of the copy leads to it, with a `search-r1` that takes the
sources of the copy.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from search_r1.launch import free_port
from tests.e2e.runs import ROOT

pytestmark = pytest.mark.cpu_engine

PAGE = ROOT / "docs" / "tutorial.md"
ACTIVATE = 'export PATH="{bin}:{prefix}/bin:$PATH" PYTHONPATH="{root}"\n'
COMMAND = '#!/bin/sh\nexec {python} -P -m search_r1.cli "$@"\n'


def commands() -> str:
    """All blocks of the page that are meant to be run, as one script."""
    return "".join(re.findall(r"^```bash\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE))


def fresh_copy(folder: Path) -> Path:
    """Copies what Git would give a user, with the changes that are not committed yet."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    programs = folder / ".venv" / "bin"
    programs.mkdir(parents=True)
    text = ACTIVATE.format(bin=programs, prefix=sys.prefix, root=folder)
    (programs / "activate").write_text(text)
    (programs / "search-r1").write_text(COMMAND.format(python=sys.executable))
    (programs / "search-r1").chmod(0o755)
    return folder


def run(script: str, folder: Path, **env: str) -> tuple[int, str]:
    """Exit status and output of a script; whatever it has started is ended with it."""
    outer = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    log = folder / "tutorial.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            ["bash", "-c", f"set -euxo pipefail\n{script}"],
            cwd=folder,
            env={**outer, "VIRTUAL_ENV": sys.prefix, **env},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(timeout=1800)
        except subprocess.TimeoutExpired:
            status = -1
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return status, log.read_text()


def metrics(folder: Path, name: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "runs" / name / "metrics.jsonl").open()]


def test_the_tutorial_works_in_a_fresh_clone(tmp_path):
    folder = fresh_copy(tmp_path / "clone")
    status, output = run(commands(), folder, PORT=str(free_port()))
    assert status == 0, output[-5000:]

    first = metrics(folder, "first")
    assert [line["training/global_step"] for line in first] == [0, 1, 2, 3]
    assert "| all | 100 |" in (folder / "runs/first/report.md").read_text()
    assert (folder / "runs/first/viewer.html").stat().st_size > 100_000
    assert list((folder / "runs/evaluate-first").glob("*.html"))
    assert "<answer>" in output.split("Where does Fenmiv live?")[-1]

    assert "reward/further" in metrics(folder, "my_reward")[-1]

    (answer,) = [line for line in output.splitlines() if line.startswith('{"result"')]
    assert "Rubdut inhabits Vezpek" in answer
    (before, *_, after) = metrics(folder, "mine")
    assert before["training/global_step"] == 0 and after["training/global_step"] == 2
    assert after["env/number_of_valid_search"] > 0 and after["rollout/failed"] == 0
