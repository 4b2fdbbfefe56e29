"""Questions of the closed world that need a calculation over what was found.

People and companies get years, which their passages state. Some questions ask for such a year: one
search answers them. The others ask for the difference between two: it stands in no passage, and
nothing but passages tells the years. All years have four digits and all differences two, so that no
difference can be read where a year stands.
"""

import random
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

from search_r1.data.rows import training_row
from search_r1.prompts import build_prompt

if TYPE_CHECKING:
    from search_r1.world.generate import Entity

YEAR_OF = {"person": "born", "company": "opened"}
"""What gives an entity of a kind its year, as the verb that its passage states it with."""
YEARS = range(1100, 2000)
DIFFERENCES = range(10, 100)
ARITHMETIC_FILES = ("train_arithmetic.parquet", "test_arithmetic.parquet")
"""The further files of a world with years."""


@dataclass(frozen=True)
class QuestionKind:
    """A kind of question about the years of one entity, or of two whose difference is asked for."""

    source: str
    """Its data_source."""
    subjects: tuple[str, ...]
    """The kinds of the entities that it names, in order."""
    text: str

    @property
    def is_difference(self) -> bool:
        return len(self.subjects) > 1


QUESTION_KINDS = (
    QuestionKind("closed_world_year", ("company",), "When was {} founded?"),
    QuestionKind("closed_world_year", ("person",), "When was {} born?"),
    QuestionKind(
        "closed_world_interval", ("company", "company"), "How many years after {} was {} founded?"
    ),
    QuestionKind("closed_world_age", ("person", "company"), "How old was {} when {} was founded?"),
)


@dataclass(frozen=True)
class YearQuestion:
    """A question about the years of entities."""

    kind: QuestionKind
    names: tuple[str, ...]
    years: tuple[str, ...]

    @property
    def text(self) -> str:
        return self.kind.text.format(*self.names)

    @property
    def program(self) -> str:
        """The program that gives the answer once the years are known.

        >>> YearQuestion(QUESTION_KINDS[2], ("Torvel", "Kalmen"), ("1820", "1873")).program
        '1873 - 1820'
        """
        return " - ".join(reversed(self.years))

    @property
    def answer(self) -> str:
        if not self.kind.is_difference:
            return self.years[0]
        first, second = map(int, self.years)
        return str(second - first)

    def row(self, split: str, index: int, ids: dict[str, str]) -> dict[str, Any]:
        """Its row in the training parquet. `ids` are those of the passages, by name."""
        return training_row(
            self.text,
            [self.answer],
            self.kind.source,
            build_prompt(self.text, "short"),
            split=split,
            index=index,
            hops=len(self.names),
            common=False,
            gold_ids=[ids[name] for name in self.names],
            path=[*self.names, self.answer],
            program=self.program,
        )


def draw_year(rng: random.Random) -> str:
    return str(rng.choice(YEARS))


def add_years(island: dict[str, "Entity"], rng: random.Random) -> None:
    """Draws the years of people and companies, and adds them to their facts."""
    for entity in island.values():
        if relation := YEAR_OF.get(entity.kind):
            entity.facts[relation] = draw_year(rng)


def ask_years(island: dict[str, "Entity"], count: int, rng: random.Random) -> list[YearQuestion]:
    """Draws up to `count` different questions, as many of each kind where the island has them."""
    chosen: list[YearQuestion] = []
    for kind in QUESTION_KINDS:
        possible = possible_questions(island, kind)
        chosen += rng.sample(possible, min(len(possible), count // len(QUESTION_KINDS)))
    rng.shuffle(chosen)
    return chosen


def possible_questions(island: dict[str, "Entity"], kind: QuestionKind) -> list[YearQuestion]:
    """All questions of a kind, the later year always that of the second entity."""
    subjects = [[e for e in island.values() if e.kind == subject] for subject in kind.subjects]
    found = (
        YearQuestion(
            kind,
            tuple(entity.name for entity in entities),
            tuple(entity.facts[YEAR_OF[entity.kind]] for entity in entities),
        )
        for entities in product(*subjects)
    )
    return [q for q in found if not kind.is_difference or int(q.answer) in DIFFERENCES]


def year_rows(
    islands: dict[str, dict[str, "Entity"]],
    ids: dict[str, str],
    counts: dict[str, int],
    rng: random.Random,
) -> dict[str, list[dict[str, Any]]]:
    """Draws the rows of the further files: for each split as many questions as `counts` says."""
    return {
        f"{split}_arithmetic": [
            question.row(split, index, ids)
            for index, question in enumerate(ask_years(islands[split], count, rng))
        ]
        for split, count in counts.items()
    }
