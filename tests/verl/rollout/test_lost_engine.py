"""An engine is lost while weights travel: vLLM's own senders on gloo ranks, with stubs for what
only a GPU has.

No rank may be left in a collective, and the next transfer must bring all weights.
"""

import socket
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ray.exceptions import RayActorError
from transformers import Qwen2ForCausalLM
from vllm.distributed.utils import StatelessProcessGroup
from vllm.distributed.weight_transfer import ipc_engine, nccl_engine
from vllm.distributed.weight_transfer.packed_tensor import PackedIpcChunk, pack_tensors

from tests.distributed import run_ranks
from tests.models import make_tiny_qwen2
from verl.rollout import weight_sync
from verl.rollout.weight_sync import WeightSender, reserved_port
from verl.workers.config import FSDPConfig, ModelConfig
from verl.workers.fsdp_model import build_model

CHUNK_BYTES = 40_000
BUFFERS: dict[str, list[tuple[str, torch.Tensor]]] = {}
"""What would be in the sender's buffer on the GPU: the tensors of the present chunk."""


class Call:
    """A method of an engine's handle: `remote` answers at once, with an exception where it
    fails."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def remote(self, *args: Any) -> Any:
        try:
            return self.answer(*args)
        except RayActorError as error:
            return error


class StubEngine:
    """An engine's handle. It refuses a second update beside one, as vLLM's worker does, unless
    `VLLMServer` ends it."""

    def __init__(self, dies_at_chunk: int | None = None) -> None:
        self.dies_at_chunk = dies_at_chunk
        self.chunks = 0
        self.calls = []
        self.weights: dict[str, torch.Tensor] = {}

    def __getattr__(self, name: str) -> Call:
        return Call(getattr(self, f"on_{name}"))

    def on_init_weight_transfer_engine(self, info: dict[str, Any]) -> None:
        self.calls.append("init")

    def on_start_weight_update(self) -> None:
        self.calls.append("start")

    def on_update_weights(self, info: dict[str, Any]) -> None:
        self.chunks += 1
        self.calls.append("update")
        if self.chunks == self.dies_at_chunk:
            raise RayActorError
        self.weights |= dict(BUFFERS["0"])

    def on_finish_weight_update(self) -> None:
        self.calls.append("finish")


def get(answers: list[Any]) -> list[Any]:
    """What Ray's does: raises at the first exception."""
    for answer in answers:
        if isinstance(answer, Exception):
            raise answer
    return answers


def cpu_chunks(iterator: Iterator[Any], gpu_uuid: str, **_: Any) -> Iterator[PackedIpcChunk]:
    """vLLM's producer over CUDA IPC, with tensors of this process in place of the shared buffer."""
    while (
        chunk := pack_tensors(recorded(iterator, gpu_uuid), lambda item: item[1], CHUNK_BYTES)
    ) is not None:
        names = [str(dtype).removeprefix("torch.") for dtype in chunk.dtypes]
        yield PackedIpcChunk(chunk.names, chunk.shapes, names, chunk.tensor_sizes, {gpu_uuid: ()})


def recorded(iterator: Iterator[Any], gpu_uuid: str) -> Iterator[Any]:
    BUFFERS[gpu_uuid] = []
    for item in iterator:
        BUFFERS[gpu_uuid].append(item)
        yield item


def without_a_gpu() -> None:
    """Puts stubs in the place of what the senders ask of CUDA."""
    senders: Any = ipc_engine
    weight_sync.get = get
    properties = SimpleNamespace(uuid=str(dist.get_rank()))
    torch.accelerator.current_device_index = lambda: 0
    torch.cuda.get_device_properties = lambda index: properties  # pyright: ignore
    torch.cuda.synchronize = torch.cuda.ipc_collect = lambda *_: None
    senders.packed_ipc_producer = cpu_chunks


def policy(path: str) -> Any:
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))  # pyright: ignore
    return build_model(ModelConfig(path=path), "lm", FSDPConfig(dtype="float32"), mesh)


def failure_of(sender: WeightSender) -> str:
    """The name of what `send` raised, or nothing."""
    try:
        sender.send()
    except RayActorError as error:
        return type(error).__name__
    return ""


