"""The exact best documents of BM25 without scoring every document.

Documents are cut into ranges of 32. For every range a bound is computed that no score in it
exceeds: the sum, over the words of the query, of the word's highest score in the range. Ranges are
then scored in two passes, those with the highest bounds first; a range whose bound is below the
score of the worst document kept so far is never looked at. This is block-max pruning (Mallia, Suel
and Tonellotto, "Faster Learned Sparse Retrieval with Block-Max Pruning", SIGIR 2024). Within a
range the words divide as in MaxScore (Turtle and Flood, 1995): once the words not yet looked at
cannot lift a document without the others high enough, their postings are searched only for
documents that still can be among the best.

Bounds are whole numbers of 16 bits, rounded up: one vector instruction adds those of 16 ranges.
Scores are added in 64 bits, where sums of 32-bit scores are exact, so that their order does not
matter.

The functions are compiled by numba and run outside Python's lock. `postings` is always a
`Postings`, `query` a `Query`, `room` a `Room` of arrays.py. All compiled functions that call each
other are in this file: numba compiles a function anew when its own file has changed, not when
another has.
"""

import numpy as np

from search_r1.search.engines.bm25.arrays import Query
from search_r1.search.engines.bm25.compiled import compiled

RANGE = 32
"""Documents in a range. At most 64, because one bit for each says whether it was scored."""
CHUNK = 64
"""Ranges in a chunk, which are skipped together by one comparison."""
TOP_LEVEL = 255
"""The highest level. A level is a word's highest score in a range, or its score in a document, as a
share of its weight in steps of 1/255, rounded up."""
MAX_BOUND = 65535
MAX_BOUNDED_TERMS = 64
"""Number of words of a query whose bounds are computed by range. The lightest words of a longer
query add a constant to all bounds."""
ROUNDING = 1e-5
"""A factor for bounds that exceeds what rounding in 32-bit arithmetic can add to a score."""


@compiled
def find(values, low, high, value):
    """The first position from `low` to `high` that holds `value` or more; `values` ascend."""
    while low < high:
        middle = (low + high) >> 1
        if values[middle] < value:
            low = middle + 1
        else:
            high = middle
    return low


@compiled
def divisor_of(postings, position):
    """The divisor of the posting at `position`."""
    code = postings.codes[position]
    if code >= 256:
        return postings.divisors[code]
    exceptions = postings.exceptions
    return postings.exception_divisors[find(exceptions, 0, exceptions.shape[0], position)]


@compiled
def add_row(bounds, maxima, factor):
    """Adds `factor` times the levels of a frequent word to the bounds of all ranges."""
    for i in range(bounds.shape[0]):
        bounds[i] = np.uint16(bounds[i] + np.uint16(factor * np.uint16(maxima[i])))


@compiled
def add_list(bounds, postings, start, end, factor):
    """Adds `factor` times the levels of a rare word, whose postings are read."""
    documents = postings.documents
    codes = postings.codes
    levels = postings.levels
    last = -1
    best = np.uint8(0)
    for position in range(start, end):
        current = documents[position] // RANGE
        level = levels[codes[position]]
        if current != last:
            if last >= 0:
                bounds[last] += factor * np.uint16(best)
            last = current
            best = level
        elif level > best:
            best = level
    if last >= 0:
        bounds[last] += factor * np.uint16(best)


@compiled
def prepare(postings, query):
    """Fills what is derived from a query's words; returns (unit, rest).

    A bound times `unit` is a score; `rest` is what the words beyond the 64th can add, in that unit.
    """
    n = query.terms.shape[0]
    total = rest = 0.0
    for i in range(n):
        total += query.weights[i]
        if i >= MAX_BOUNDED_TERMS:
            rest += query.weights[i]
    unit = total / (MAX_BOUND - 1 - (TOP_LEVEL + 1) * min(n, MAX_BOUNDED_TERMS))
    for i in range(n):
        term = query.terms[i]
        query.starts[i] = postings.starts[term]
        query.ends[i] = postings.starts[term + 1]
        query.rows[i] = postings.rows[term]
        query.factors[i] = np.int64(query.weights[i] / (TOP_LEVEL * unit)) + 1
    beyond = rest / unit + 1 if n > MAX_BOUNDED_TERMS else 0
    return unit * (1.0 + ROUNDING), np.uint16(beyond)


@compiled
def bound_ranges(postings, query, rest, bounds):
    """Fills `bounds`: no score of a range exceeds its bound.

    The words beyond the 64th add `rest` to the bounds of all ranges.
    """
    for number in range(bounds.shape[0]):
        bounds[number] = rest
    for i in range(min(query.terms.shape[0], MAX_BOUNDED_TERMS)):
        factor = np.uint16(query.factors[i])
        row = query.rows[i]
        if row >= 0:
            add_row(bounds, postings.maxima[row], factor)
        else:
            add_list(bounds, postings, query.starts[i], query.ends[i], factor)


