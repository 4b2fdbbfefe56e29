"""Values that change over the training: `[[step, value], ...]`, as a configuration has them."""

from collections.abc import Sequence
from itertools import pairwise

Points = Sequence[tuple[int, float]]
"""Steps and values: linear between the steps, constant before the first and after the last."""


def value_at(points: Points, step: int) -> float:
    """The value at a training step.

    >>> [value_at([(10, 0.0), (20, 1.0)], step) for step in (1, 15, 99)]
    [0.0, 0.5, 1.0]
    """
    before = [point for point in points if point[0] <= step]
    after = [point for point in points if point[0] > step]
    if not before:
        return after[0][1]
    if not after:
        return before[-1][1]
    start, low = before[-1]
    end, high = after[0]
    return low + (high - low) * (step - start) / (end - start)


def check_points(points: Points, value: str) -> None:
    """Raises ValueError unless there are points and their steps rise. `value` says what changes."""
    if not points or any(a[0] >= b[0] for a, b in pairwise(points)):
        raise ValueError(f"a schedule is [[step, {value}], ...] with rising steps")
