"""Runs a function on N gloo ranks, each a real process."""

import multiprocessing
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from verl.single_controller.worker import init_process_group, seed_everything

START_METHOD = "forkserver"
"""A process that has imported what takes seconds forks each rank, which is as new as one that was
started.

It has the environment of the first call of `run_ranks`: what a test sets later must be handed over
by arguments.
"""
multiprocessing.set_forkserver_preload(
    [
        "torch.distributed.checkpoint",
        "torch.distributed.fsdp",
        "transformers.models.qwen2.modeling_qwen2",
    ]
)


def run_ranks(world_size: int, fn: Callable[..., Any], *args: Any) -> list[Any]:
    """What `fn(*args)` returned on each rank."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(
            _rank, (world_size, folder, fn, args), nprocs=world_size, start_method=START_METHOD
        )
        return [torch.load(Path(folder) / f"{r}.pt", weights_only=False) for r in range(world_size)]


def _rank(
    rank: int, world_size: int, folder: str, fn: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    store = torch.distributed.FileStore(f"{folder}/store", world_size)
    init_process_group(rank, world_size, store, "cpu", threads=1)
    seed_everything(0)
    result = fn(*args)
    torch.save(result, Path(folder) / f"{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
