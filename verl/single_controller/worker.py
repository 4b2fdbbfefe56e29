"""What all accelerator processes have in common: each is a rank of one process group."""

import faulthandler
import os
import random
import tempfile
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

PROCESS_GROUP_TIMEOUT = timedelta(minutes=30)


class Worker:
    """Base of the roles that live on a rank.

    The process group must exist (`init_process_group`).
    """

    def __init__(self) -> None:
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self.device = current_device()
        self.mesh: DeviceMesh = init_device_mesh(
            self.device.type, (self.world_size,), mesh_dim_names=("dp",)
        )


def current_device() -> torch.device:
    """The accelerator of this process, or the CPU if the process group is gloo."""
    on_gpu = "nccl" in dist.get_backend_config()
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def share_of_cores(ranks: int) -> int:
    """The number of threads of each rank where so many of them share the cores of a machine."""
    return max(1, len(os.sched_getaffinity(0)) // ranks)


def init_process_group(
    rank: int, world_size: int, store: Store | None, device: str, threads: int | None = None
) -> None:
    """Joins this process to the group: nccl on `cuda`, gloo on `cpu`.

    On `cpu` a rank has `threads` threads. The ranks meet in `store`, or where torchrun's
    environment says. Ranks with a GPU have gloo as well, for what FSDP keeps on the host
    (`param_offload`).
    """
    if device == "cuda":
        torch.cuda.set_device(0)
    elif threads:
        torch.set_num_threads(threads)
    if store is not None:
        store.set_timeout(PROCESS_GROUP_TIMEOUT)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=PROCESS_GROUP_TIMEOUT,
    )


def seed_everything(seed: int) -> None:
    """Seeds python, numpy and torch of this process."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def make_deterministic() -> None:
    """Makes torch use only kernels that give the same bits every time.

    Torch raises for an operation that has no such kernel.
    """
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True)


def stacks() -> str:
    """The stack of every Python thread of this process, as text."""
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()
