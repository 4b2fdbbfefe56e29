"""Scores with their uncertainty: bootstrap intervals, and a paired comparison of two results."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

import numpy as np

RESAMPLES = 2000


def bootstrap_interval(
    values: Sequence[float], seed: int = 0, confidence: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean over questions (Efron 1979).

    The interval of a single value is that value.
    """
    data = np.asarray(values, dtype=float)
    means = _resampled_means(data, seed)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _resampled_means(data: np.ndarray, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.array(
        [data[rng.integers(len(data), size=len(data))].mean() for _ in range(RESAMPLES)]
    )


@dataclass(frozen=True)
class Comparison:
    """Result b compared with result a, question by question."""

    questions: int
    difference: float
    """Mean of b minus mean of a."""
    interval: tuple[float, float]
    """95 % paired bootstrap interval of the difference."""
    gained: list[str]
    """Questions that b has right (score of at least .5) and a wrong."""
    lost: list[str]
    p_value: float
    """McNemar's exact test: the probability that the changed questions split at least as unevenly
    into gained and lost by chance."""


def compare(a: dict[str, float], b: dict[str, float], seed: int = 0) -> Comparison:
    """Compares two results {question: score}. Raises ValueError if their questions differ."""
    if a.keys() != b.keys() or not a:
        only_a = len(a.keys() - b.keys())
        only_b = len(b.keys() - a.keys())
        raise ValueError(
            f"not the same questions: {only_a} are only in the first result, {only_b} only in the "
            "second"
        )
    names = sorted(a)
    differences = np.array([b[name] - a[name] for name in names])
    low, high = np.quantile(_resampled_means(differences, seed), [0.025, 0.975])
    gained = [name for name in names if b[name] >= 0.5 > a[name]]
    lost = [name for name in names if a[name] >= 0.5 > b[name]]
    return Comparison(
        len(names),
        float(differences.mean()),
        (float(low), float(high)),
        gained,
        lost,
        mcnemar(len(gained), len(lost)),
    )


def mcnemar(gained: int, lost: int) -> float:
    """The two-sided exact p-value of `gained` against `lost` questions (McNemar 1947).

    The null hypothesis is that a change is a gain or a loss with equal probability.

    >>> mcnemar(5, 5), mcnemar(0, 0), mcnemar(10, 0)
    (1.0, 1.0, 0.001953125)
    """
    n = gained + lost
    k = min(gained, lost)
    return min(1.0, 2 * sum(comb(n, i) for i in range(k + 1)) / 2**n) if n else 1.0
