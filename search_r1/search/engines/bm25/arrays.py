"""The arrays that the compiled functions of `score` work on."""

from typing import NamedTuple

import numpy as np


class Postings(NamedTuple):
    """What the scorer reads of an index, mapped into memory.

    T words, P postings, F frequent words, D documents.
    """

    starts: np.ndarray
    """int64 [T + 1]: the postings of word t are starts[t] to starts[t + 1], in the order of the
    documents."""
    documents: np.ndarray
    """int32 [P]: position of the document in the corpus."""
    codes: np.ndarray
    """uint16 [P]: 256 * occurrences + length byte. The occurrences are 0 if they do not fit (see
    `exceptions`)."""
    divisors: np.ndarray
    """float32 [65536], by code: 1 + occurrences / norm. A word of weight w scores w - w /
    divisor."""
    levels: np.ndarray
    """uint8 [65536], by code: that score as a share of the weight, in steps of 1/255, rounded
    up."""
    exceptions: np.ndarray
    """int64, ascending: positions of the postings whose word occurs more than 255 times in the
    document."""
    exception_divisors: np.ndarray
    """float32: their divisors."""
    rows: np.ndarray
    """int32 [T]: row of a frequent word in the two tables that follow, -1 for other words."""
    maxima: np.ndarray
    """uint8 [F, ranges]: the highest level of the word in each range; ranges are padded to whole
    chunks."""
    offsets: np.ndarray
    """uint32 [F, chunks + 1]: number of the word's postings before each chunk."""
    best_levels: np.ndarray
    """uint8 [T]: the highest level of each word."""


class Query(NamedTuple):
    """The n words of a query, in descending order of what they can add to a score.

    `score.prepare` fills all arrays but the first two.
    """

    terms: np.ndarray
    """int32 [n]: numbers of the words."""
    weights: np.ndarray
    """float32 [n]: inverse document frequency times occurrences in the query."""
    starts: np.ndarray
    """int64 [n]: first posting of each word."""
    ends: np.ndarray
    """int64 [n]: the position after its last."""
    rows: np.ndarray
    """int32 [n]: as in `Postings`."""
    factors: np.ndarray
    """int64 [n]: score of one level, in units of the bounds, rounded up."""
    cursors: np.ndarray
    """int64 [n]: position before which no posting is needed any more."""


class Room(NamedTuple):
    """Memory for the scorer to work in, for one thread."""

    bounds: np.ndarray
    """uint16, one a range."""
    chunk_bounds: np.ndarray
    """uint16, one a chunk."""
    buffer: np.ndarray
    """float64 [RANGE]: scores of a range's documents, zero between ranges."""
    counts: np.ndarray
    """int64 [256]."""


def new_query(terms: np.ndarray, weights: np.ndarray) -> Query:
    """Makes the words of one query, or of several in a row, with room for the derived arrays."""
    n = len(terms)
    starts, ends, factors, cursors = (np.zeros(n, dtype=np.int64) for _ in range(4))
    return Query(terms, weights, starts, ends, np.zeros(n, dtype=np.int32), factors, cursors)
