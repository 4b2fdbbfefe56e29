"""Values that change over the training: `[[step, value], ...]`, as a configuration has them."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from math import isfinite

Points = Sequence[tuple[int, float]]
"""Steps and values: linear between the steps, constant before the first and after the last."""
Weight = float | list[tuple[int, float]]
"""A number, or points between which it changes."""


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


def weight_at(weight: Weight, step: int) -> float:
    """The weight at a training step."""
    return value_at(weight, step) if isinstance(weight, list) else weight


def values_of(weight: Weight) -> Iterator[float]:
    """Yields the values that a weight has at its steps."""
    if isinstance(weight, list):
        yield from (value for _, value in weight)
    else:
        yield weight


def check_shares(weights: Mapping[str, Weight]) -> None:
    """Raises ValueError unless the weights divide something among names at every step.

    They must be finite, none negative, and at no step all zero. It is enough to look at the steps
    of all schedules, because the weights are linear between them.
    """
    steps = {0}
    for name, weight in weights.items():
        if isinstance(weight, list):
            check_points(weight, "weight")
            steps |= {step for step, _ in weight}
        if not all(isfinite(value) and value >= 0 for value in values_of(weight)):
            raise ValueError(f"expected finite weights of at least 0 for {name}")
    for step in sorted(steps):
        if weights and not any(weight_at(weight, step) for weight in weights.values()):
            raise ValueError(f"all weights are 0 at step {step}")
