"""Eight training ranks, the first of which does the real work on a fake card.

The others are like it.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForTokenClassification

from tests.fake_card.card import Memory
from tests.fake_card.engine import UUID
from verl.protocol import DataProto
from verl.single_controller.worker_group import WorkerHost

ROWS = {
    "compute_log_prob": "old_log_probs",
    "compute_entropy": "entropy",
    "compute_ref_log_prob": "ref_log_prob",
    "compute_values": "values",
}


def no_peers(log: Callable[..., None]) -> None:
    """Makes torch.distributed work for a rank whose peers are not there.

    Collectives of tensors do nothing; those of objects are answered in the name of the others.
    """
    init = dist.init_process_group
    new_group = dist.new_group

    def init_process_group(
        backend: str, store: Any, rank: int, world_size: int, timeout: Any
    ) -> None:
        assert backend == "cpu:gloo,cuda:nccl"
        init("cpu:fake,cuda:fake", store=store, rank=rank, world_size=world_size)

    def all_gather_object(found: list[Any], own: Any, group: Any = None) -> None:
        log("all_gather_object")
        for rank in range(len(found)):
            found[rank] = [{UUID.format(rank): args for args in handle.values()} for handle in own]

    dist.init_process_group = init_process_group  # pyright: ignore
    dist.get_backend_config = lambda group=None: "cpu:gloo,cuda:nccl"
    dist.new_group = lambda *args, backend=None, **kwargs: new_group(
        *args, backend="fake", **kwargs
    )
    dist.all_gather_object = all_gather_object
    dist.barrier = lambda *_, **__: log("barrier")


def models_without_weights() -> None:
    """Lets `from_pretrained` make a model of the config's shapes, on the host, and read nothing."""

    def maker(cls: Any) -> Any:
        def from_pretrained(
            path: str, *, dtype: Any, attn_implementation: str, **kwargs: Any
        ) -> Any:
            config = AutoConfig.from_pretrained(path, **kwargs)
            return cls.from_config(config, dtype=dtype, attn_implementation=attn_implementation)

        return from_pretrained

    for cls in (AutoModelForCausalLM, AutoModelForTokenClassification):
        cls.from_pretrained = maker(cls)  # pyright: ignore


class Host(WorkerHost):
    """The process of a rank. Only the first one has a process group, and roles."""

    made = 0
    mode: Any
    memory: Memory
    log: Callable[..., None]

    def __init__(self) -> None:
        super().__init__()
        self.rank = Host.made
        Host.made += 1

    def location(self) -> dict[str, Any]:
        return {"node_id": "node", "ip": "127.0.0.1", "gpus": [str(self.rank % 8)], "pid": 0}

    def open_store(self, address: str) -> int:
        return 0

    def setup(self, seed: int, deterministic: bool, rank: int, size: int, *rest: Any) -> None:
        if self.rank == 0:
            self.store = FakeStore()  # pyright: ignore
            super().setup(seed, deterministic, rank, size, *rest)

    def add_role(self, role: str, spec: Any) -> None:
        if self.rank == 0:
            with self.mode:
                super().add_role(role, spec)
            Host.log("rank", f"build {role}")

    def call(self, role: str, method: str, *args: Any) -> Any:
        if self.rank:
            return like_rank_0(method, args)
        self.memory.reset_peak()
        Host.log("rank", f"{role}.{method}")
        with self.mode:
            result = super().call(role, method, *args)
        Host.log("rank", f"{role}.{method} done")
        return through_ray(result)


def like_rank_0(method: str, args: Any) -> Any:
    """What another rank would return, in shape."""
    if method not in ROWS:
        return None
    shape = args[0].batch["responses"].shape
    return DataProto({ROWS[method]: torch.full(shape, -1.0)})


def through_ray(data: Any) -> Any:
    """What comes back to the driver: tensors of the shapes that were computed."""
    if not isinstance(data, DataProto):
        return data
    for name, column in data.batch.items():
        assert column.device.type == "cpu", f"{name} comes back on {column.device}"
    return DataProto({k: torch.full(v.shape, -1.0, dtype=v.dtype) for k, v in data.batch.items()})
