"""Names of a fictional world: two words each, drawn from a small set of syllables."""

import random

CONSONANTS = "bdfgklmnprtvz"
VOWELS = "aeiou"
NUM_SYLLABLES = 160


def syllables() -> list[str]:
    """The `NUM_SYLLABLES` words that all names are made of, always the same."""
    words = [(a + v + b).capitalize() for a in CONSONANTS for v in VOWELS for b in CONSONANTS]
    return sorted(random.Random(0).sample(words, NUM_SYLLABLES))


class NameSource:
    """Draws names without repeating one."""

    def __init__(self, rng: random.Random) -> None:
        self.rng, self.words, self.used = rng, syllables(), set[str]()

    def draw(self) -> str:
        """A new name. Raises ValueError when nine in ten are used up."""
        if len(self.used) > 0.9 * NUM_SYLLABLES**2:
            raise ValueError(f"a world has room for {int(0.9 * NUM_SYLLABLES**2)} entities: lower its sizes")
        while True:
            name = " ".join(self.rng.sample(self.words, 2))
            if name not in self.used:
                self.used.add(name)
                return name
