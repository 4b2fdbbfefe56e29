"""GPUs that cannot be used are found before anything starts, each with its cause and cure."""

import os
import sysconfig
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from verl.trainer.config import PPOConfig, validate
from verl.trainer.driver import gpus_here
from verl.trainer.environment import device_problems
from verl.utils import device

CONFIGS = str(Path(__file__).resolve().parents[2] / "configs")


@pytest.fixture(autouse=True)
def bare(monkeypatch):
    """A machine without a GPU, in an environment for the CPU, that shows none to torch."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(device, "has_cuda_engine", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.fixture
def cuda_packages(monkeypatch):
    """An environment for GPUs."""
    monkeypatch.setattr(device, "has_cuda_engine", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")


@pytest.fixture
def node(tmp_path, monkeypatch):
    """Puts an nvidia-smi for two GPUs under a driver into PATH."""

    def install(driver: str) -> None:
        program = tmp_path / "nvidia-smi"
        listing = "GPU 0: NVIDIA H100 (UUID: GPU-a)\\nGPU 1: NVIDIA H100 (UUID: GPU-b)\\n"
        program.write_text(
            f'#!/bin/sh\ncase "$1" in -L) printf "{listing}" ;; '
            f'*) printf "{driver}\\n{driver}\\n" ;; esac\n'
        )
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    return install


def usable(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Lets torch see `count` GPUs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(device, "toolchain_problem", lambda: None)


def configured(*overrides: str) -> PPOConfig:
    with initialize_config_dir(CONFIGS, version_base=None):
        raw = OmegaConf.to_container(
            compose("grpo", ["trainer.n_gpus_per_node=2", *overrides]), resolve=True
        )
    return validate(raw)  # pyright: ignore[reportArgumentType]


def problems(*overrides: str) -> list[str]:
    config = configured(*overrides)
    return device_problems(config, gpus_here(config))


def test_a_machine_without_a_gpu_trains_on_the_cpu():
    assert configured().device == "cpu" and problems() == problems("trainer.device=cpu") == []


def test_a_gpu_is_never_left_idle_unasked(node):
    node("580.65.06")
    (problem,) = problems()
    assert problem.startswith("trainer.device=auto: torch") and "is a build for the CPU" in problem
    assert "SETUP_DEVICE=gpu" in problem and "trainer.device=cpu trains on the CPU" in problem
    assert problems("trainer.device=cpu") == []


@pytest.mark.parametrize("asked", ["auto", "cuda"])
def test_an_old_driver_is_named_with_the_one_that_is_needed(cuda_packages, node, asked):
    node("550.54.15")
    (problem,) = problems(f"trainer.device={asked}")
    assert (
        f"trainer.device={asked}: the NVIDIA driver is 550.54.15, and CUDA 13.0 needs 580"
        in problem
    )
    assert (
        "update the driver" in problem
        and "cuda-compat-13-0" in problem
        and "trainer.device=cpu" not in problem
    )


def test_packages_for_gpus_on_a_machine_without_one(cuda_packages):
    (problem,) = problems()
    assert (
        "nvidia-smi lists no GPU" in problem
        and "--gpus all" in problem
        and device.CPU_ENVIRONMENT in problem
    )
    (problem,) = problems("trainer.device=cpu")
    assert (
        "build for CUDA, which cannot run on the CPU" in problem
        and device.CPU_ENVIRONMENT in problem
    )


def test_hidden_gpus_are_told_from_absent_ones(cuda_packages, node, monkeypatch):
    node("580.65.06")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (problem,) = problems()
    assert "CUDA_VISIBLE_DEVICES='' hides the 2 GPU(s)" in problem


def test_torch_gives_the_reason_that_nothing_else_explains(cuda_packages, node, monkeypatch):
    def fail() -> None:
        raise RuntimeError("CUDA error: system not yet initialized\nmore")

    node("580.65.06")
    monkeypatch.setattr(torch.cuda, "init", fail)
    (problem,) = problems()
    assert problem.endswith("torch can use none: CUDA error: system not yet initialized")


def test_fewer_gpus_than_the_run_needs(cuda_packages, monkeypatch):
    usable(monkeypatch, 2)
    apart = ["actor_rollout_ref.hybrid_engine=false", "actor_rollout_ref.rollout.n_gpus_per_node=1"]
    assert (
        problems() == [] and "3 GPUs are asked for, and this machine shows 2" in problems(*apart)[0]
    )
    assert problems("trainer.n_gpus_per_node=8", "trainer.ray_address=auto") == [], (
        "a cluster has them"
    )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    (problem,) = problems("trainer.n_gpus_per_node=8")
    assert problem == (
        "trainer.n_gpus_per_node=8: 8 GPUs are asked for, and this machine shows 2 "
        "(CUDA_VISIBLE_DEVICES=0,1)"
    )


def test_what_triton_compiles_with(cuda_packages, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    (problem,) = problems()
    assert f"{tmp_path / 'Python.h'} is missing" in problem and "-dev" in problem
    (tmp_path / "Python.h").touch()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    (problem,) = problems()
    assert "no C compiler was found" in problem and "install gcc" in problem
