"""Writes files and folders whole or not at all, and locks what is being built."""

import errno
import fcntl
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO
from uuid import uuid4

from search_r1.search.errors import CorpusError

log = logging.getLogger(__name__)
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
"""Errors of file systems that cannot lock files."""


@contextmanager
def replacing(path: Path, several_writers: bool = False) -> Iterator[Path]:
    """Yields a pending path beside `path`, which replaces `path` when the block ends.

    After an error the pending path is removed, and `path` stays as it was. What a killed process
    left at the pending path is removed first. With `several_writers` every call has a pending path
    of its own, for files that several processes may write at the same time.
    """
    unique = f".{uuid4().hex}" if several_writers else ""
    pending = path.with_name(f"{path.name}{unique}.tmp")
    try:
        if not several_writers:
            remove(pending)
        yield pending
        pending.replace(path)
    finally:
        # A read-only file system raises even if there is nothing to remove.
        with suppress(OSError):
            remove(pending)


@contextmanager
def building(index: Path) -> Iterator[Path]:
    """Yields a folder, which replaces `index` when the block ends without an error.

    Raises CorpusError when the disk is full, or when another process is building `index`. Then the
    previous `index` is unchanged.
    """
    with locked(index):
        old = index.with_name(index.name + ".old")
        try:
            with replacing(index) as pending:
                if index.exists():
                    remove(old)  # left by a build that was killed at its very end
                pending.mkdir(parents=True)
                yield pending
                if index.exists():
                    index.rename(old)
        except (OSError, RuntimeError) as error:
            if not is_full_disk(error):
                raise
            raise CorpusError(
                f"{index}: the disk is full ({error}); make room or choose another --save_dir"
            ) from error
        try:
            remove(old)
        except OSError as error:  # a server may still have it open; the next build removes it
            log.warning("the index that was replaced could not be removed: %s", error)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds the lock file of `path`, which the system releases when the process dies.

    Raises CorpusError when another process holds it.
    """
    lock = path.with_name(path.name + ".lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        if not (take_lock(file) and is_at(file, lock)):
            raise CorpusError(
                f"{path}: another build of it is running (it holds {lock}); wait until that has "
                "ended"
            )
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def take_lock(file: IO[str]) -> bool:
    """Locks an open file; returns False when another process has it locked.

    If the file system has no locks, logs a warning and returns True.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        log.warning(
            "%s cannot be locked (%s): see to it that nothing else builds here", file.name, error
        )
    return True


def is_at(file: IO[str], path: Path) -> bool:
    """Whether an open file is still the one at `path`.

    It is not if the process that held the lock before has removed the file.
    """
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def remove(path: Path) -> None:
    """Removes a file or a folder, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def is_full_disk(error: OSError | RuntimeError) -> bool:
    """Whether an error says that the disk is full.

    The error number tells, or else the message of NumPy or FAISS.
    """
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in FULL_DISK
    text = str(error)
    is_short_write = isinstance(error, OSError) and "written" in text
    return is_short_write or any(os.strerror(number) in text for number in FULL_DISK)
