"""Sharded checkpoints of one training state, written while training goes on."""

import json
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
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save

from verl.utils.checkpoint_storage import CheckpointError, TensorReader, TensorWriter, read_index


class Checkpointer:
    """Saves and loads one training state. Every method is a collective, also the constructor.

    Ranks communicate over a gloo group of their own, so that messages of the background thread
    cannot mix with those of training or of another role.
    """

    def __init__(self, state: Any) -> None:
        self.state = state
        self.group: Any = dist.new_group(backend="gloo")
        self.pending: tuple[str, int, Future[Any]] | None = None

    def save(self, path: str, asynchronous: bool = False) -> None:
        """Writes model, optimizer, ticks of the schedule and each rank's random state under `path`.

        With `asynchronous` it returns once they are copied to host memory, which takes the size of
        the rank's share, and `finish` must be called. Raises CheckpointError, also if an earlier
        save was not finished.
        """
        self.finish()
        content = tensors_of(training_state(self.state))
        size = num_bytes(content)
        own = {"ticks": self.state.ticks, "lr_factor": self.state.lr_factor, "rng": rng_state()}
        content[_own_key()] = json_tensor(own)
        where: dict[str, Any] = {"storage_writer": TensorWriter(path), "process_group": self.group}
        if asynchronous:
            self.pending = path, size, cast("Future[Any]", async_save(content, **where))
        else:
            with _explained("written", path, size):
                save(content, **where)

    def finish(self) -> None:
        """Waits until an asynchronous save is on the disk.

        Raises CheckpointError on every rank if it failed on any.
        """
        if self.pending is None:
            return
        (path, size, future) = self.pending
        self.pending = None
        with _explained("written", path, size):
            future.result()

    def load(self, path: str) -> None:
        """Restores what `save` wrote, on any number of ranks.

        Learning rate, betas and weight decay stay as configured. A rank that did not exist when the
        checkpoint was written takes rank 0's position in the schedule and keeps its own random
        state. Raises CheckpointError if the checkpoint cannot be read, FileNotFoundError if it does
        not exist.
        """
        self.finish()
        stored = read_index(path).tensors
        key = _own_key()
        state = self.state
        known = key in stored
        key = key if known else "rank_0"
        if key not in stored:
            raise CheckpointError(f"{path}: the checkpoint has no entry {key}")
        present = training_state(state)
        content = {**tensors_of(present), key: torch.empty(stored[key].size, dtype=torch.uint8)}
        with _explained("read", path):
            load(content, storage_reader=TensorReader(path), process_group=self.group)
        set_state_dict(
            state.model,
            state.optimizer,
            model_state_dict=present["model"],
            optim_state_dict=present["optimizer"],
        )
        state.offload_optimizer()
        own = from_json_tensor(content[key])
        state.go_to(own["ticks"], own["lr_factor"])
        if known:
            set_rng_state(own["rng"])


def training_state(state: Any) -> dict[str, Any]:
    """`model` and `optimizer` under names that do not depend on ranks.

    The tensors are the live ones, not copies. Reading the state of an optimizer that has not
    stepped makes torch take one step with a gradient and a learning rate of zero. That step is
    undone by setting the optimizer's state to zeros.
    """
    fresh = not state.optimizer.state
    model, optimizer = get_state_dict(state.model, state.optimizer)
    if fresh:
        for values in state.optimizer.state.values():
            for value in values.values():
                if isinstance(value, torch.Tensor):
                    value.zero_()
        state.offload_optimizer()
    return {"model": model, "optimizer": optimizer}


def tensors_of(content: dict[str, Any]) -> dict[str, Any]:
    """The part of a `training_state` that a checkpoint holds.

    It is everything but the optimizer's settings, which come from the configuration.
    """
    return {"model": content["model"], "optimizer": content["optimizer"]["state"]}


def saved_weights(path: str) -> dict[str, torch.Tensor]:
    """Shapes and dtypes of the model's tensors in a checkpoint: meta tensors by name.

    No collective: it works in a single process. Raises as `read_index` does.
    """
    prefix = "model."
    return {
        name.removeprefix(prefix): torch.empty(
            stored.size, dtype=getattr(torch, stored.dtype), device="meta"
        )
        for name, stored in read_index(path).tensors.items()
        if name.startswith(prefix)
    }


def read_weight(path: str, name: str, like: torch.Tensor) -> torch.Tensor:
    """Reads the whole tensor `name`, whatever ranks wrote it; `like` is that of `saved_weights`.

    No collective: it works in a single process. Raises CheckpointError when it cannot be read.
    """
    tensor = torch.empty_like(like, device="cpu")
    with _explained("read", path), warnings.catch_warnings():
        # reading without a process group is intended
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        load({"model": {name: tensor}}, storage_reader=TensorReader(path), no_dist=True)
    return tensor


def num_bytes(content: dict[str, Any]) -> int:
    """Bytes of the tensors of `tensors_of`, over all ranks."""
    tensors = [*content["model"].values()]
    tensors += [tensor for values in content["optimizer"].values() for tensor in values.values()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def json_tensor(value: object) -> torch.Tensor:
    """`value` as JSON, in bytes [length], uint8."""
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def from_json_tensor(tensor: torch.Tensor) -> Any:
    """The value that `json_tensor` was given."""
    return json.loads(tensor.numpy().tobytes())


@contextmanager
def _explained(done: str, path: str, size: int | None = None) -> Iterator[None]:
    """Turns torch's report of failed ranks into a CheckpointError.

    The report derives from BaseException, so `except Exception` would miss it.
    """
    try:
        yield
    except CheckpointException as error:
        causes = [
            f"rank {rank}: {type(e).__name__}: {e}"
            for rank, (e, _) in sorted(error.failures.items())
        ]
        room = (
            ""
            if size is None
            else f"; it takes {size / 1e6:.1f} MB and has room for {_room(Path(path)) / 1e6:.1f}"
        )
        raise CheckpointError(
            f"{path}: the checkpoint could not be {done}{room} ({'; '.join(causes)})"
        ) from error


def _room(path: Path) -> int:
    """Bytes that a checkpoint in the folder can take: free bytes and those of its own files."""
    disk = next(p for p in (path, *path.absolute().parents) if p.exists())
    held = sum(p.stat().st_size for p in path.rglob("*") if p.is_file()) if path.exists() else 0
    return shutil.disk_usage(disk).free + held


def _own_key() -> str:
    return f"rank_{dist.get_rank()}"


def rng_state() -> dict[str, Any]:
    """Random state of python, numpy, torch and the accelerator, as JSON can hold it."""
    name, keys, *rest = np.random.get_state()
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": [name, np.asarray(keys).tolist(), *rest],
        "torch": torch.get_rng_state().tolist(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state().tolist()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Restores `rng_state`."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(torch.tensor(state["torch"], dtype=torch.uint8))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.tensor(state["cuda"], dtype=torch.uint8))
