"""Reads corpora of any form, when an index is built."""

import codecs
import gzip
import hashlib
import json
import os
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
from tqdm import tqdm

from search_r1.search.errors import CorpusError
from search_r1.search.extras import require
from search_r1.search.index.documents import encoded, to_document
from search_r1.search.index.manifest import fingerprint

OFFSETS = "offsets.npy"
DOCUMENTS = "documents.jsonl"
HUB = "hf:"
PLAIN = (".jsonl", ".json")


class CorpusReader:
    """A corpus to be indexed.

    The source is a `.jsonl` or `.json` file, which may be gzipped, a `.parquet` file, or
    `hf:NAME[:SPLIT]`, a data set of the Hugging Face hub. A document has `id` and `contents`, or
    `id`, `title` and `text`, from which `contents` is made. A JSON file holds one document per
    line, with blank lines allowed, or an array of documents.
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
        """The fingerprint of the source, which the manifest keeps."""
        return {"hub": self.source} if self.is_hub else fingerprint(Path(self.source))

    def store(self, folder: Path) -> Iterator[dict[str, Any]]:
        """Yields every document, and writes to `folder` what `Corpus` needs to serve them.

        These are the offsets of the lines, and a copy as JSONL if the source is of another form.
        Raises CorpusError for a bad document or a repeated id. If bad documents are skipped, `bad`
        counts them instead.
        """
        offsets = array("q")
        ids = set[int]()
        offset = 0
        with Path(os.devnull if self.is_plain else folder / DOCUMENTS).open("wb") as copy:
            for location, record in self._records():
                if not (isinstance(record, bytes) and not record.strip()):
                    try:
                        document, line = self._read(record, location, ids)
                    except CorpusError:
                        if not self.skip_bad:
                            raise
                        self.bad += 1
                    else:
                        offsets.append(offset)
                        offset += copy.write(line)
                        yield document
                if self.is_plain:
                    offset += len(record)
        if not offsets:
            raise CorpusError(f"{self.source}: no documents")
        np.save(folder / OFFSETS, np.frombuffer(offsets, dtype=np.int64))

    def _read(
        self, record: bytes | dict[str, Any], location: str, ids: set[int]
    ) -> tuple[dict[str, Any], bytes]:
        """Returns the document and its line in the copy, and adds its id to `ids`.

        The line is empty if the source itself is served and there is no copy. Raises CorpusError
        for a bad document, or an id that is in `ids` already.
        """
        document = to_document(record, location)
        id = hash_of(document["id"])
        if id in ids:
            raise CorpusError(f"{location}: id {document['id']!r} occurs a second time")
        line = b"" if self.is_plain else encoded(document, location) + b"\n"
        ids.add(id)
        return document, line

    def _records(self) -> Iterator[tuple[str, bytes | dict[str, Any]]]:
        """Yields the location and the line or row of each record, with a progress bar."""
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
        """Yields the entries of a JSON array, which is read whole."""
        path = Path(self.source)
        try:
            with opened(path) as file:
                entries = json.load(file)
        except ValueError as error:
            raise CorpusError(f"{path}: begins like a JSON array, and is none ({error})") from error
        bar = tqdm(entries, unit="documents", unit_scale=True, desc="corpus")
        for number, entry in enumerate(bar):
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
    """Opens a file for reading; a gzipped file is decompressed."""
    return cast("IO[bytes]", gzip.open(path)) if path.suffix == ".gz" else path.open("rb")


def is_array(path: Path) -> bool:
    """Whether a JSON file is one array of documents instead of one document per line."""
    if not path.name.removesuffix(".gz").endswith(PLAIN):
        return False
    with opened(path) as file:
        while block := file.read(1024):
            if text := block.removeprefix(codecs.BOM_UTF8).lstrip():
                return text.startswith(b"[")
    return False


def hash_of(id: object) -> int:
    """A hash of 64 bits of an id. A set of them takes a third of the memory of a set of texts."""
    return int.from_bytes(hashlib.blake2b(str(id).encode(), digest_size=8).digest(), "little")
