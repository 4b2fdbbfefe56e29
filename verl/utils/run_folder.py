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
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from verl.utils.errors import ConfigError, DataError

LATEST = "latest_checkpointed_iteration.txt"
BEST = "best_checkpoint.json"
INDEX = "index.json"
PICKLED_INDEX = ".metadata"
"""The index of the tensors in a checkpoint's folder, which is written last; the second name is
that of torch's own index."""
PREFIX = "global_step_"
PENDING = ".tmp"
ROLL_BACKS = "roll_backs.json"
RESTARTS = "restarts.jsonl"
ENDED = "ended.json"
"""How the run ended: `time` (UTC) and exit `status`; it is missing while the run goes on."""
LOCK = ".lock"
"""A file that a run locks while it uses the folder. The file itself is never deleted."""

logger = logging.getLogger(__name__)


@contextmanager
def held(root: str | Path, patience_s: float = 60.0) -> Iterator[None]:
    """Keeps other runs out of the run folder during the block; makes the folder if necessary.

    How the run before ended is no longer said there.
    The lock is released when the process is killed. Waits up to `patience_s` seconds for another
    run to release it: the run may just be ending, or a network file system may not have noticed
    that its machine is dead. Raises ConfigError when the other run keeps the lock. On a file system
    without locks nothing is locked.
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
        with suppress(OSError):
            (folder / ENDED).unlink()
        yield


def in_use(root: str | Path) -> bool:
    """Whether a run keeps others out of the folder now. On a file system without locks: False."""
    try:
        with (Path(root) / LOCK).open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
    except BlockingIOError:
        return True
    except OSError:
        return False


def _take(lock: IO[str], patience_s: float, folder: Path) -> bool:
    """Tries to lock the file for `patience_s` seconds, and returns whether that worked.

    Raises OSError on a file system without locks.
    """
    deadline = time.monotonic() + patience_s
    tries = 0
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
        tries += 1
        if tries == 2:  # the first time it may be `in_use`, which lets go at once
            logger.info(
                "another run is using %s: waiting up to %g s for its end", folder, patience_s
            )
        time.sleep(0.02 if tries == 1 else 0.5)


def folder_of(root: str | Path, step: int) -> Path:
    """The folder of the complete checkpoint of `step`."""
    return Path(root) / f"{PREFIX}{step}"


def pending_folder(root: str | Path, step: int) -> Path:
    """The folder in which the checkpoint of `step` is written until it is complete."""
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
        (Path(root) / BEST).unlink()  # it belongs to the weights that are replaced
    replace_folder(pending_folder(root, step), folder)
    name_latest(root, step)
    return folder


def name_latest(root: str | Path, step: int) -> None:
    """Makes `step` the one to resume from.

    After a roll back, newer folders stay until training reaches their steps again.
    """
    write_atomically(Path(root) / LATEST, str(step))


def discard(root: str | Path, step: int) -> None:
    """Deletes the files of a checkpoint that was not completed."""
    pending = pending_folder(root, step)
    if pending.exists():
        shutil.rmtree(pending)


def remove_leftovers(root: str | Path) -> list[str]:
    """Deletes the folders that a crash left unfinished, and returns their names.

    No checkpoint may be under way.
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

    That is the one that the marker names. If that one is missing, it is the newest before it,
    because newer ones were given up by a roll-back. Without a marker it is the newest of all. In
    both cases there is a warning.
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
    """Reads `step`, `metric` and `value` of the best checkpoint; None if there is none yet."""
    path = Path(root) / BEST
    return json.loads(path.read_text()) if path.exists() else None


def mark_best(root: str | Path, step: int, metric: str, value: float) -> bool:
    """Marks the checkpoint of `step` as the best if it is, and returns whether it is.

    It is the best if its `value` is higher than that of the best so far, or if there is none with
    this `metric` yet. NaN is never better. Raises FileNotFoundError unless the checkpoint is
    complete.
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

    It keeps the newest `keep`, the best, the latest, the `protected`, and those that are newer than
    the latest because a roll-back gave them up. Without `keep` nothing is deleted.
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
    """Writes to `path` what the results beside it are made from, as `made_of` says.

    So a later start cannot add results of something else. Raises DataError, naming the difference,
    if the file exists and says that they are made from something else. `what`: a word for the
    results.
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
    """Replaces the content of the file atomically.

    A reader sees either the old or the new text, also after a power failure.
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
    """Makes an empty folder to write to, which replaces the folder `path` after the block.

    If the block raises, nothing is replaced. `carry_over`: as in `replace_folder`.
    """
    pending = path.with_name(path.name + PENDING)
    if pending.exists():
        shutil.rmtree(pending)  # left behind by a crash
    pending.mkdir(parents=True)
    yield pending
    replace_folder(pending, path, carry_over)


def replace_folder(new: Path, path: Path, carry_over: bool = False) -> None:
    """Renames the folder `new` to `path`, once all its content is on the disk.

    The folder that was at `path` is deleted. With `carry_over` the files in it that `new` lacks are
    kept, except weights.
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
    """Deletes a folder in a way that it never looks complete while parts are gone."""
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
