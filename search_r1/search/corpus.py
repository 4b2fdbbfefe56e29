"""Corpora: read from any source when an index is built, mapped into memory when it is served."""

import codecs
import gzip
import hashlib
import json
import math
import mmap
import os
import re
from array import array
from collections.abc import Iterator
from contextlib import suppress
from datetime import date, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import IO, Any, cast
from uuid import UUID, uuid4

import numpy as np
from tqdm import tqdm

from search_r1.search.extras import require
from search_r1.search.manifest import SAMPLES, CorpusError, check_corpus, fingerprint

OFFSETS = "offsets.npy"
DOCUMENTS = "documents.jsonl"
HUB = "hf:"
PLAIN = (".jsonl", ".json")
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]|\xed[\xa0-\xbf]")
"""Half of a surrogate pair in a line of JSON: escaped, or as bytes that are no UTF-8 but that
Python's reader takes."""


class CorpusReader:
    """A corpus to be indexed: `.jsonl`, `.json`, either gzipped, `.parquet`, or `hf:NAME[:SPLIT]`,
    a set of the hub.

    A document has `id` and `contents`; of `title` and `text` instead of `contents` those are made.
    A file of JSON holds one document a line, blank lines aside, or an array of them.
    """

    def __init__(self, source: str | Path, skip_bad: bool = False) -> None:
        """Raises CorpusError when there is no such file."""
        self.source = str(source)
        self.skip_bad = skip_bad
        self.bad = 0
        self.is_hub = self.source.startswith(HUB)
        if not self.is_hub and not Path(self.source).is_file():
            raise CorpusError(f"{self.source}: no such file")
        self.is_array = not self.is_hub and is_array(Path(self.source))
        self.is_plain = self.source.endswith(PLAIN) and not self.is_array

    def fingerprint(self) -> dict[str, Any]:
        """What the manifest keeps of the source."""
        return {"hub": self.source} if self.is_hub else fingerprint(Path(self.source))

    def store(self, folder: Path) -> Iterator[dict[str, Any]]:
        """Every document; leaves in `folder` what `Corpus` needs: the line offsets, and a JSONL
        copy of other sources.

        Raises CorpusError for a bad line or a second id, unless bad ones are skipped: then `bad`
        counts them.
        """
        offsets = array("q")
        seen = set[int]()
        offset = 0
        with Path(os.devnull if self.is_plain else folder / DOCUMENTS).open("wb") as copy:
            for place, record in self._records():
                size = len(record) if isinstance(record, bytes) else 0
                if isinstance(record, bytes) and not record.strip():
                    offset += size if self.is_plain else 0
                    continue
                try:
                    document = to_document(record, place)
                    digest = hash_of(document["id"])
                    if digest in seen:
                        raise CorpusError(f"{place}: id {document['id']!r} occurs a second time")
                    seen.add(digest)
                    offsets.append(offset)
                    if not self.is_plain:
                        size = copy.write(encoded(document, place) + b"\n")
                    yield document
                except CorpusError:
                    if not self.skip_bad:
                        raise
                    self.bad += 1
                    size = size if self.is_plain else 0
                offset += size
        if not offsets:
            raise CorpusError(f"{self.source}: no documents")
        np.save(folder / OFFSETS, np.frombuffer(offsets, dtype=np.int64))

    def _records(self) -> Iterator[tuple[str, bytes | dict[str, Any]]]:
        """(where it stands, line or row), with a progress bar."""
        if self.is_hub:
            yield from self._hub_rows()
        elif self.source.endswith(".parquet"):
            yield from self._parquet_rows()
        elif self.is_array:
            yield from self._entries()
        else:
            yield from self._lines()

    def _lines(self) -> Iterator[tuple[str, bytes]]:
        path = Path(self.source)
        with (
            path.open("rb") as raw,
            tqdm(total=path.stat().st_size, unit="B", unit_scale=True, desc="corpus") as bar,
        ):
            lines = gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw
            for number, line in enumerate(lines, 1):
                yield f"{path}, line {number}", line
                if number % 1000 == 0:
                    bar.update(raw.tell() - bar.n)
            bar.update(raw.tell() - bar.n)

    def _entries(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Of a JSON array, which is read whole."""
        path = Path(self.source)
        try:
            with opened(path) as file:
                entries = json.load(file)
        except ValueError as error:
            raise CorpusError(f"{path}: begins like a JSON array, and is none ({error})") from error
        for number, entry in enumerate(
            tqdm(entries, unit="documents", unit_scale=True, desc="corpus")
        ):
            yield f"{path}, entry {number}", entry

    def _parquet_rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        from pyarrow.parquet import ParquetFile

        file = ParquetFile(self.source)
        with tqdm(total=file.metadata.num_rows, unit="rows", unit_scale=True, desc="corpus") as bar:
            number = 0
            for batch in file.iter_batches(1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{self.source}, row {number}", row
                bar.update(batch.num_rows)

    def _hub_rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        require("hub", self.source)
        from datasets import load_dataset

        name, _, split = self.source.removeprefix(HUB).partition(":")
        rows: Any = load_dataset(name, split=split or "train", streaming=True)
        for number, row in enumerate(tqdm(rows, unit="rows", unit_scale=True, desc="corpus"), 1):
            yield f"{self.source}, row {number}", row


def opened(path: Path) -> IO[bytes]:
    """A file for reading, its contents where it is gzipped."""
    return cast("IO[bytes]", gzip.open(path)) if path.suffix == ".gz" else path.open("rb")


def is_array(path: Path) -> bool:
    """Whether a file of JSON is one array of documents, not a document a line."""
    if not path.name.removesuffix(".gz").endswith(PLAIN):
        return False
    with opened(path) as file:
        while block := file.read(1024):
            if text := block.removeprefix(codecs.BOM_UTF8).lstrip():
                return text.startswith(b"[")
    return False


def encoded(document: dict[str, Any], place: str) -> bytes:
    """A document as a line of JSON. Raises CorpusError naming `place` for what JSON has no form
    for.

    Dates and times are written as ISO 8601, exact decimals, durations and UUIDs as texts, numbers
    that are not finite as null, because no answer of the server could carry them.
    """
    try:
        try:
            text = json.dumps(document, ensure_ascii=False, allow_nan=False, default=as_text)
        except ValueError:
            text = json.dumps(
                finite(document), ensure_ascii=False, allow_nan=False, default=as_text
            )
        return text.encode()
    except UnicodeEncodeError as error:
        raise CorpusError(
            f"{place}: half of a surrogate pair, which no answer can carry"
        ) from error
    except (TypeError, ValueError) as error:
        raise CorpusError(f"{place}: {error}") from error


def as_text(value: Any) -> str:
    """What JSON holds of a value that is no number, text, list or object. Raises TypeError for what
    it cannot hold."""
    if isinstance(value, date | time):
        return value.isoformat()
    if isinstance(value, Decimal | timedelta | UUID):
        return str(value)
    raise TypeError(
        f"JSON has no form for a value of type {type(value).__name__}: leave its column out"
    )


def finite(value: Any) -> Any:
    """`value` with None in the place of numbers that are not finite."""
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def to_document(record: bytes | dict[str, Any], place: str) -> dict[str, Any]:
    """The document of a line or a row. Raises CorpusError unless it has `id` and `contents`, or
    `title` and `text`."""
    try:
        document = json.loads(record) if isinstance(record, bytes) else record
    except ValueError as error:
        raise CorpusError(f"{place}: not JSON ({error})") from error
    if isinstance(record, bytes) and SURROGATE.search(record) and not is_encodable(document):
        raise CorpusError(
            f"{place}: half of a surrogate pair, which no answer can carry (such as \\ud83d alone)"
        )
    if isinstance(document, dict) and document.get("id") is not None:
        if isinstance(document.get("contents"), str):
            return document
        if isinstance(document.get("title"), str) and isinstance(document.get("text"), str):
            return {**document, "contents": contents(document["title"], document["text"])}
    raise CorpusError(
        f'{place}: expected an object with "id" and "contents" (a string), or "id", "title" '
        'and "text"'
    )


def is_encodable(document: object) -> bool:
    """Whether every text in it can be written as UTF-8: two halves of a pair can, one alone
    cannot."""
    try:
        json.dumps(document, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def contents(title: str, text: str) -> str:
    """`"Title"`, a line break, the text: what `contents` holds."""
    title = title.strip('"')
    return f'"{title}"\n{text}'


def hash_of(id: object) -> int:
    """64 bits: a set of them is a third of a set of strings."""
    return int.from_bytes(hashlib.blake2b(str(id).encode(), digest_size=8).digest(), "little")


class Corpus:
    """`corpus[i]` is document `i` in the order of the file, which is mapped; only the offsets of
    its lines are kept."""

    def __init__(self, path: Path, offsets: np.ndarray) -> None:
        self.path = path
        self.offsets = offsets
        with path.open("rb") as file:
            self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    @classmethod
    def of_index(cls, index: Path, manifest: dict[str, Any], corpus: Path | None) -> "Corpus":
        """The corpus of an index. Raises CorpusError when `corpus` is not the file that the index
        was built from."""
        own_copy = index / DOCUMENTS
        if corpus is not None and not str(corpus).startswith(HUB):
            check_corpus(manifest, index, corpus)
        elif not own_copy.exists():
            raise CorpusError(f"{index} needs its corpus: name the file with --corpus_path")
        path = own_copy if own_copy.exists() or corpus is None else corpus
        return cls(path, np.load(index / OFFSETS, mmap_mode="r"))

    @classmethod
    def of_lines(cls, path: Path) -> "Corpus":
        """A JSONL corpus without an index folder; the offsets are found once and kept beside it.

        Raises CorpusError for a corpus of another form, which only an index of the builder can
        serve: it has a copy.
        """
        if not path.is_file():
            raise CorpusError(f"{path}: no such file")
        if not path.name.endswith(PLAIN) or is_array(path):
            raise CorpusError(
                f"{path}: expected JSONL, one document a line; other forms are read by the index "
                "builder"
            )
        kept = path.with_name(path.name + ".offsets.npy")
        if not (
            kept.exists() and kept.stat().st_mtime >= path.stat().st_mtime and fits(kept, path)
        ):
            offsets = line_offsets(path)
            try:
                save_whole(kept, offsets)
            except OSError:  # a read-only folder: they are found again next time
                return cls(path, offsets)
        return cls(path, np.load(kept, mmap_mode="r"))

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, i: int) -> dict[str, Any]:
        start = int(self.offsets[i])
        end = self.data.find(b"\n", start)
        line = self.data[start : end if end >= 0 else len(self.data)]
        return to_document(line, f"{self.path}, document {i}")


def save_whole(path: Path, values: np.ndarray) -> None:
    """Writes `path` at one stroke: several servers may start over one corpus, and one may be
    killed."""
    pending = path.with_name(f"{path.name}.{uuid4().hex}.tmp")
    try:
        with pending.open("wb") as file:
            np.save(file, values)
        pending.replace(path)
    finally:
        with suppress(OSError):  # of a read-only file system, even where there is nothing to remove
            pending.unlink(missing_ok=True)


def line_offsets(path: Path, block: int = 1 << 26) -> np.ndarray:
    """Byte offset of every line, with a progress bar."""
    found = [np.zeros(1, dtype=np.int64)]
    position = 0
    size = path.stat().st_size
    with (
        path.open("rb") as file,
        tqdm(total=size, unit="B", unit_scale=True, desc="line offsets") as bar,
    ):
        while data := file.read(block):
            found.append(
                np.flatnonzero(np.frombuffer(data, dtype=np.uint8) == ord("\n")) + position + 1
            )
            position += len(data)
            bar.update(len(data))
    offsets = np.concatenate(found)
    offsets = offsets[offsets < size]
    return offsets[~blank_lines(path, offsets)] if size else offsets


def blank_lines(path: Path, offsets: np.ndarray) -> np.ndarray:
    """bool, one an offset: which lines hold nothing but white space."""
    blank = np.zeros(len(offsets), dtype=bool)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        first_bytes = np.frombuffer(data, dtype=np.uint8)[offsets]
        for i in np.flatnonzero(np.isin(first_bytes, list(b" \t\r\n"))):
            end = data.find(b"\n", int(offsets[i]))
            blank[i] = not data[int(offsets[i]) : end if end >= 0 else len(data)].strip()
    return blank


def fits(kept: Path, path: Path) -> bool:
    """Whether offsets were found in this very file, as far as 64 of them tell: each begins a line.

    The time of a file tells nothing where an older one was put in its place.
    """
    offsets = np.load(kept, mmap_mode="r")
    if not len(offsets) or offsets[-1] >= path.stat().st_size:
        return False
    sample = np.unique(np.linspace(0, len(offsets) - 1, SAMPLES).astype(np.int64))
    with path.open("rb") as file:
        for offset in offsets[sample].tolist():
            file.seek(max(0, offset - 1))
            if offset > 0 and file.read(1) != b"\n":
                return False
        file.seek(int(offsets[-1]))
        file.readline()
        return not file.read(1 << 16).strip()