@compiled
def bound_chunks(bounds, chunk_bounds):
    """Fills `chunk_bounds`: the largest bound of each chunk."""
    for chunk in range(chunk_bounds.shape[0]):
        best = np.uint16(0)
        for i in range(chunk * CHUNK, (chunk + 1) * CHUNK):
            best = max(best, bounds[i])
        chunk_bounds[chunk] = best


@compiled
def starting_bound(chunk_bounds, wanted, counts):
    """The largest multiple of 256 that the bounds of at least `wanted` chunks reach.

    It is 1 if fewer chunks reach 256. `counts` [256] is working memory.
    """
    for step in range(256):
        counts[step] = 0
    for chunk in range(chunk_bounds.shape[0]):
        counts[chunk_bounds[chunk] >> 8] += 1
    reached = 0
    for step in range(255, 0, -1):
        reached += counts[step]
        if reached >= wanted:
            return step << 8
    return 1


@compiled
def find_ahead(documents, position, end, document):
    """The first position from `position` to `end` that holds `document` or a later one.

    It is probably near, so that the steps start at 1 and are doubled until it is passed.
    """
    step = 1
    low = position
    while position < end and documents[position] < document:
        low = position + 1
        position += step
        step *= 2
    return find(documents, low, min(position, end), document)


@compiled
def level_in_range(postings, query, i, number):
    """What word i added to the bound of a range; 0 for a word without levels by range."""
    row = query.rows[i]
    if i >= MAX_BOUNDED_TERMS or row < 0:
        return np.int64(0)
    return query.factors[i] * np.int64(postings.maxima[row, number])


@compiled
def add_scores(postings, query, i, number, buffer):
    """Adds what word i scores in the documents of a range to `buffer`; returns (touched, highest).

    `touched` has a bit for each document that has the word, `highest` is the highest level among
    them.
    """
    documents = postings.documents
    codes = postings.codes
    levels = postings.levels
    first = number * RANGE
    start = query.starts[i]
    end = query.ends[i]
    row = query.rows[i]
    if row < 0:
        position = find_ahead(documents, query.cursors[i], end, first)
        query.cursors[i] = position
    else:
        chunk = number // CHUNK
        low = start + postings.offsets[row, chunk]
        high = start + postings.offsets[row, chunk + 1]
        position = find(documents, low, high, first)
    weight = query.weights[i]
    touched = np.uint64(0)
    highest = np.uint8(0)
    while position < end and documents[position] < first + RANGE:
        slot = documents[position] - first
        buffer[slot] += weight - weight / divisor_of(postings, position)
        touched |= np.uint64(1) << np.uint64(slot)
        highest = max(highest, levels[codes[position]])
        position += 1
    return touched, highest


@compiled
def score_essential(postings, query, number, bound, needed, buffer):
    """Adds up the scores of a range in `buffer`; returns (touched, essential, bound).

    It goes on word by word until a document without these words cannot be needed. `touched` has a
    bit for each document that has one of them, `essential` is their number, `bound` the most that
    the other words can add.
    """
    touched = np.uint64(0)
    essential = 0
    while essential < query.terms.shape[0] and bound >= needed:
        i = essential
        essential += 1
        row = query.rows[i]
        if row >= 0 and postings.maxima[row, number] == 0:
            continue
        found, highest = add_scores(postings, query, i, number, buffer)
        touched |= found
        if i < MAX_BOUNDED_TERMS:
            bound -= query.factors[i] * np.int64(highest)
    return touched, essential, bound


@compiled
def score_of_word(postings, query, i, document):
    """What word i adds to the score of a document; 0 if it does not occur there."""
    documents = postings.documents
    start = query.starts[i]
    low = start
    high = query.ends[i]
    row = query.rows[i]
    if row >= 0:
        chunk = document // (RANGE * CHUNK)
        low = start + postings.offsets[row, chunk]
        high = start + postings.offsets[row, chunk + 1]
    position = find(documents, low, high, document)
    if position >= high or documents[position] != document:
        return 0.0
    weight = query.weights[i]
    return np.float64(weight - weight / divisor_of(postings, position))


@compiled
def complete_score(postings, query, essential, document, score, rest, needed_score, unit):
    """The whole score of a document, or -1 once it is sure to be below `needed_score`.

    `score` is that of its essential words. `rest` is what the other words can add, in units of the
    bounds; it is taken one unit larger, to keep scores that equal the needed one in 32 bits.
    """
    number = document // RANGE
    for i in range(essential, query.terms.shape[0]):
        if score + (rest + 1) * unit < needed_score:
            return -1.0
        if query.rows[i] < 0 or postings.maxima[query.rows[i], number] > 0:
            score += score_of_word(postings, query, i, document)
        rest -= level_in_range(postings, query, i, number)
    return score