def over_ipc(path: str) -> tuple[str, str, list[str], dict[str, torch.Tensor]]:
    """What a rank saw of a transfer in which the second engine dies, and of the one that
    follows."""
    without_a_gpu()
    model = policy(path)
    living = StubEngine()
    dying = StubEngine(dies_at_chunk=2)
    first = failure_of(WeightSender(model, [living, dying], "cuda"))
    second = failure_of(WeightSender(model, [living, StubEngine()], "cuda"))
    return first, second, living.calls, living.weights


def expected_weights(path: Any) -> dict[str, torch.Tensor]:
    return dict(Qwen2ForCausalLM.from_pretrained(path).named_parameters())


def test_an_engine_lost_during_a_transfer_over_ipc_leaves_no_rank_behind(tmp_path):
    path = make_tiny_qwen2(tmp_path, tied=True, layers=1)
    (first, second, calls, weights), (other, nothing, none, _) = run_ranks(2, over_ipc, str(path))
    assert (first, second) == ("RayActorError", "") and (other, nothing, none) == ("", "", [])
    again = calls.index("init", 1)
    assert calls[:again] == ["init", "start", "update", "update"], (
        "nothing is sent once one is lost"
    )
    assert calls[again : again + 2] == ["init", "start"] and calls[-1] == "finish"
    for name, tensor in expected_weights(path).items():
        torch.testing.assert_close(weights[name], tensor)


class StubGroup:
    """vLLM's communicator: a broadcast returns when the engines have it, or never if one is
    gone."""

    def __init__(self) -> None:
        self.lost = threading.Event()
        self.destroyed = threading.Event()
        self.disabled = False
        self.sent: list[int] = []

    def broadcast(self, tensor: torch.Tensor, src: int) -> None:
        if self.disabled:
            return
        self.sent.append(tensor.numel())
        self.lost.set()
        assert self.destroyed.wait(60), "the broadcast was never broken off"

    def destroy(self) -> None:
        self.disabled = True
        self.destroyed.set()


def broadcast_chunks(
    iterator: Iterator[Any], group: StubGroup, post_iter_func: Any, src: int, **_: Any
) -> None:
    """vLLM's producer over NCCL, without its streams."""
    while (chunk := pack_tensors(iterator, post_iter_func, CHUNK_BYTES)) is not None:
        group.broadcast(chunk.packed_tensor, src)


class LostInBroadcast(StubEngine):
    """Dies while it receives, or before."""

    def __init__(self, group: StubGroup, before: bool) -> None:
        super().__init__()
        self.group = group
        self.before = before

    def on_start_weight_update(self) -> None:
        if self.before:
            raise RayActorError

    def on_update_weights(self, info: dict[str, Any]) -> None:
        assert self.group.lost.wait(60)
        raise RayActorError


def over_nccl(path: str) -> list[tuple[str, list[int]]]:
    """What a rank saw of transfers whose engine dies before or within, and the bytes of the
    broadcasts."""
    without_a_gpu()
    senders: Any = nccl_engine
    senders.packed_nccl_broadcast_producer = broadcast_chunks
    weight_sync.os.environ["MASTER_ADDR"] = "127.0.0.1"
    model = policy(path)
    seen = []
    for before in (True, False):
        group = StubGroup()
        senders.open_trainer_endpoint = lambda info, group=group: group
        sender = WeightSender(model, [LostInBroadcast(group, before)], "cuda", colocated=False)
        seen.append((failure_of(sender), group.sent))
        sender.close()
    return seen


def test_an_engine_lost_during_a_broadcast_leaves_no_rank_behind(tmp_path):
    path = make_tiny_qwen2(tmp_path, tied=True, layers=1)
    (before, within), others = run_ranks(2, over_nccl, str(path))
    assert before == ("RayActorError", []), "nobody is there to receive"
    assert within[0] == "RayActorError" and len(within[1]) == 1, "the rest is gathered, not sent"
    assert others == [("", []), ("", [])]


def test_a_reserved_port_is_free_for_vllm_alone():
    with reserved_port() as port:
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", port))
        group = StatelessProcessGroup.create("127.0.0.1", port, rank=0, world_size=1)
        assert group.broadcast_obj("here", src=0) == "here"
