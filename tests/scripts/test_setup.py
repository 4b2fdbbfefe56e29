"""What scripts/setup.sh finds out before it installs anything, and what it leaves as it is."""

import hashlib
import os
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests import conftest
from verl.utils.device import has_cuda_engine

ROOT = Path(__file__).resolve().parents[2]
SETUP = ROOT / "scripts" / "setup.sh"
DEVICE = "gpu" if has_cuda_engine() else "cpu"


def run(command: list[str], **env: str) -> tuple[int, str]:
    """Exit status and output; no environment is active unless `env` names one."""
    outer = {
        k: v
        for k, v in os.environ.items()
        if k not in ("VIRTUAL_ENV", "CONDA_PREFIX", "SETUP_EXTRA")
    }
    done = subprocess.run(
        command,
        env=outer | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stdout


def setup(folder: Path, *extras: str, **env: str) -> tuple[int, str]:
    return run(
        ["bash", str(SETUP), *extras],
        **{"SETUP_VENV": str(folder / "venv"), "SETUP_DEVICE": DEVICE, **env},
    )


def test_the_pins_for_gpus_are_those_that_were_installed():
    """Whoever changes them runs `bash scripts/bench/gpu_install.sh` and records what it says."""
    digest = hashlib.sha256((ROOT / "scripts/constraints-gpu.txt").read_bytes()).hexdigest()[:16]
    assert f"| {digest} |" in (ROOT / "docs/results/gpu_install.md").read_text()


def test_unknown_extras_and_devices_are_named(tmp_path):
    assert setup(tmp_path, "denser")[1] == (
        "setup: 'denser' is no extra; there are dense, dense-gpu, lucene, web, hub, mcp, "
        "tensorboard, mlflow, trackio, swanlab and dev\n"
    )
    assert "SETUP_DEVICE=tpu: gpu or cpu" in setup(tmp_path, SETUP_DEVICE="tpu")[1]


def test_an_active_environment_that_fits_is_used(tmp_path):
    status, output = setup(tmp_path, "hub", "lucene", VIRTUAL_ENV=sys.prefix)
    assert status == 0 and output.strip().endswith(f"{sys.prefix}/bin/python"), output
    assert not (tmp_path / "venv").exists()


def test_what_a_script_that_sources_it_was_given_are_no_extras(tmp_path):
    script = tmp_path / "train.sh"
    script.write_text(f'source {SETUP}\necho "with $PYTHON"\n')
    status, output = run(
        ["bash", str(script), "trainer.seed=1"],
        SETUP_VENV=str(tmp_path / "venv"),
        SETUP_DEVICE=DEVICE,
        SETUP_EXTRA="hub lucene",
        VIRTUAL_ENV=sys.prefix,
    )
    assert status == 0 and f"with {sys.prefix}/bin/python" in output, output


def test_builds_for_cpu_and_gpu_are_never_mixed_in_one_folder(tmp_path):
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv" / ".stamp-cpu").touch()
    status, output = setup(tmp_path, SETUP_DEVICE="gpu")
    assert (
        status == 1
        and "was made for cpu, and gpu is wanted: remove it, or name another folder" in output
    )


def test_an_environment_for_gpus_needs_pythons_headers(tmp_path):
    """Found before 9 GB are downloaded."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sysconfig\n"
        "paths = sysconfig.get_paths\n"
        "sysconfig.get_paths = lambda *args, **kwargs: {**paths(*args, **kwargs), 'include': "
        "'/none'}\n"
    )
    status, output = setup(tmp_path, SETUP_DEVICE="gpu", PYTHONPATH=str(tmp_path))
    assert status == 1 and "/none/Python.h is missing" in output and "-dev" in output, output
    assert not (tmp_path / "venv").exists()


@pytest.mark.parametrize(
    ("extras", "status", "message"),
    [
        (["train", "dense", "hub"], 0, ""),
        (["cpu" if DEVICE == "gpu" else "gpu"], 1, "vllm.* is not installed"),
        (
            ["dense-tpu"],
            2,
            "dense-tpu is no extra of the project; there are retrieval, dense, dense-gpu",
        ),
    ],
)
def test_the_requirements_of_an_extra_are_compared_with_what_is_installed(extras, status, message):
    found, output = run([sys.executable, str(ROOT / "scripts" / "requirements_met.py"), *extras])
    assert found == status and re.match(message, output), output


@pytest.mark.parametrize("marks", [(), ("cpu_engine",)])
def test_tests_with_engines_on_the_cpu_are_left_out_of_an_environment_for_gpus(monkeypatch, marks):
    item: Any = SimpleNamespace(get_closest_marker=lambda name: name in marks)
    monkeypatch.setattr(conftest, "has_cuda_engine", lambda: True)
    with (
        pytest.raises(pytest.skip.Exception, match="no engine on the CPU")
        if marks
        else nullcontext()
    ):
        conftest.pytest_runtest_setup(item)
