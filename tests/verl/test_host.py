"""What a machine lacks is found before the start, with its cure."""

import errno
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.models import make_tiny_qwen2
from verl.rollout.weight_sync import MEMORY_FILES, own_prefix
from verl.trainer.host import (
    ENGINE_SOCKET,
    RAY_SOCKET,
    SOCKET_PATH_BYTES,
    folder_problems,
    host_problems,
    run_folder_problems,
    shared_memory_problems,
    socket_problems,
    weight_problems,
    write_problem,
)
from verl.workers.config import ModelConfig


@pytest.fixture
def config(tmp_path, monkeypatch):
    """A machine that has everything: the config of a run on it."""
    for name in (
        "RAY_TMPDIR",
        "TMPDIR",
        "HF_HOME",
        "HF_HUB_CACHE",
        "VLLM_CACHE_ROOT",
        "TRITON_CACHE_DIR",
    ):
        monkeypatch.delenv(name, raising=False)
    make_tiny_qwen2(tmp_path / "model")
    rollout = SimpleNamespace(name="vllm", num_replicas=None)
    config = SimpleNamespace(
        actor_rollout_ref=SimpleNamespace(
            model=ModelConfig(path=str(tmp_path / "model")), rollout=rollout
        ),
        device="cpu",
        num_gpus=1,
    )
    return config


def test_a_machine_that_has_everything(config):
    assert host_problems(config) == []


@pytest.mark.parametrize(
    ("variable", "name"), [("RAY_TMPDIR", RAY_SOCKET), ("TMPDIR", ENGINE_SOCKET)]
)
def test_temporary_folders_leave_room_for_sockets(config, monkeypatch, tmp_path, variable, name):
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    longest = "/tmp/" + "x" * (SOCKET_PATH_BYTES - len("/tmp/") - len(name))
    monkeypatch.setenv(variable, longest)
    assert socket_problems() == []
    monkeypatch.setenv(variable, f"{longest}x")
    (problem,) = socket_problems()
    assert problem.startswith(f"{variable}={longest}x: ")
    assert f"108 bytes, and 107 is the most: set {variable}" in problem


def test_a_long_folder_of_temporary_files_is_rays_too(config, monkeypatch):
    monkeypatch.setenv("TMPDIR", "/scratch/" + "x" * 90)
    assert [problem.partition("would")[0].split()[-1] for problem in socket_problems()] == [
        "Ray",
        "vLLM",
    ]


@pytest.mark.parametrize(
    ("variable", "cure"),
    [("RAY_TMPDIR", "set RAY_TMPDIR"), ("TMPDIR", "set TMPDIR"), ("HF_HOME", "set HF_HOME")],
)
def test_folders_that_cannot_be_written_are_named(config, monkeypatch, variable, cure):
    """/proc refuses new files to everybody."""
    config.actor_rollout_ref.model = ModelConfig(path="org/a-model-that-is-not-here")
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    monkeypatch.setenv("HF_HUB_CACHE", "/tmp")
    if variable == "HF_HOME":
        monkeypatch.delenv("HF_HUB_CACHE")
    monkeypatch.setenv(variable, "/proc/x")
    (problem,) = folder_problems(config)
    assert "/proc/x" in problem and "cannot be written" in problem and cure in problem


def test_a_run_folder_below_a_file(tmp_path):
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "run"
    (problem,) = run_folder_problems(str(folder))
    assert problem == (
        f"trainer.default_local_dir={folder} cannot be written (Not a directory): name another "
        "folder"
    )
    assert run_folder_problems(str(tmp_path / "runs" / "a")) == []


def test_a_full_disk_does_not_keep_a_run_from_going_on(tmp_path, monkeypatch):
    def full(**_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    assert run_folder_problems(str(tmp_path)) == []
    assert write_problem(tmp_path) == "cannot be written (No space left on device)"


def test_what_killed_processes_left_in_memory_makes_room_first(config):
    left = Path(MEMORY_FILES, f"{own_prefix()}999999999-left")
    left.mkdir()
    weight_problems(config)
    assert not left.exists()


def test_caches_of_compiled_code_matter_on_a_gpu(config, monkeypatch):
    monkeypatch.setenv("VLLM_CACHE_ROOT", "/proc/x")
    monkeypatch.setenv("TRITON_CACHE_DIR", "/proc/y")
    assert host_problems(config) == []
    config.device = "cuda"
    assert [problem.rpartition(": ")[2] for problem in host_problems(config)] == [
        "set VLLM_CACHE_ROOT",
        "set TRITON_CACHE_DIR",
    ]


def test_nothing_is_left_where_something_was_tried(tmp_path):
    assert write_problem(tmp_path / "a" / "b") is None and not list(tmp_path.iterdir())


def test_weights_on_their_way_need_memory_files(config, monkeypatch):
    state = os.statvfs("/dev/shm")
    assert weight_problems(config) == []
    config.actor_rollout_ref.rollout.num_replicas = state.f_bavail * state.f_frsize
    (problem,) = weight_problems(config)
    assert problem.startswith("/dev/shm has ") and "--shm-size" in problem


def test_the_message_says_how_much_is_missing():
    (problem,) = shared_memory_problems("/dev/shm", 2**60, "they take")
    assert (
        "they take 1,099,511,627,776: " in problem
        and shared_memory_problems("/dev/shm", 1, "") == []
    )
