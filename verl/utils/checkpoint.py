"""Sharded checkpoints of one training state, and export to the Hugging Face format."""

import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from transformers import AutoTokenizer

LATEST = "latest_checkpointed_iteration.txt"


def save_state(state: Any, path: str) -> None:
    """Writes model, optimizer, schedule and each rank's random state under `path`. A collective."""
    model, optimizer = get_state_dict(state.model, state.optimizer)
    save({"model": model, "optimizer": optimizer}, checkpoint_id=path)
    torch.save({"scheduler": state.scheduler.state_dict(), "rng": rng_state()}, _rank_file(path))
    dist.barrier()


def load_state(state: Any, path: str) -> None:
    """Restores what `save_state` wrote. A rank without a file of its own (more ranks than before) takes rank 0's."""
    model, optimizer = get_state_dict(state.model, state.optimizer)
    tensors = {"model": model, "optimizer": optimizer}
    load(tensors, checkpoint_id=path)
    set_state_dict(
        state.model,
        state.optimizer,
        model_state_dict=tensors["model"],
        optim_state_dict=tensors["optimizer"],
    )
    state.rest_optimizer()
    own = _rank_file(path)
    extra = torch.load(own if own.exists() else Path(path) / "rank_0.pt", weights_only=False)
    state.scheduler.load_state_dict(extra["scheduler"])
    if own.exists():
        set_rng_state(extra["rng"])


def _rank_file(path: str) -> Path:
    return Path(path) / f"rank_{dist.get_rank()}.pt"


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


def save_pretrained(model: Any, parameters: Iterator[tuple[str, torch.Tensor]], config: Any, path: str) -> None:
    """Writes the model and its tokenizer in Hugging Face format. A collective: `parameters` gathers on every rank."""
    weights = {name: tensor.cpu() for name, tensor in parameters if dist.get_rank() == 0}
    if dist.get_rank() == 0:
        model.save_pretrained(path, state_dict={k: v.contiguous() for k, v in weights.items()})
        source = config.tokenizer_path or config.path
        AutoTokenizer.from_pretrained(source, trust_remote_code=config.trust_remote_code).save_pretrained(path)


def mark_complete(root: str, step: int, keep: int | None) -> None:
    """Names `global_step_<step>` the checkpoint to resume from, atomically, then deletes all but the newest `keep`."""
    pending = Path(root) / (LATEST + ".tmp")
    pending.write_text(str(step))
    os.replace(pending, Path(root) / LATEST)
    steps = sorted(int(p.name.removeprefix("global_step_")) for p in Path(root).glob("global_step_*"))
    for old in [s for s in steps if s <= step][:-keep] if keep else []:
        shutil.rmtree(Path(root) / f"global_step_{old}")


def find_latest(root: str) -> Path | None:
    """Folder of the newest complete checkpoint under `root`, None if there is none."""
    marker = Path(root) / LATEST
    return Path(root) / f"global_step_{int(marker.read_text())}" if marker.exists() else None
