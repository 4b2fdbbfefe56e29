"""A JSONL corpus, read in place: the file is mapped, only the offsets of its lines are kept."""

import hashlib
import json
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

OFFSETS, FINGERPRINT = "offsets.npy", "corpus.json"
HASHED_BYTES = 1 << 20


class CorpusError(ValueError):
    """A corpus that cannot be used; the message names file and line."""


def read_documents(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(byte offset, document) of every line, with a progress bar. Raises CorpusError for a bad line or a second id."""
    if not path.is_file():
        raise CorpusError(f"{path}: no such file")
    ids, offset = set(), 0
    with path.open("rb") as file, tqdm(total=path.stat().st_size, unit="B", unit_scale=True, desc="corpus") as bar:
        for number, line in enumerate(file, 1):
            document = parse_line(line, f"{path}, line {number}")
            if document["id"] in ids:
                raise CorpusError(f"{path}, line {number}: id {document['id']!r} occurs a second time")
            ids.add(document["id"])
            yield offset, document
            offset += len(line)
            bar.update(len(line))
    if not ids:
        raise CorpusError(f"{path}: no documents")


def parse_line(line: bytes, place: str) -> dict[str, Any]:
    """The document of one line. Raises CorpusError unless it has `id` and `contents`."""
    try:
        document = json.loads(line)
    except ValueError as error:
        raise CorpusError(f"{place}: not JSON ({error})") from error
    if not isinstance(document, dict) or "id" not in document or not isinstance(document.get("contents"), str):
        raise CorpusError(f'{place}: expected an object with "id" and "contents" (a string)')
    return document


def fingerprint(path: Path) -> dict[str, Any]:
    """Size and a hash of beginning and end: tells corpora apart without reading them whole."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(HASHED_BYTES)
        file.seek(max(0, size - HASHED_BYTES))
        digest = hashlib.sha256(head + file.read()).hexdigest()
    return {"size": size, "sha256_of_ends": digest}


class Corpus:
    """`corpus[i]` is document `i`, in the order of the file."""

    def __init__(self, path: Path, index: Path) -> None:
        """Raises CorpusError when the file is missing or not the one that `index` was built from."""
        if not path.is_file():
            raise CorpusError(f"{path}: no such file")
        if fingerprint(path) != json.loads((index / FINGERPRINT).read_text()):
            raise CorpusError(
                f"{path} is not the corpus that {index} was built from: build the index again (--overwrite)"
            )
        self.offsets = np.load(index / OFFSETS, mmap_mode="r")
        with path.open("rb") as file:
            self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, i: int) -> dict[str, Any]:
        start = int(self.offsets[i])
        end = int(self.offsets[i + 1]) if i + 1 < len(self.offsets) else len(self.data)
        return json.loads(self.data[start:end])
