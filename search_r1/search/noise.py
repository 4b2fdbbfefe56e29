"""Noise that a search asks for, and on which queries it falls."""

import random
from hashlib import blake2b
from typing import NamedTuple


class Noise(NamedTuple):
    """How many of the queries are to be answered by passages that do not help."""

    share: float = 0.0
    """Share of the queries, from 0 to 1."""
    seed: int = 0
    """With another one the noise falls on other queries. The training step is one."""

    def falls_on(self, query: str) -> bool:
        """Whether a query gets noise: drawn from query and seed alone, whoever asks, and when.

        >>> [Noise(share).falls_on("capital of Peru") for share in (0.0, 1.0)]
        [False, True]
        """
        return self.share > 0 and rng_of(query, self.seed).random() < self.share


NO_NOISE = Noise()


def rng_of(query: str, seed: int) -> random.Random:
    """A random generator that depends only on the query and the seed, not on earlier queries."""
    text = f"{seed}\n{query}".encode("utf-8", "surrogatepass")
    return random.Random(blake2b(text, digest_size=8).digest())
