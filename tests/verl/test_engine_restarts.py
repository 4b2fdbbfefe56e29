"""The driver's order of calls when engines die: memory first, all of a broken NCCL group, none left
asleep."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError

from verl.rollout import manager as module
from verl.rollout.manager import RolloutManager, sleep_level
from verl.single_controller.worker_group import WorkerLost
from verl.workers.config import RolloutConfig

Log = list[str]


class Engine:
    """An engine's handle: notes its calls, and fails them once it is dead."""

    def __init__(self, name: str, log: Log) -> None:
        self.name = name
        self.log = log
        self.dead = False

    def __getattr__(self, method: str) -> Any:
        def remote(*args: Any) -> Any:
            text = " ".join([self.name, method, *(str(arg) for arg in args)])
            if method != "wait_for_death":
                self.log.append(text)
            return self if method == "wait_for_death" else RayActorError() if self.dead else text

        return SimpleNamespace(remote=remote)


class Actor:
    """The trainer's side; a transfer kills the engines of `kills` when its turn comes."""

    def __init__(self, log: Log) -> None:
        self.log = log
        self.kills = []

    def connect_engines(self, name: str, servers: Sequence[Engine], colocated: bool) -> None:
        self.log.append("actor connect " + " ".join(server.name for server in servers))

    def free_cached_memory(self) -> None:
        self.log.append("actor free")

    def send_weights(self, name: str) -> None:
        self.log.append("actor send")
        for engine in self.kills:
            engine.dead = True
        if self.kills:
            self.kills = []
            raise RayActorError


def get(refs: Any) -> Any:
    for ref in refs if isinstance(refs, list) else [refs]:
        if isinstance(ref, Exception):
            raise ref
    return refs


@pytest.fixture
def make(monkeypatch):
    """Makes a manager of two engines, `a0` and `b0`; those that take their places are `a1`, `b1`
    and so on."""
    monkeypatch.setattr(module, "get", get)
    monkeypatch.setattr(module, "kill", lambda handle: handle.log.append(f"{handle.name} kill"))
    monkeypatch.setattr(
        module, "first_ready", lambda refs, timeout_s=None: 0 if refs[0].dead else None
    )

    def build(colocated: bool) -> Any:
        manager: Any = object.__new__(RolloutManager)
        manager.log = log = []
        manager.device = "cuda"
        manager.colocated = colocated
        manager.sleeps = colocated
        manager.sleep_level = sleep_level(RolloutConfig())
        manager.name = "rollout"
        manager.replicas = 2
        manager.restarts = 0
        manager.workers = []
        manager.servers = [Engine(name, log) for name in ("a0", "b0")]
        manager.lifelines = list(manager.servers)
        manager.actor = Actor(log)
        manager._spawn_server = lambda rank: Engine(f"{'ab'[rank]}{manager.restarts}", log)
        return manager

    return build


def test_a_draft_model_which_no_transfer_brings_is_kept_through_sleep():
    speculative = {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3}}
    assert sleep_level(RolloutConfig()) == 2
    assert sleep_level(RolloutConfig(engine_kwargs=speculative)) == 1


def test_a_dead_engine_is_started_once_the_trainer_has_let_go_of_the_gpu(make):
    manager = make(colocated=True)
    manager.servers[1].dead = True
    manager.update_weights(5)
    assert manager.log == [
        "b0 kill",
        "actor free",
        "b1 start",
        "b1 begin_weight_update",
        "b1 sleep 2",
        "actor connect a0 b1",
        "actor free",
        "a0 wake_up ['weights']",
        "b1 wake_up ['weights']",
        "a0 begin_weight_update",
        "b1 begin_weight_update",
        "actor send",
        "actor free",
        "a0 wake_up ['kv_cache']",
        "b1 wake_up ['kv_cache']",
        "a0 finish_weight_update_and_resume 5",
        "b1 finish_weight_update_and_resume 5",
    ]


def test_of_engines_that_share_gpus_only_the_dead_one_is_replaced(make):
    manager = make(colocated=True)
    manager.actor.kills = [manager.servers[1]]
    manager.update_weights(5)
    assert [server.name for server in manager.servers] == ["a0", "b1"]
    restarted = manager.log[manager.log.index("b0 kill") :]
    assert restarted[:3] == ["b0 kill", "actor free", "b1 start"]
    assert manager.log.count("actor send") == 2


def test_a_broadcast_that_lost_an_engine_costs_all_of_its_group(make):
    manager = make(colocated=False)
    manager.actor.kills = [manager.servers[1]]
    manager.update_weights(5)
    assert [server.name for server in manager.servers] == ["a1", "b1"] and manager.restarts == 1
    assert "actor free" not in manager.log, "they have GPUs of their own"
    assert manager.log.count("actor connect a1 b1") == 1 and manager.log.count("actor send") == 2


def test_an_engine_lost_before_the_broadcast_costs_itself(make):
    manager = make(colocated=False)
    manager.servers[0].dead = True
    manager.update_weights(5)
    assert [server.name for server in manager.servers] == ["a1", "b0"]


def test_an_engine_that_died_before_it_could_sleep_does_not_end_the_run(make):
    manager = make(colocated=True)
    manager.servers[0].dead = True
    manager.sleep()
    assert manager.log == ["a0 sleep 2", "b0 sleep 2"]


def test_an_engine_that_dies_while_another_is_replaced_ends_the_attempt(make, monkeypatch):
    manager = make(colocated=True)
    manager.servers[1].dead = True

    def connect(*_: Any) -> None:
        raise RayActorError

    monkeypatch.setattr(manager.actor, "connect_engines", connect)
    with pytest.raises(WorkerLost, match="could not be started again"):
        manager.update_weights(5)
