"""The start of Ray."""

import os
from types import SimpleNamespace

import pytest
import ray

from tests.configs import composed
from verl.trainer.config import validate
from verl.trainer.preparation import NICENESS, RAY_STARTS, start_ray


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


@pytest.mark.parametrize(("failures", "starts"), [(0, 1), (2, 3)])
def test_a_ray_that_a_busy_machine_starts_too_slowly_is_started_again(
    monkeypatch, failures, starts
):
    tried = []

    def init(**settings):
        tried.append(settings["address"])
        if len(tried) <= failures:
            raise RuntimeError("The current node timed out during startup. This could happen")

    monkeypatch.setattr("ray.init", init)
    start_ray(local())
    assert tried == ["local"] * starts


@pytest.mark.parametrize(
    ("address", "message", "starts"),
    [
        (None, "timed out during startup", RAY_STARTS),
        (None, "no such folder", 1),
        ("10.0.0.1:6379", "timed out during startup", 1),
    ],
)
def test_a_ray_that_does_not_start_says_why(monkeypatch, address, message, starts):
    tried = []

    def init(**settings):
        tried.append(settings)
        raise RuntimeError(message)

    monkeypatch.setattr("ray.init", init)
    with pytest.raises(RuntimeError, match=message):
        start_ray(local(address))
    assert len(tried) == starts


def local(address=None):
    return SimpleNamespace(trainer=SimpleNamespace(ray_address=address))
