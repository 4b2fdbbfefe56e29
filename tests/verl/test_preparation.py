"""The start of Ray."""

import os

import ray

from tests.configs import composed
from verl.trainer.config import validate
from verl.trainer.preparation import NICENESS, start_ray


def niceness() -> int:
    return os.getpriority(os.PRIO_PROCESS, 0)


def test_processes_of_a_run_are_as_important_as_its_driver(monkeypatch):
    monkeypatch.delenv(NICENESS, raising=False)
    start_ray(validate(composed("grpo", "experiment=closed_world/grpo")))
    try:
        remote = ray.remote(num_cpus=0)(niceness)
        assert ray.get(remote.remote()) == niceness()
    finally:
        ray.shutdown()
