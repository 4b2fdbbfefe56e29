"""The checkpoints of a run folder: which are complete, the newest, the best, and which may go.

global_step_20/                       complete: renamed to this once its bytes were on the disk
global_step_30.tmp/                   being written, or left behind by a crash
latest_checkpointed_iteration.txt     the step to resume from
best_checkpoint.json                  {"step": 20, "metric": "val/em", "value": 0.41}
"""

import fcntl
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

from verl.utils.errors import ConfigError, DataError

LATEST = "latest_checkpointed_iteration.txt"
BEST = "best_checkpoint.json"
INDEX = "index.json"
PICKLED_INDEX = ".metadata"
"""The list of the tensors in a folder of a checkpoint, which is written last; and what torch calls
its own."""
PREFIX = "global_step_"
PENDING = ".tmp"
LOCK = ".lock"
"""A file that the run that is using the folder has locked. It stays: what counts is the lock."""

logger = logging.getLogger(__name__)


@contextmanager
def held(root: str | Path, patience_s: float = 60.0) -> Iterator[None]:
    """Keeps other runs out of the run folder, which is made if need be.

    A process that is killed gives it up. Waits `patience_s` for a run that is just ending, or whose
    machine a file system still takes for alive. Raises ConfigError when another run keeps the
    folder. Where files cannot be locked, it is not kept.
    """
    folder = Path(root)
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            lock = stack.enter_context((folder / LOCK).open("a"))
            taken = _take(lock, patience_s, folder)
        except OSError as error:
            logger.warning("%s cannot be locked (%s): start no second run in it", folder, error)
            taken = True
        if not taken:
            problem = f"trainer.default_local_dir={root}: another run is using this folder"
            raise ConfigError([f"{problem}: wait until it has ended, or name another one"])
        yield


def _take(lock: IO[str], patience_s: float, folder: Path) -> bool:
    """Whether the file could be locked in that time. Raises OSError where files cannot be."""
    deadline = time.monotonic() + patience_s
    told = False
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
        if not told:
            logger.info(
                "another run is using %s: waiting up to %g s for its end", folder, patience_s
            )
            told = True
        time.sleep(0.5)


def folder_of(root: str | Path, step: int) -> Path:
    """Where the complete checkpoint of `step` is, or will be."""
    return Path(root) / f"{PREFIX}{step}"


def pending_folder(root: str | Path, step: int) -> Path:
    """Where the checkpoint of `step` is written until it is complete."""
    return Path(root) / f"{PREFIX}{step}{PENDING}"


def step_of(folder: Path) -> int:
    """The training step of a complete checkpoint's folder."""
    return int(folder.name.removeprefix(PREFIX))


def complete(root: str | Path, step: int) -> Path:
    """Makes the checkpoint of `step` complete and the one to resume from; returns its folder.

    Raises FileNotFoundError when nothing was written for that step.
    """
    folder = folder_of(root, step)
    record = best(root)
    if record and record["step"] == step:
        (Path(root) / BEST).unlink()  # other weights had that value
    replace_folder(pending_folder(root, step), folder)
    name_latest(root, step)
    return folder


def name_latest(root: str | Path, step: int) -> None:
    """Makes `step` the one to resume from.

    After a roll back, newer folders stay until training reaches their steps again.
    """
    write_atomically(Path(root) / LATEST, str(step))


def discard(root: str | Path, step: int) -> None:
    """Deletes what there is of a checkpoint that did not become complete."""
    pending = pending_folder(root, step)
    if pending.exists():
        shutil.rmtree(pending)


def remove_leftovers(root: str | Path) -> list[str]:
    """Deletes the folders that a crash left unfinished, and returns their names.

    No writer may be at work.
    """
    leftovers = [p for p in sorted(Path(root).glob(f"*{PENDING}")) if p.is_dir()]
    for path in leftovers:
        shutil.rmtree(path)
    return [path.name for path in leftovers]


def steps(root: str | Path) -> list[int]:
    """Steps with a complete checkpoint, in ascending order."""
    names = (p.name for p in Path(root).glob(f"{PREFIX}*") if p.is_dir())
    return sorted(int(m[1]) for name in names if (m := re.fullmatch(PREFIX + r"(\d+)", name)))


