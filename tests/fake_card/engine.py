"""A vLLM engine that computes nothing, keeps vLLM's order of calls and counts memory.

`VLLMServer` builds it in the place of `AsyncLLM`. Each of its processes receives weights through
vLLM's own `IPCWeightTransferEngine` or packed NCCL consumer; only CUDA IPC and NCCL themselves are
replaced.
"""

import inspect
import os
import queue
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

from ray.exceptions import RayActorError

from tests.fake_card.card import GIB, Memory

UUID = "GPU-{}"
KV_CACHE = "kv_cache"
WEIGHTS = "weights"


class Refused(AssertionError):
    """What vLLM would refuse, or answer wrongly."""


class Engines:
    """What all engines of a rehearsal share: the cards, the log, and the wire in place of NCCL."""

    def __init__(self, memories: list[Memory], weight_bytes: int, log: Callable[..., None]) -> None:
        self.memories = memories
        self.weight_bytes = weight_bytes
        self.log = log
        self.gpu = 0
        """The card of the process that is asked for its properties."""
        self.made = 0
        self.dies_at: tuple[int, str] | None = None
        """Place of an engine and the call at which it dies."""
        self.received: dict[str, list[tuple[str, tuple[int, ...], str]]] = {}
        """By process what arrived in the last transfer."""
        self.broadcast: dict[int, queue.Queue[Any]] = {}

    def from_engine_args(self, args: Any) -> "StubEngine":
        """As `AsyncLLM.from_engine_args`."""
        return StubEngine(self, args)


class StubEngine:
    """One replica over `tensor_parallel_size` cards."""

    def __init__(self, engines: Engines, args: Any) -> None:
        self.shared = engines
        self.args = args
        self.gpus = [int(gpu) for gpu in os.environ["CUDA_VISIBLE_DEVICES"].split(",")]
        assert len(self.gpus) == args.tensor_parallel_size
        self.name = f"engine {self.gpus[0]}"
        self.asleep: set[str] = set()
        self.paused = False
        self.updating = False
        self.current = args.load_format != "dummy"
        share = args.gpu_memory_utilization
        for gpu in self.gpus:
            memory = engines.memories[gpu]
            if (
                memory.free + memory.contexts < share * memory.total
            ):  # vllm/v1/worker/utils.py, request_memory
                raise Refused(
                    f"{self.name}: {memory.free / GIB:.1f} GiB free at its start, {share} of the "
                    "card wanted"
                )
            memory.engine = {}
            memory.take(WEIGHTS, self.weights)
            memory.take(KV_CACHE, int(share * memory.total) - self.weights)
        self.log("start")

    @property
    def weights(self) -> int:
        return self.shared.weight_bytes // len(self.gpus)

    def log(self, what: str) -> None:
        self.shared.log(self.name, what)
        if self.shared.dies_at == (self.gpus[0], what):
            self.shared.dies_at = None
            for gpu in self.gpus:
                self.shared.memories[gpu].engine = {}
            raise RayActorError

    async def collective_rpc(
        self, method: str, timeout: Any = None, args: Any = (), kwargs: Any = None
    ) -> list[Any]:
        assert method == "follow"
        return [os.getpid() for _ in self.gpus]

    async def generate(
        self, prompt: Any, sampling_params: Any, request_id: str
    ) -> AsyncIterator[Any]:
        if self.asleep or self.paused or not self.current:
            raise Refused(
                f"{self.name}: generate, asleep {self.asleep}, paused {self.paused}, new "
                f"{self.current}"
            )
        ids = [7] * sampling_params.max_tokens
        logprobs = [{7: SimpleNamespace(logprob=-1.0)} for _ in ids]
        out = SimpleNamespace(
            token_ids=ids, logprobs=logprobs, finish_reason="length", stop_reason=None
        )
        yield SimpleNamespace(outputs=[out], prompt_token_ids=prompt["prompt_token_ids"])

    async def pause_generation(self, *, mode: str = "abort", clear_cache: bool = True) -> None:
        self.log("pause")
        self.paused = True

    async def resume_generation(self) -> None:
        self.log("resume")
        if self.asleep:
            raise Refused(f"{self.name}: resumed while {self.asleep} sleep")
        self.paused = False

    async def reset_prefix_cache(self) -> bool:
        self.log("reset_prefix_cache")
        return True

    async def sleep(self, level: int = 1) -> None:
        self.log(f"sleep {level}")
        if not self.args.enable_sleep_mode:
            raise Refused("sleep mode is not enabled")
        if WEIGHTS in self.asleep:
            return
        for gpu in self.gpus:
            for tag in {WEIGHTS, KV_CACHE} - self.asleep:
                self.shared.memories[gpu].give(tag)
        self.asleep = {WEIGHTS, KV_CACHE}
        self.paused = True
        self.current = self.current and level == 1

    async def wake_up(self, tags: list[str] | None = None) -> bool:
        """Wakes what sleeps under these tags.

        Tags that do not sleep only warn; the scheduler goes on when nothing sleeps any more
        (v1/engine/core.py).
        """
        tags = tags or [WEIGHTS, KV_CACHE]
        self.log(f"wake {'+'.join(tags)}")
        if set(tags) <= self.asleep:
            for gpu in self.gpus:
                for tag in tags:
                    whole = int(self.args.gpu_memory_utilization * self.shared.memories[gpu].total)
                    self.shared.memories[gpu].take(
                        tag, self.weights if tag == WEIGHTS else whole - self.weights
                    )
            self.asleep -= set(tags)
        if not self.asleep:
            self.paused = False
        return not self.asleep

    async def init_weight_transfer_engine(self, request: Any) -> None:
        self.log("init_transfer")
        backend = self.args.weight_transfer_config
        backend = backend["backend"] if isinstance(backend, dict) else backend.backend
        self.receivers = [
            Receiver(self.shared, backend, gpu, rank, request.init_info)
            for rank, gpu in enumerate(self.gpus)
        ]

    async def start_weight_update(self) -> None:
        self.log("start_update")
        if self.updating or WEIGHTS in self.asleep or not self.paused:
            raise Refused(
                f"{self.name}: update begins, updating {self.updating}, asleep {self.asleep}, "
                f"{self.paused=}"
            )
        self.updating = True
        self.current = False
        for gpu in self.gpus:
            self.shared.received[UUID.format(gpu)] = []

    async def update_weights(self, request: Any) -> None:
        self.log("update")
        assert self.updating, "update_weights before start_weight_update"
        for receive in self.receivers:
            receive(request.update_info)

    async def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.log("finish_update")
        for receive in self.receivers:
            receive.close()
        self.updating = False
        self.current = True

    def shutdown(self, timeout: float | None = None) -> None:
        self.log("shutdown")


