"""Invented names of two syllables, each of which is one token of the base models."""

import random
from itertools import product

COMMON_SEED = 20_250_312


def _syllables() -> tuple[list[str], list[str]]:
    """Two disjoint pools of 96 syllables, for the first and the second halves of names."""
    syllables = ["".join(s) for s in product("bdfgklmnprstvz", "aeiou", "bdgklmnprtvz")]
    random.Random(COMMON_SEED).shuffle(syllables)
    return [s.capitalize() for s in syllables[:96]], syllables[96:192]


FIRST, SECOND = _syllables()


def random_name(rng: random.Random) -> str:
    return rng.choice(FIRST) + rng.choice(SECOND)


def fresh_name(rng: random.Random, taken: set[str]) -> str:
    """Draws a name that is not in `taken`, and adds it there."""
    while (name := random_name(rng)) in taken:
        pass
    taken.add(name)
    return name
