"""What `VLLMServer` asks of an engine on a GPU, without one."""

import asyncio
from typing import Any

import pytest

from verl.rollout import vllm_server
from verl.rollout.vllm_server import VLLMServer
from verl.workers.config import ModelConfig, RolloutConfig

PICKLED = "VLLM_ALLOW_INSECURE_SERIALIZATION"
FLASHINFER = "VLLM_USE_FLASHINFER_SAMPLER"


def server(colocated: bool = True) -> VLLMServer:
    return VLLMServer(
        RolloutConfig(),
        ModelConfig(path="model"),
        max_model_len=64,
        device="cuda",
        colocated=colocated,
        replica_rank=0,
        num_replicas=1,
        visible_devices=["2", "3"],
    )


@pytest.fixture
def environ(monkeypatch):
    found: dict[str, str] = {}
    monkeypatch.setattr(vllm_server.os, "environ", found)
    return found


@pytest.mark.parametrize("colocated", [True, False])
def test_only_handles_of_shared_memory_travel_pickled(environ, colocated):
    arguments = server(colocated)._gpu_arguments()
    assert environ.get(PICKLED) == ("1" if colocated else None)
    assert arguments["weight_transfer_config"] == {"backend": "ipc" if colocated else "nccl"}
    assert environ["CUDA_VISIBLE_DEVICES"] == "2,3"


def test_flashinfer_is_off_unless_the_user_wants_it(environ):
    server()._gpu_arguments()
    assert environ[FLASHINFER] == "0"
    environ[FLASHINFER] = "1"
    server()._gpu_arguments()
    assert environ[FLASHINFER] == "1"


class Engine:
    """vLLM's rule: an update is finished before the next one is started."""

    def __init__(self) -> None:
        self.active = False

    async def start_weight_update(self) -> None:
        assert not self.active, "start_weight_update called while a weight update is already active"
        self.active = True

    async def finish_weight_update(self) -> None:
        assert self.active, "finish_weight_update called without a matching start_weight_update"
        self.active = False


def test_an_update_that_was_broken_off_is_ended_before_the_next():
    broken: Any = server()
    broken.engine = Engine()

    async def scene() -> None:
        for _ in range(2):
            await broken.start_weight_update()
            await broken.finish_weight_update()
        await broken.start_weight_update()
        await broken.start_weight_update()
        await broken.finish_weight_update()

    asyncio.run(scene())
    assert broken.engine.active is False and broken.updating is False