class Receiver:
    """The engine process of one card: vLLM's own class, with a list of arrivals for a model."""

    def __init__(
        self, shared: Engines, backend: str, gpu: int, rank: int, init_info: dict[str, Any]
    ) -> None:
        self.shared = shared
        self.gpu = gpu
        self.engine, self.info_cls = (self._ipc if backend == "ipc" else self._nccl)(
            rank, init_info
        )

    def _ipc(self, rank: int, init_info: dict[str, Any]) -> tuple[Any, Any]:
        import torch
        from vllm.distributed.weight_transfer.ipc_engine import (
            IPCWeightTransferEngine,
            IPCWeightTransferUpdateInfo,
        )

        engine = self._make(IPCWeightTransferEngine, torch.device("cuda", 0))
        engine.init_transfer_engine(engine.init_info_cls(**init_info))
        return engine, IPCWeightTransferUpdateInfo

    def _nccl(self, rank: int, init_info: dict[str, Any]) -> tuple[Any, Any]:
        import torch
        from vllm.distributed.weight_transfer.nccl_engine import (
            NCCLWeightTransferEngine,
            NCCLWeightTransferUpdateInfo,
        )

        engine = self._make(NCCLWeightTransferEngine, torch.device("meta"))
        info = engine.init_info_cls(**init_info)
        engine.packed = info.packed
        engine.packed_num_buffers = info.packed_num_buffers
        engine.packed_buffer_size_bytes = info.packed_buffer_size_bytes
        engine.model_update_group = Group(self.shared, info.rank_offset + rank, info.world_size)
        return engine, NCCLWeightTransferUpdateInfo

    def _make(self, cls: Any, device: Any) -> Any:
        config = SimpleNamespace(parallel_config=None, model_config=None)
        return cls(None, config, device, SimpleNamespace(load_weights=self._load))

    def _load(self, weights: Any) -> None:
        found = self.shared.received[UUID.format(self.gpu)]
        found += [(name, tuple(tensor.shape), str(tensor.dtype)) for name, tensor in weights]

    def __call__(self, update_info: dict[str, Any]) -> None:
        self.shared.gpu = self.gpu
        self.engine.receive_weights(self.info_cls(**update_info))
        self.shared.gpu = 0

    def close(self) -> None:
        """Lets go of the trainer's buffer, as the engine does when an update is finished."""
        importer = getattr(self.engine, "_packed_importer", None)
        if importer is not None:
            importer.close()


class Group:
    """NCCL's communicator of trainer and engine processes.

    Rank 0 tells the others the sizes of what it would send.
    """

    def __init__(self, shared: Engines, rank: int, size: int) -> None:
        self.shared = shared
        self.rank = rank
        self.size = size
        shared.broadcast[rank] = queue.Queue()

    def broadcast(self, tensor: Any, src: int, stream: Any = None) -> None:
        assert src == 0 and self.rank < self.size
        if self.rank == 0:
            assert str(tensor.device) == "cuda:0", (
                f"the communicator works on cuda:0, the tensor is on {tensor.device}"
            )
            for rank in range(1, self.size):
                self.shared.broadcast[rank].put(tensor.nbytes)
        else:
            sent = self.shared.broadcast[self.rank].get(timeout=120)
            assert sent == tensor.nbytes, f"{sent} bytes sent, {tensor.nbytes} expected"

    def destroy(self) -> None: ...


def check_calls(stub: type) -> None:
    """Raises TypeError where vLLM's AsyncLLM would not take the stub's parameters."""
    from vllm.v1.engine.async_llm import AsyncLLM

    for name, method in inspect.getmembers(stub, inspect.isfunction):
        if not name.startswith("_") and hasattr(AsyncLLM, name):
            real = inspect.signature(getattr(AsyncLLM, name)).parameters
            unknown = set(inspect.signature(method).parameters) - set(real)
            if unknown:
                raise TypeError(f"AsyncLLM.{name} has no {unknown}")