def find_latest(root: str | Path) -> Path | None:
    """Folder of the checkpoint to resume from, None if there is none.

    That is the one the marker names. Without it, the newest before it (a newer one was given up by
    a roll back), or the newest of all; a warning says so.
    """
    marker = Path(root) / LATEST
    found = steps(root)
    text = marker.read_text().strip() if marker.exists() else ""
    named = int(text) if text.isdigit() else None
    if named is not None and named in found:
        return folder_of(root, named)
    step = max(
        (s for s in found if named is not None and s < named), default=max(found, default=None)
    )
    if step is None:
        if text:
            logger.warning(
                "%s names %r, but there is no complete checkpoint: starting afresh", marker, text
            )
        return None
    logger.warning(
        "%s names %s: taking %s", marker, repr(text) if text else "nothing", folder_of(root, step)
    )
    return folder_of(root, step)


def best(root: str | Path) -> dict[str, Any] | None:
    """`step`, `metric` and `value` of the best checkpoint, None before there is one."""
    path = Path(root) / BEST
    return json.loads(path.read_text()) if path.exists() else None


def mark_best(root: str | Path, step: int, metric: str, value: float) -> bool:
    """Whether `step` is now the best checkpoint: its `value` is above that of the best so far.

    The first one is, and the first under another `metric`; NaN is never better. The checkpoint must
    be complete, else FileNotFoundError.
    """
    if not folder_of(root, step).is_dir():
        raise FileNotFoundError(
            f"{folder_of(root, step)}: no complete checkpoint to call the best one"
        )
    record = best(root)
    bar = (
        record["value"]
        if record and record["metric"] == metric and record["step"] in steps(root)
        else float("-inf")
    )
    if not value > bar:
        return False
    write_atomically(
        Path(root) / BEST, json.dumps({"step": step, "metric": metric, "value": value})
    )
    return True


def prune(root: str | Path, keep: int | None, protected: Collection[int] = ()) -> list[int]:
    """Deletes old checkpoints, and returns their steps.

    All but the newest `keep`, the best, the latest and the `protected` are deleted. Nothing is
    deleted without `keep`, nor what is newer than the latest (a roll back gave it up).
    """
    latest = find_latest(root)
    record = best(root)
    if not keep or latest is None:
        return []
    spared = {*protected, step_of(latest), *([record["step"]] if record else [])}
    old = [s for s in steps(root) if s <= step_of(latest)][:-keep]
    gone = [s for s in old if s not in spared]
    for step in gone:
        delete_folder(folder_of(root, step))
    return gone


def claim(path: Path, made_of: dict[str, Any], what: str) -> None:
    """Writes to `path` what the results beside it are made of.

    A later start then does not add others to them. Raises DataError, naming what differs, when they
    are made of something else. `what` says what the results are.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(made_of, indent=1)
    mine = json.loads(text)
    theirs = json.loads(path.read_text() if path.exists() else text)
    if different := [key for key in mine if theirs.get(key) != mine[key]]:
        raise DataError(
            f"{path}: what lies beside it is of another {what} (not the same: "
            f"{', '.join(different)}): name another place, or delete both"
        )
    write_atomically(path, text)


def write_atomically(path: Path, text: str) -> None:
    """Replaces the file at once.

    A reader sees the old text or the new, after a power failure as well.
    """
    pending = path.with_name(path.name + PENDING)
    with pending.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(pending, path)
    _sync(path.parent)


@contextmanager
def replacing(path: Path, carry_over: bool = False) -> Iterator[Path]:
    """Gives an empty folder to write to, which replaces the folder `path` after the block.

    A block that raises replaces nothing. `carry_over`: as in `replace_folder`.
    """
    pending = path.with_name(path.name + PENDING)
    if pending.exists():
        shutil.rmtree(pending)  # left behind by a crash
    pending.mkdir(parents=True)
    yield pending
    replace_folder(pending, path, carry_over)


def replace_folder(new: Path, path: Path, carry_over: bool = False) -> None:
    """Renames the folder `new` to `path`, its content on the disk before that.

    What was at `path` is deleted; with `carry_over` the files in it that `new` lacks stay, except
    weights.
    """
    for file in [new, *new.rglob("*")]:
        _sync(file)
    if not path.exists():
        os.rename(new, path)
        _sync(path.parent)
        return
    old = path.with_name(f"{path.name}.old{PENDING}")
    if old.exists():
        shutil.rmtree(old)
    os.rename(path, old)
    os.rename(new, path)
    _sync(path.parent)
    for file in old.iterdir() if carry_over else ():
        if not (path / file.name).exists() and ".safetensors" not in file.name:
            os.rename(file, path / file.name)
    shutil.rmtree(old)


def delete_folder(path: Path) -> None:
    """Deletes a folder that never looks complete while half of it is gone."""
    doomed = path.with_name(path.name + PENDING)
    os.rename(path, doomed)
    shutil.rmtree(doomed)


def _sync(path: Path) -> None:
    """Waits until the file, or the list of a folder's files, is on the disk.

    Raises FileNotFoundError if it is missing.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
