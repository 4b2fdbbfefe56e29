"""Spreads rows of unequal length over ranks, with nearly equal sums of lengths."""

import heapq
from collections.abc import Iterable, Sequence

Part = tuple[int, list[int]]
"""The sum of the lengths of some rows, and these rows."""


def balance(lengths: Sequence[int], num_parts: int, equal_size: bool = True) -> list[list[int]]:
    """Positions of `lengths` in `num_parts` parts with nearly equal sums.

    Parts with more rows come first. With `equal_size` the numbers of rows differ by at most one, so
    that `DataProto.chunk` of the concatenated parts gives the parts back. The result is
    deterministic. A part is empty only if there are fewer rows than parts. Raises ValueError for
    `num_parts` < 1. The method is largest differencing (Karmarkar and Karp 1982): it starts with
    many divisions of few rows each, and repeatedly merges the two most uneven ones, the heavy parts
    of one with the light parts of the other.

    >>> balance([8, 1, 7, 2], 2)
    [[0, 1], [2, 3]]
    """
    if num_parts < 1:
        raise ValueError(f"num_parts must be at least 1, got {num_parts}")
    rows_alone: list[Part] = [(length, [row]) for row, length in enumerate(lengths)]
    rows_alone.sort(key=lambda part: -part[0])
    block = num_parts if equal_size else 1
    starts = range(0, max(1, len(rows_alone)), block)  # without rows there is one empty division
    heap = [_division(rows_alone[start : start + block], num_parts) for start in starts]
    heapq.heapify(heap)
    while len(heap) > 1:
        one = heapq.heappop(heap)[1]
        two = heapq.heappop(heap)[1]
        pairs = zip(one, reversed(two), strict=True)
        heapq.heappush(
            heap, _division([(a + b, rows + more) for (a, rows), (b, more) in pairs], num_parts)
        )
    return sorted((sorted(rows) for _, rows in heap[0][1]), key=lambda rows: (-len(rows), rows))


def _division(parts: Iterable[Part], num_parts: int) -> tuple[int, list[Part]]:
    """The parts from light to heavy, filled up with empty ones, and before them minus their spread.

    So a heap pops the most uneven division first.
    """
    filled = list(parts)
    filled = sorted([(0, []) for _ in range(num_parts - len(filled))] + filled)
    return filled[0][0] - filled[-1][0], filled
