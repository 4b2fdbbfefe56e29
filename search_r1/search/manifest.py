"""An index on disk: written whole or not at all, with a manifest that says what it is and what it
was made from."""

import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

log = logging.getLogger(__name__)
MANIFEST = "manifest.json"
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
"""What a file system answers that cannot lock files."""
SAMPLES = 64
SAMPLE_BYTES = 1 << 16


class CorpusError(ValueError):
    """A corpus or an index that cannot be used; the message names the file, and the line or the
    cure."""


def fingerprint(path: Path) -> dict[str, Any]:
    """Size and a hash of 64 evenly spaced blocks: tells files apart without reading 14 GB."""
    size = path.stat().st_size
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for i in range(SAMPLES):
            file.seek(max(0, (size - SAMPLE_BYTES) * i // (SAMPLES - 1)))
            digest.update(file.read(SAMPLE_BYTES))
    return {"bytes": size, "sha256_of_samples": digest.hexdigest()}


@contextmanager
def building(index: Path) -> Iterator[Path]:
    """A folder to write the files of `index` in; it takes the place of `index` when the block ends
    without an error.

    Raises CorpusError when the disk is full, or another process is building `index`; what stood at
    `index` before is then untouched.
    """
    with locked(index):
        pending = index.with_name(index.name + ".tmp")
        old = index.with_name(index.name + ".old")
        try:
            remove(pending)
            if index.exists():
                remove(old)  # of a build that was killed at its very end
            pending.mkdir(parents=True)
            yield pending
            if index.exists():
                index.rename(old)
            pending.rename(index)
        except (OSError, RuntimeError) as error:
            if not is_full_disk(error):
                raise
            raise CorpusError(
                f"{index}: the disk is full ({error}); make room or choose another --save_dir"
            ) from error
        finally:
            shutil.rmtree(pending, ignore_errors=True)
        try:
            remove(old)
        except OSError as error:  # a server may still have it open; the next build removes it
            log.warning("the index that was replaced could not be removed: %s", error)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds the lock file of `path`, which a killed process loses. Raises CorpusError when another
    process has it."""
    lock = path.with_name(path.name + ".lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        if not (take(file) and is_at(file, lock)):
            raise CorpusError(
                f"{path}: another build of it is running (it holds {lock}); wait until that has "
                "ended"
            )
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def take(file: IO[str]) -> bool:
    """Locks an open file, unless another process has it. Where files cannot be locked, says so and
    goes on."""
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
    """Whether an open file is still the one at `path`: who held the lock before has removed it when
    it ended."""
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
    """Whether an error says that there is no room: by its number, or else in the words of NumPy or
    FAISS."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in FULL_DISK
    text = str(error)
    is_short_write = isinstance(error, OSError) and "written" in text
    return is_short_write or any(os.strerror(number) in text for number in FULL_DISK)


def write_manifest(folder: Path, **entries: Any) -> None:
    """Writes `entries` with the size of every file in `folder`."""
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
    text = json.dumps({**entries, "files": files}, indent=1)
    with (folder / MANIFEST).open("w", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_manifest(index: Path) -> dict[str, Any]:
    """The manifest of a complete index. Raises CorpusError when there is none, or something of it
    is damaged."""
    path = index / MANIFEST
    if not path.is_file():
        raise CorpusError(f"{index}: no index here (no {MANIFEST})")
    cure = "the index is damaged, build it again (--overwrite)"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CorpusError(f"{path} is not JSON ({error}): {cure}") from error
    if not (
        isinstance(manifest, dict)
        and isinstance(manifest.get("files"), dict)
        and "corpus" in manifest
    ):
        raise CorpusError(f'{path} has no "files" and "corpus": {cure}')
    for name, size in manifest["files"].items():
        path = index / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            state = (
                "is missing" if found is None else f"has {found} bytes, the manifest says {size}"
            )
            raise CorpusError(f"{path} {state}: {cure}")
    return manifest


def check_corpus(manifest: dict[str, Any], index: Path, corpus: Path) -> None:
    """Raises CorpusError unless `corpus` is the file that `index` was built from."""
    if not corpus.is_file():
        raise CorpusError(f"{corpus}: no such file")
    if fingerprint(corpus) != manifest["corpus"]:
        raise CorpusError(
            f"{corpus} is not the corpus that {index} was built from: build the index again "
            "(--overwrite)"
        )
