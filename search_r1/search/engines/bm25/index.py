"""Writes and reads the files of a BM25 index: postings, bounds for skipping them, vocabulary.

The files are mapped into memory when the index is read.
"""

from bisect import bisect_left
from pathlib import Path

import numpy as np

from search_r1.search.engines.bm25.arrays import Postings, Room
from search_r1.search.engines.bm25.compiled import compiled
from search_r1.search.engines.bm25.postings import (
    K1,
    B,
    Gatherer,
    allocate,
    document_frequencies,
    write_postings,
)
from search_r1.search.engines.bm25.score import CHUNK, RANGE, TOP_LEVEL

FREQUENT = 256
"""A word is frequent if more than one in so many documents has it. The index holds the highest
score of frequent words in every range."""
MAX_KEPT_WORDS = 1 << 20
MORE_THAN_ROUNDING = 1e-4


def new_room(postings: Postings) -> Room:
    """Allocates the memory that one thread needs to search an index."""
    ranges = postings.maxima.shape[1]
    bounds = np.zeros(ranges, dtype=np.uint16)
    chunk_bounds = np.zeros(ranges // CHUNK, dtype=np.uint16)
    return Room(bounds, chunk_bounds, np.zeros(RANGE), np.zeros(256, dtype=np.int64))


def length_bytes(lengths: np.ndarray) -> np.ndarray:
    """Document lengths in one byte each, as Lucene keeps them: uint8 [D].

    They are exact below 40, and have four significant bits above.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    excess = np.maximum(lengths - 24, 0)
    bits = np.frexp(excess.astype(np.float64))[1].astype(np.int64)
    shift = np.maximum(bits - 4, 0)
    floating = (excess >> shift & 7) | (shift + 1) << 3
    coded_excess = np.where(bits < 4, excess, floating)
    return np.where(lengths < 24, lengths, 24 + coded_excess).astype(np.uint8)


def length_of_bytes() -> np.ndarray:
    """The length that each byte stands for: float32 [256]."""
    lengths = np.arange(256, dtype=np.int64)
    shift = (lengths - 24 >> 3) - 1
    digits = lengths - 24 & 7
    floating = np.where(shift < 0, digits, (digits | 8) << np.maximum(shift, 0))
    return np.where(lengths < 24, lengths, 24 + floating).astype(np.float32)


def inverse_norms(average_length: float) -> np.ndarray:
    """1 / (k1 (1 - b + b length / average)) by length byte, in Lucene's order of operations.

    float32 [256].
    """
    k1 = np.float32(K1)
    b = np.float32(B)
    relative = b * length_of_bytes() / np.float32(average_length)
    return np.float32(1) / (k1 * ((np.float32(1) - b) + relative))


def write_index(gathered: Gatherer, folder: Path) -> None:
    """Writes everything but manifest and corpus to `folder`."""
    numbers = write_vocabulary(gathered.vocabulary, folder)
    lengths = np.frombuffer(gathered.lengths, dtype=np.int32)
    whole_lengths = (lengths + gathered.own_weight // 2) // gathered.own_weight
    kept_lengths = length_bytes(whole_lengths)
    starts, exceptions, counts = write_postings(gathered, numbers, kept_lengths, folder)
    with_words = int(np.count_nonzero(lengths))
    frequency = document_frequencies(gathered, numbers, starts)
    np.save(folder / "idf.npy", inverse_frequencies(frequency, with_words))
    write_statistics(folder, starts, exceptions, counts, lengths, gathered.own_weight)


def write_statistics(
    folder: Path,
    starts: np.ndarray,
    exceptions: np.ndarray,
    counts: np.ndarray,
    lengths: np.ndarray,
    own_weight: int,
) -> None:
    """Writes what is derived from the postings: scores by code, highest scores of words.

    `counts` are the occurrences of the postings at `exceptions`, `lengths` those of the documents.
    Both are `own_weight` times what the formula gets, as in `Gatherer`.
    """
    with_words = int(np.count_nonzero(lengths))
    average = max(1.0, lengths.sum(dtype=np.int64) / own_weight / max(1, with_words))
    norms = inverse_norms(average)
    codes = np.load(folder / "posting_codes.npy", mmap_mode="r")
    occurrences = np.arange(256, dtype=np.float32) / np.float32(own_weight)
    divisors = (np.float32(1) + occurrences[:, None] * norms).ravel()
    levels = levels_of(divisors)
    exception_norms = norms[codes[exceptions]]  # the code of an exception is only the length byte
    exception_occurrences = counts.astype(np.float32) / np.float32(own_weight)
    exception_divisors = np.float32(1) + exception_occurrences * exception_norms
    np.save(folder / "starts.npy", starts)
    np.save(folder / "divisors.npy", divisors)
    np.save(folder / "levels.npy", levels)
    np.save(folder / "exceptions.npy", exceptions)
    np.save(folder / "exception_divisors.npy", exception_divisors)
    write_maxima(folder, starts, levels, len(lengths))


def inverse_frequencies(frequency: np.ndarray, documents: int) -> np.ndarray:
    """Lucene's inverse document frequency of words that occur in so many documents: float32 [T]."""
    return np.log1p((documents - frequency + 0.5) / (frequency + 0.5)).astype(np.float32)


def levels_of(divisors: np.ndarray) -> np.ndarray:
    """1 - 1 / divisor in steps of 1/255, rounded up: uint8 [65536].

    Codes without occurrences get the highest level, because their postings are exceptions.
    """
    shares = 1 - 1 / divisors.astype(np.float64)
    levels = np.ceil(shares * TOP_LEVEL + MORE_THAN_ROUNDING).clip(0, TOP_LEVEL).astype(np.uint8)
    levels[:256] = TOP_LEVEL
    return levels


def write_maxima(folder: Path, starts: np.ndarray, levels: np.ndarray, documents: int) -> None:
    """Writes the highest level of every word, and for frequent words that of every range."""
    frequency = np.diff(starts)
    frequent = np.flatnonzero(frequency > documents / FREQUENT)
    rows = np.full(len(frequency), -1, dtype=np.int32)
    rows[frequent] = np.arange(len(frequent))
    np.save(folder / "rows.npy", rows)

    documents_of = np.load(folder / "posting_documents.npy", mmap_mode="r")
    codes = np.load(folder / "posting_codes.npy", mmap_mode="r")
    highest = np.zeros(len(frequency), dtype=np.uint8)
    fill_highest(starts, np.asarray(codes), levels, highest)
    np.save(folder / "highest_levels.npy", highest)

    chunks = -(-documents // (RANGE * CHUNK))
    maxima = allocate(folder / "maxima.npy", "u1", (len(frequent), chunks * CHUNK))
    chunk_starts = allocate(folder / "chunk_starts.npy", "u4", (len(frequent), chunks + 1))
    for row, term in enumerate(frequent):
        part = slice(starts[term], starts[term + 1])
        fill_row(
            np.asarray(documents_of[part]),
            np.asarray(codes[part]),
            levels,
            maxima[row],
            chunk_starts[row],
            RANGE,
            CHUNK,
        )


@compiled
def fill_highest(starts, codes, levels, highest):
    """Fills `highest`: the highest level of each word."""
    for term in range(highest.shape[0]):
        for position in range(starts[term], starts[term + 1]):
            highest[term] = max(highest[term], levels[codes[position]])


@compiled
def fill_row(documents, codes, levels, maxima, chunk_starts, range_size, chunk_size):
    """Fills the two tables of one frequent word.

    `maxima` is its highest level in every range, `chunk_starts` the number of its postings before
    every chunk.
    """
    for position in range(documents.shape[0]):
        number = documents[position] // range_size
        maxima[number] = max(maxima[number], levels[codes[position]])
        chunk_starts[number // chunk_size + 1] += 1
    for chunk in range(chunk_starts.shape[0] - 1):
        chunk_starts[chunk + 1] += chunk_starts[chunk]


def read_postings(folder: Path) -> Postings:
    """Maps the files of an index that the scorer needs."""
    names = {
        "documents": "posting_documents",
        "codes": "posting_codes",
        "offsets": "chunk_starts",
        "best_levels": "highest_levels",
    }
    return Postings(
        *(mapped(folder / f"{names.get(field, field)}.npy") for field in Postings._fields)
    )


def mapped(path: Path) -> np.ndarray:
    """Maps the array in a file, read-only."""
    values = np.load(path, mmap_mode="r")
    return np.asarray(values).view(np.ndarray)


def write_vocabulary(vocabulary: dict[str, int], folder: Path) -> np.ndarray:
    """Writes the words in the order of their bytes.

    Returns the number that each gathered word has in this order: int32 [T].
    """
    words = sorted(
        (word.encode("utf-8", "surrogatepass"), number) for word, number in vocabulary.items()
    )
    offsets = np.zeros(len(words) + 1, dtype=np.int64)
    numbers = np.zeros(len(words), dtype=np.int32)
    with (folder / "vocabulary.bin").open("wb") as file:
        for position, (word, number) in enumerate(words):
            file.write(word)
            offsets[position + 1] = offsets[position] + len(word)
            numbers[number] = position
    np.save(folder / "vocabulary_offsets.npy", offsets)
    return numbers


class Vocabulary(dict[str, int]):
    """`vocabulary[word]` is the number of a word, -1 for an unknown word.

    Words that have been looked up are kept in memory.
    """

    def __init__(self, folder: Path) -> None:
        self.offsets = np.load(folder / "vocabulary_offsets.npy", mmap_mode="r")
        path = folder / "vocabulary.bin"
        self.letters = (
            np.memmap(path, np.uint8, "r") if path.stat().st_size else np.zeros(0, np.uint8)
        )

    def __missing__(self, word: str) -> int:
        letters = word.encode("utf-8", "surrogatepass")
        words = range(len(self.offsets) - 1)
        position = bisect_left(words, letters, key=self._word)
        number = position if position < len(words) and self._word(position) == letters else -1
        if len(self) < MAX_KEPT_WORDS:
            self[word] = number
        return number

    def _word(self, number: int) -> bytes:
        return self.letters[self.offsets[number] : self.offsets[number + 1]].tobytes()
