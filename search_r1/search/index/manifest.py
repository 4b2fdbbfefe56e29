"""The manifest of an index, which says what the index is and what it was made from."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from search_r1.search.errors import CorpusError

MANIFEST = "manifest.json"
SAMPLES = 64
"""The number of blocks of a file from which its fingerprint is made."""
SAMPLE_BYTES = 1 << 16


def fingerprint(path: Path) -> dict[str, Any]:
    """The size of a file and a hash of 64 evenly spaced blocks of it.

    It tells files apart without reading all of a large corpus (14 GB for wiki-18).
    """
    size = path.stat().st_size
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for i in range(SAMPLES):
            file.seek(max(0, (size - SAMPLE_BYTES) * i // (SAMPLES - 1)))
            digest.update(file.read(SAMPLE_BYTES))
    return {"bytes": size, "sha256_of_samples": digest.hexdigest()}


def write_manifest(folder: Path, **entries: Any) -> None:
    """Writes `entries` with the size of every file in `folder`."""
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
    text = json.dumps({**entries, "files": files}, indent=1)
    with (folder / MANIFEST).open("w", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_manifest(index: Path) -> dict[str, Any]:
    """Reads the manifest of a complete index.

    Raises CorpusError when there is no manifest, it cannot be read, or a file that it names is
    missing or of another size.
    """
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
        check_size(index / name, size, cure)
    return manifest


def check_size(path: Path, size: int, cure: str) -> None:
    """Raises CorpusError, with `cure` as advice, unless the file exists and has `size` bytes."""
    if not path.is_file():
        raise CorpusError(f"{path} is missing: {cure}")
    found = path.stat().st_size
    if found != size:
        raise CorpusError(f"{path} has {found} bytes, the manifest says {size}: {cure}")


def check_corpus(manifest: dict[str, Any], index: Path, corpus: Path) -> None:
    """Raises CorpusError unless `corpus` is the file that `index` was built from."""
    if not corpus.is_file():
        raise CorpusError(f"{corpus}: no such file")
    if fingerprint(corpus) != manifest["corpus"]:
        raise CorpusError(
            f"{corpus} is not the corpus that {index} was built from: build the index again "
            "(--overwrite)"
        )
