"""An index on disk: written whole or not at all, with a manifest that says what it is and what it was made from."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
SAMPLES, SAMPLE_BYTES = 64, 1 << 16


class CorpusError(ValueError):
    """A corpus or an index that cannot be used; the message names the file, and the line or the cure."""


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
    """A folder to write the files of `index` in; it takes the place of `index` when the block ends without an error.

    Raises CorpusError when the disk is full; what stood at `index` before is then untouched.
    """
    pending = index.with_name(index.name + ".tmp")
    shutil.rmtree(pending, ignore_errors=True)
    try:
        pending.mkdir(parents=True)
        yield pending
        old = index.with_name(index.name + ".old")
        if index.exists():
            index.rename(old)
        pending.rename(index)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        cut_short = error.errno is None and "written" in str(error)  # numpy's words for a short write
        if cut_short or error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise CorpusError(f"{index}: the disk is full ({error}); make room or choose another --save_dir") from error
        raise
    finally:
        shutil.rmtree(pending, ignore_errors=True)


def write_manifest(folder: Path, **entries: Any) -> None:
    """Writes `entries` with the size of every file in `folder`."""
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
    text = json.dumps({**entries, "files": files}, indent=1)
    with (folder / MANIFEST).open("w", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_manifest(index: Path) -> dict[str, Any]:
    """The manifest of a complete index. Raises CorpusError when there is none, or a file is missing or cut short."""
    if not (index / MANIFEST).is_file():
        raise CorpusError(f"{index}: no index here (no {MANIFEST})")
    manifest = json.loads((index / MANIFEST).read_text(encoding="utf-8"))
    for name, size in manifest["files"].items():
        path = index / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes, the manifest says {size}"
            raise CorpusError(f"{path} {state}: the index is damaged, build it again (--overwrite)")
    return manifest


def check_corpus(manifest: dict[str, Any], index: Path, corpus: Path) -> None:
    """Raises CorpusError unless `corpus` is the file that `index` was built from."""
    if not corpus.is_file():
        raise CorpusError(f"{corpus}: no such file")
    if fingerprint(corpus) != manifest["corpus"]:
        raise CorpusError(
            f"{corpus} is not the corpus that {index} was built from: build the index again (--overwrite)"
        )
