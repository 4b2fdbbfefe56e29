"""Sharded checkpoints of one training state, written while training goes on."""

import pickle
import random
import shutil
import warnings
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read. The message names the folder, the ranks and what stopped them."""


class Checkpointer:
    """Saves and loads one training state. Every method is a collective, the constructor too.

    Ranks agree over a gloo group of their own: the background thread's messages cannot mix with those of training, nor
    with another role's.
    """

    def __init__(self, state: Any) -> None:
        self.state = state
        self.group: Any = dist.new_group(backend="gloo")
        self.pending: tuple[str, int, Future[Any]] | None = None

    def save(self, path: str, asynchronous: bool = False) -> None:
        """Writes model, optimizer, schedule and each rank's random state, as they are now, under `path`.

        With `asynchronous` it returns once they are copied to host memory (as much again as the rank's share of them),
        and `finish` must be called. Raises CheckpointError, also for an earlier save that was not finished.
        """
        self.finish()
        content = training_state(self.state)
        size = num_bytes(content)
        content[_own_key()] = pickle.dumps({"scheduler": self.state.scheduler.state_dict(), "rng": rng_state()})
        where: dict[str, Any] = {"storage_writer": FileSystemWriter(path), "process_group": self.group}
        if asynchronous:
            self.pending = path, size, cast("Future[Any]", async_save(content, **where))
        else:
            with _explained("written", path, size):
                save(content, **where)

    def finish(self) -> None:
        """Waits until an asynchronous save is on the disk. Raises CheckpointError on every rank if it failed on any."""
        if self.pending is None:
            return
        (path, size, future), self.pending = self.pending, None
        with _explained("written", path, size):
            future.result()

    def load(self, path: str) -> None:
        """Restores what `save` wrote, on any number of ranks.

        A rank that was not there when it was saved takes rank 0's schedule and keeps the random state it was seeded
        with. Raises CheckpointError when it cannot be read, FileNotFoundError when it is not there.
        """
        self.finish()
        reader, key, state = FileSystemReader(path), _own_key(), self.state
        known = key in reader.read_metadata().state_dict_metadata
        content = training_state(state)
        key = key if known else "rank_0"
        content[key] = b""
        with _explained("read", path):
            load(content, storage_reader=reader, process_group=self.group)
        set_state_dict(
            state.model,
            state.optimizer,
            model_state_dict=content["model"],
            optim_state_dict=content["optimizer"],
        )
        state.rest_optimizer()
        extra = pickle.loads(content[key])
        state.scheduler.load_state_dict(extra["scheduler"])
        if known:
            set_rng_state(extra["rng"])


def training_state(state: Any) -> dict[str, Any]:
    """`model` and `optimizer` under names that do not depend on ranks; the tensors are those that train.

    Reading the state of an optimizer that has not stepped makes torch take one step with a gradient and a learning rate
    of zero; it is not counted.
    """
    fresh = not state.optimizer.state
    model, optimizer = get_state_dict(state.model, state.optimizer)
    if fresh:
        for values in state.optimizer.state.values():
            values["step"].zero_()
        state.rest_optimizer()
    return {"model": model, "optimizer": optimizer}


def saved_weights(path: str) -> dict[str, torch.Tensor]:
    """Tensors of the model in a checkpoint by name, on the meta device: shapes and dtypes without the values.

    In this process alone. Raises CheckpointError when the list of them cannot be read.
    """
    try:
        found = FileSystemReader(path).read_metadata().state_dict_metadata
    except (OSError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path}: the list of its parts could not be read ({error})") from error
    prefix = "model."
    return {
        name.removeprefix(prefix): torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
        for name, entry in found.items()
        if name.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
    }


def read_weight(path: str, name: str, like: torch.Tensor) -> torch.Tensor:
    """The whole tensor `name`, whatever ranks hold its parts; `like` is that of `saved_weights`.

    In this process alone. Raises CheckpointError when it cannot be read.
    """
    tensor = torch.empty_like(like, device="cpu")
    with _explained("read", path), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # that is what is meant
        load({"model": {name: tensor}}, storage_reader=FileSystemReader(path), no_dist=True)
    return tensor


def num_bytes(content: dict[str, Any]) -> int:
    """Bytes of all tensors of a `training_state`, over all ranks."""
    tensors = [*content["model"].values()]
    tensors += [v for values in content["optimizer"]["state"].values() for v in values.values()]
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))


@contextmanager
def _explained(done: str, path: str, size: int | None = None) -> Iterator[None]:
    """Turns torch's report of the ranks that failed, which is no Exception, into a CheckpointError."""
    try:
        yield
    except CheckpointException as error:
        causes = [f"rank {rank}: {type(e).__name__}: {e}" for rank, (e, _) in sorted(error.failures.items())]
        room = "" if size is None else f"; it takes {size / 1e6:.1f} MB and has room for {_room(Path(path)) / 1e6:.1f}"
        raise CheckpointError(f"{path}: the checkpoint could not be {done}{room} ({'; '.join(causes)})") from error


def _room(path: Path) -> int:
    """Bytes that fit in the folder: those free on its disk and those it holds."""
    disk = next(p for p in (path, *path.absolute().parents) if p.exists())
    held = sum(p.stat().st_size for p in path.rglob("*") if p.is_file()) if path.exists() else 0
    return shutil.disk_usage(disk).free + held


def _own_key() -> str:
    return f"rank_{dist.get_rank()}"


def rng_state() -> dict[str, Any]:
    """Random state of python, numpy, torch and the accelerator of this process."""
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Restores `rng_state`."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
