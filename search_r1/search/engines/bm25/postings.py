"""Gathers the occurrences of words by document, and sorts them by word in bounded memory."""

import os
from array import array
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

K1 = 0.9
B = 0.4
"""The parameters of BM25, as Anserini has them."""
BLOCK = 20_000_000
"""Number of postings that are sorted at a time, which bounds the memory of a build."""
MAX_CODED = 255
"""The most occurrences in one document that fit into the code of a posting."""


class Gatherer:
    """Collects the occurrences of words, and writes them to `scratch` in sorted blocks.

    A word of a document counts `own_weight` times, and a word that was added to it once: all
    occurrences and lengths are so many times what the formula of BM25 gets.
    """

    def __init__(self, scratch: Path, own_weight: int = 1, expands: bool = False) -> None:
        self.scratch = scratch
        self.own_weight = own_weight
        self.own_documents: Counter[int] | None = Counter() if expands else None
        """The number of documents that have a word of their own, where words are added."""
        self.vocabulary: dict[str, int] = {}
        self.lengths = array("i")
        self.blocks = 0
        self._empty()

    def _empty(self) -> None:
        self.terms = array("i")
        self.documents = array("i")
        self.counts = array("H")

    def add(self, stems: list[str], added: Sequence[str] = ()) -> None:
        """Adds the stems of the next document, and those by which it is expanded."""
        number = len(self.lengths)
        self.lengths.append(self.own_weight * len(stems) + len(added))
        counts: dict[int, int] = {}
        for stem in stems:
            term = self.vocabulary.setdefault(stem, len(self.vocabulary))
            counts[term] = counts.get(term, 0) + self.own_weight
        if self.own_documents is not None:
            self.own_documents.update(counts.keys())
        for stem in added:
            term = self.vocabulary.setdefault(stem, len(self.vocabulary))
            counts[term] = counts.get(term, 0) + 1
        self.terms.extend(counts)
        self.documents.extend([number] * len(counts))
        self.counts.extend(min(count, 65535) for count in counts.values())
        if len(self.terms) >= BLOCK:
            self.spill()

    def spill(self) -> None:
        """Writes the collected block sorted by word; within a word documents stay in order."""
        terms = np.frombuffer(self.terms, dtype=np.int32)
        order = np.argsort(terms, kind="stable")
        columns = {"terms": terms, "documents": self.documents, "counts": self.counts}
        for name, values in columns.items():
            np.save(self._path(name, self.blocks), np.asarray(values)[order])
        self._empty()
        self.blocks += 1

    def load(self, name: str, block: int) -> np.ndarray:
        """Loads a column of a block."""
        return np.load(self._path(name, block))

    def _path(self, name: str, block: int) -> Path:
        return self.scratch / f"{name}.{block}.npy"


def write_postings(
    gathered: Gatherer, numbers: np.ndarray, length_bytes: np.ndarray, folder: Path
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Writes the documents and codes of all postings to `folder`, word after word.

    `numbers` [T] gives each gathered word its number in the index, `length_bytes` [D] each document
    its length. Returns (starts [T + 1], the positions of postings with too many occurrences for a
    code, those occurrences).
    """
    if gathered.terms:
        gathered.spill()
    words = len(gathered.vocabulary)
    starts = starts_of_words(gathered, numbers)
    filled = starts[:-1].copy()
    all_documents = allocate(folder / "posting_documents.npy", "i4", (int(starts[-1]),))
    all_codes = allocate(folder / "posting_codes.npy", "u2", (int(starts[-1]),))
    exceptions = [np.zeros(0, dtype=np.int64)]
    exception_counts = [np.zeros(0, dtype=np.int64)]
    for block in range(gathered.blocks):
        terms = numbers[gathered.load("terms", block)]
        documents = gathered.load("documents", block)
        counts = gathered.load("counts", block).astype(np.int64)
        positions = filled[terms] + numbers_within_word(terms)
        all_documents[positions] = documents
        all_codes[positions] = codes_of(counts, length_bytes[documents])
        exceeds = counts > MAX_CODED
        exceptions.append(positions[exceeds])
        exception_counts.append(counts[exceeds])
        filled += np.bincount(terms, minlength=words)
    positions = np.concatenate(exceptions)
    order = np.argsort(positions)
    return starts, positions[order], np.concatenate(exception_counts)[order]


def document_frequencies(gathered: Gatherer, numbers: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """The number of documents by which the rarity of each word is judged: int64 [T].

    Where words are added these are the documents that have the word of their own, because being
    added makes no word less telling; for a word that none has, those it was added to.
    """
    frequency = np.diff(starts)
    if gathered.own_documents is not None:
        words = np.fromiter(gathered.own_documents.keys(), np.int64)
        own = np.fromiter(gathered.own_documents.values(), np.int64)
        frequency[numbers[words]] = own
    return frequency


def codes_of(counts: np.ndarray, length_bytes: np.ndarray) -> np.ndarray:
    """The code of each posting: 256 * occurrences + length byte, without occurrences above
    MAX_CODED."""
    return np.where(counts <= MAX_CODED, counts << 8, 0) | length_bytes


def starts_of_words(gathered: Gatherer, numbers: np.ndarray) -> np.ndarray:
    """The position of each word's first posting, and the number of all: int64 [T + 1]."""
    words = len(gathered.vocabulary)
    frequency = np.zeros(words, dtype=np.int64)
    for block in range(gathered.blocks):
        frequency += np.bincount(numbers[gathered.load("terms", block)], minlength=words)
    return np.concatenate([[0], np.cumsum(frequency)])


def numbers_within_word(terms: np.ndarray) -> np.ndarray:
    """The number of postings of the same word before each one; `terms` must be grouped by word."""
    first = np.flatnonzero(np.diff(terms, prepend=-1))
    lengths = np.diff(first, append=len(terms))
    return np.arange(len(terms)) - np.repeat(first, lengths)


def allocate(path: Path, kind: str, shape: tuple[int, ...]) -> np.ndarray:
    """Makes an array in a mapped file, and reserves its disk space.

    Without that a disk that becomes full later would kill the process.
    """
    if 0 in shape:
        np.save(path, np.zeros(shape, kind))
        return np.zeros(shape, kind)
    values = np.lib.format.open_memmap(path, "w+", np.dtype(kind), shape)
    with path.open("r+b") as file:
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return values
