"""Delays that an experiment adds to every request."""

import random
from math import exp, log

P99 = 2.3263
"""The 99 % quantile of the standard normal distribution."""


class Latency:
    """Log-normal delays with the median `median_ms` and the 99 % quantile `p99_ms`."""

    def __init__(self, median_ms: float, p99_ms: float, seed: int = 0) -> None:
        self.mu = log(median_ms / 1000)
        self.sigma = log(p99_ms / median_ms) / P99
        self.rng = random.Random(seed)

    def draw(self) -> float:
        """Draws a delay in seconds."""
        return exp(self.rng.gauss(self.mu, self.sigma))