@compiled
def is_worse(score, document, other_score, other_document):
    """Whether a document ranks after another.

    It has a lower score, or an equal one and a place further back in the corpus.
    """
    return score < other_score or (score == other_score and document > other_document)


@compiled
def sift_down(scores, documents, count):
    """Moves the first entry of a heap to where it belongs; the worst entry becomes the first."""
    parent = 0
    while True:
        child = 2 * parent + 1
        if child >= count:
            return
        other = child + 1
        if other < count and is_worse(
            scores[other], documents[other], scores[child], documents[child]
        ):
            child = other
        if not is_worse(scores[child], documents[child], scores[parent], documents[parent]):
            return
        scores[parent], scores[child] = scores[child], scores[parent]
        documents[parent], documents[child] = documents[child], documents[parent]
        parent = child


@compiled
def offer(scores, documents, count, score, document):
    """Keeps a document if it is among the best so far; returns how many are kept."""
    if count < scores.shape[0]:
        child = count
        while child > 0:
            parent = (child - 1) // 2
            if not is_worse(score, document, scores[parent], documents[parent]):
                break
            scores[child] = scores[parent]
            documents[child] = documents[parent]
            child = parent
        scores[child] = score
        documents[child] = document
        return count + 1
    if is_worse(scores[0], documents[0], score, document):
        scores[0] = score
        documents[0] = document
        sift_down(scores, documents, count)
    return count


@compiled
def sort_best_first(scores, documents, count):
    """Turns the heap into a ranking."""
    for last in range(count - 1, 0, -1):
        scores[0], scores[last] = scores[last], scores[0]
        documents[0], documents[last] = documents[last], documents[0]
        sift_down(scores, documents, last)


@compiled
def score_ranges(
    postings, query, unit, floor, bounds, chunk_bounds, buffer, scores, documents, count
):
    """Scores the ranges that may hold one of the best documents; returns how many are kept.

    Ranges whose bound is below `floor` are skipped, and left for another pass.
    """
    topk = scores.shape[0]
    for i in range(query.terms.shape[0]):
        query.cursors[i] = query.starts[i]
    needed_score = np.float64(scores[0]) if count == topk else 0.0
    needed = np.int64(needed_score / unit)
    for chunk in range(chunk_bounds.shape[0]):
        if chunk_bounds[chunk] < max(floor, needed):
            continue
        for number in range(chunk * CHUNK, (chunk + 1) * CHUNK):
            bound = np.int64(bounds[number])
            if bound < max(floor, needed):
                continue
            bounds[number] = 0
            touched, essential, rest = score_essential(
                postings, query, number, bound, needed, buffer
            )
            for slot in range(RANGE):
                if touched >> np.uint64(slot) & np.uint64(1):
                    document = number * RANGE + slot
                    partial = buffer[slot]
                    buffer[slot] = 0.0
                    score = complete_score(
                        postings, query, essential, document, partial, rest, needed_score, unit
                    )
                    if score > 0:
                        count = offer(scores, documents, count, np.float32(score), document)
            if count == topk:
                needed_score = np.float64(scores[0])
                needed = np.int64(needed_score / unit)
    return count


@compiled
def rank(postings, query, room, scores, documents):
    """Fills `scores` and `documents` with the best documents of a query, best first.

    Returns how many there are.
    """
    bounds = room.bounds
    chunk_bounds = room.chunk_bounds
    buffer = room.buffer
    unit, rest = prepare(postings, query)
    bound_ranges(postings, query, rest, bounds)
    bound_chunks(bounds, chunk_bounds)
    floor = starting_bound(chunk_bounds, 2 * scores.shape[0], room.counts)
    count = score_ranges(
        postings, query, unit, floor, bounds, chunk_bounds, buffer, scores, documents, 0
    )
    if floor > 1:
        bound_chunks(bounds, chunk_bounds)
        count = score_ranges(
            postings, query, unit, 1, bounds, chunk_bounds, buffer, scores, documents, count
        )
    sort_best_first(scores, documents, count)
    return count


@compiled
def rank_batch(postings, words, query_starts, room, scores, documents, counts):
    """Ranks queries one after the other.

    Query i has the words query_starts[i] to query_starts[i + 1].
    """
    for i in range(counts.shape[0]):
        low = query_starts[i]
        high = query_starts[i + 1]
        if low == high:
            continue
        query = Query(
            words.terms[low:high],
            words.weights[low:high],
            words.starts[low:high],
            words.ends[low:high],
            words.rows[low:high],
            words.factors[low:high],
            words.cursors[low:high],
        )
        counts[i] = rank(postings, query, room, scores[i], documents[i])
