"""A closed world of fictional people, cities, companies and countries.

The world consists of passages and of questions about them. Every name has two invented syllables
("Torvel"), and every syllable is one token, so that a model has to copy names and cannot remember
them as words. The splits `train`, `test` and `spare` (passages that no question is about) are
islands: no fact leads from one to another, so that no entity of a test question appears in a
training question. The island `common` is the same for every seed; its facts are those that a base
model may know without a search.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, zip_longest
from typing import Any

from pydantic import NonNegativeInt, PositiveInt

from search_r1.data.rows import training_row
from search_r1.prompts import build_prompt
from search_r1.world.arithmetic import ARITHMETIC_FILES, YEAR_OF, add_years, year_rows
from search_r1.world.names import COMMON_SEED, fresh_name
from verl.utils.config import Config


@dataclass(frozen=True)
class Relation:
    """A relation that has exactly one object for every subject."""

    name: str
    subject: str
    object: str
    sentence: str
    question: str
    noun: str

    def state(self, x: str, y: str) -> str:
        """The fact that x and y are so related, as a sentence without a full stop."""
        return f"{x} {self.sentence} {y}"


RELATIONS = {
    r.name: r
    for r in (
        Relation(
            "residence", "person", "city", "inhabits", "Where does {} live", "the residence of {}"
        ),
        Relation("employer", "person", "company", "serves", "Who employs {}", "the employer of {}"),
        Relation(
            "country", "city", "country", "joined", "In which country lies {}", "the country of {}"
        ),
        Relation("mayor", "city", "person", "elected", "Who leads {}", "the mayor of {}"),
        Relation("home", "company", "city", "occupies", "Where is {} based", "the home of {}"),
        Relation("founder", "company", "person", "honours", "Who founded {}", "the founder of {}"),
        Relation(
            "capital",
            "country",
            "city",
            "crowned",
            "What is the capital of {}",
            "the capital of {}",
        ),
    )
}
SENTENCES = {r.name: r.sentence for r in RELATIONS.values()} | {v: v for v in YEAR_OF.values()}
"""The verb by which a passage states a relation or a year."""
KINDS = ("person", "city", "company", "country")
FILLER = (
    "Little else is known about {}.",
    "Records of {} were lost in a fire.",
    "Old maps and letters also mention {}.",
    "In the north people tell tales of {}.",
    "A street and a small museum are named after {}.",
)
FILES = (
    "corpus.jsonl",
    "train.parquet",
    "test.parquet",
    "test_common.parquet",
    "test_3hop.parquet",
)
"""The files of every world."""
OPTIONS_FILE = "options.json"
"""The file in the folder of a world that holds the WorldConfig it was made with."""
DEEP_FILES = ("train_deep.parquet", "test_deep.parquet")
"""The further files of a world with deep questions."""
DEEP_HOPS = (4, 5, 6)
THREE_HOP_FILE = "train_3hop.parquet"
"""The further file of a world in which three hops are trained."""


def relations_of(kind: str) -> list[Relation]:
    """The relations whose subjects are of this kind."""
    return [relation for relation in RELATIONS.values() if relation.subject == kind]


OF_KIND = {kind: relations_of(kind) for kind in KINDS}


class WorldConfig(Config):
    """Sizes of a world."""

    seed: int = 0
    """Seed of the random numbers. The seed and the sizes below determine the world."""
    train_people: PositiveInt = 400
    """Number of people that training questions are about. There are half as many cities, half as
    many companies, and a tenth as many countries."""
    test_people: PositiveInt = 120
    """The same for test questions."""
    spare_people: NonNegativeInt = 60
    """The same for passages that no question is about."""
    train_questions: PositiveInt = 4000
    """Number of training questions, half of them with one hop and half with two."""
    test_questions: PositiveInt = 500
    """Number of test questions, half of them with one hop and half with two."""
    common_share: float = 0.05
    """Additional training questions about common facts, as a share of train_questions."""
    filler: NonNegativeInt = 0
    """Number of sentences without a fact in every passage. 0 makes short passages, 10 makes long
    and noisy ones."""
    arithmetic: bool = False
    """Whether passages state years too, and two further files of train_questions and test_questions
    questions ask for years and for differences between them."""
    deep: bool = False
    """Whether two further files of train_questions and test_questions questions have four, five and
    six hops, a third of them each. No relation occurs twice in one of these questions."""

    train_three_hops: bool = False
    """Whether a further file has half of train_questions training questions of three hops."""

    @property
    def files(self) -> tuple[str, ...]:
        """The files of such a world."""
        three_hops = (THREE_HOP_FILE,) if self.train_three_hops else ()
        arithmetic = ARITHMETIC_FILES if self.arithmetic else ()
        deep = DEEP_FILES if self.deep else ()
        return (*FILES, *three_hops, *arithmetic, *deep)


@dataclass
class Entity:
    name: str
    kind: str
    facts: dict[str, str]
    """The name of the object by relation; in a world with years also the year."""


def passage(entity: Entity, rng: random.Random, filler: int = 0) -> tuple[str, str]:
    """Draws the passage of an entity: its title in quotes, and its text.

    The text states the entity's facts, with `filler` sentences without a fact among them.
    """
    sentences = [f"{entity.name} {SENTENCES[r]} {y}." for r, y in entity.facts.items()]
    for _ in range(filler):
        sentences.insert(rng.randint(0, len(sentences)), rng.choice(FILLER).format(entity.name))
    return f'"{entity.name}"', " ".join(sentences)


def make_island(rng: random.Random, people: int, taken: set[str]) -> dict[str, Entity]:
    """Draws entities whose facts lead only to each other; returns them by name."""
    sizes = {
        "person": people,
        "city": people // 2,
        "company": people // 2,
        "country": max(2, people // 10),
    }
    names: dict[str, list[str]] = {}
    for kind, size in sizes.items():
        names[kind] = [fresh_name(rng, taken) for _ in range(size)]
    island: dict[str, Entity] = {}
    for kind in KINDS:
        for name in names[kind]:
            facts = {r.name: rng.choice(names[r.object]) for r in OF_KIND[kind]}
            island[name] = Entity(name, kind, facts)
    for city, country in zip(names["city"], names["country"], strict=False):
        island[city].facts["country"] = country
        island[country].facts["capital"] = city
    return island


def common_island() -> dict[str, Entity]:
    """The entities of the common facts, which are the same in every world."""
    return make_island(random.Random(COMMON_SEED), 16, set())


@dataclass(frozen=True)
class Question:
    relations: tuple[str, ...]
    path: tuple[str, ...]
    """Names from the subject over the bridge entities to the answer, one more than relations."""

    @property
    def text(self) -> str:
        """The last relation's question, about the noun phrase of the relations before it.

        >>> Question(("residence", "mayor"), ("Torvel", "Zorbin", "Kalmen")).text
        'Who leads the residence of Torvel?'
        """
        subject = self.path[0]
        for r in self.relations[:-1]:
            subject = RELATIONS[r].noun.format(subject)
        return RELATIONS[self.relations[-1]].question.format(subject) + "?"


def relation_chains(hops: int) -> list[tuple[str, ...]]:
    """Every sequence of relations in which each one may follow the one before."""
    chains = [(name,) for name in RELATIONS]
    for _ in range(hops - 1):
        chains = [
            (*chain, name)
            for chain in chains
            for name, relation in RELATIONS.items()
            if may_follow(RELATIONS[chain[-1]], relation)
        ]
    return chains


def plain_chains(hops: int) -> list[tuple[str, ...]]:
    """The chains in which no relation occurs twice.

    So the relation that comes next can be read off the question without counting.
    """
    return [chain for chain in relation_chains(hops) if len(set(chain)) == hops]


def may_follow(first: Relation, second: Relation) -> bool:
    """Whether `second` starts where `first` ends, and does not lead straight back: the country of
    a country's capital is that country."""
    leads_back = (first.name, second.name) == ("capital", "country")
    return first.object == second.subject and not leads_back


def ask(island: dict[str, Entity], hops: int, count: int, rng: random.Random) -> list[Question]:
    """Draws up to `count` different questions, spread evenly over all chains of relations."""
    return ask_along(island, relation_chains(hops), count, rng)


def ask_along(
    island: dict[str, Entity], chains: Sequence[tuple[str, ...]], count: int, rng: random.Random
) -> list[Question]:
    """Draws up to `count` different questions, spread evenly over these chains.

    No path visits an entity twice.
    """
    by_chain: list[list[Question]] = []
    for chain in chains:
        questions = [Question(chain, path) for e in island if (path := follow(island, e, chain))]
        rng.shuffle(questions)
        by_chain.append(questions)
    chosen = list(islice(in_turns(by_chain), count))
    rng.shuffle(chosen)
    return chosen


def in_turns(by_chain: list[list[Question]]) -> Iterator[Question]:
    """The first question of every chain, then the second of every chain, and so on."""
    for questions in zip_longest(*by_chain):
        for question in questions:
            if question is not None:
                yield question


def follow(island: dict[str, Entity], name: str, chain: tuple[str, ...]) -> tuple[str, ...] | None:
    """The path of names from `name` along `chain`.

    None if `name` is of the wrong kind, or the path comes back to a name.
    """
    path = [name]
    for relation in chain:
        if relation not in island[path[-1]].facts:
            return None
        path.append(island[path[-1]].facts[relation])
    return tuple(path) if len(set(path)) == len(path) else None


@dataclass
class World:
    passages: list[dict[str, str]]
    """The lines of the corpus, with `id` and `contents`."""
    rows: dict[str, list[dict[str, Any]]]
    """The questions in the training schema, by the name of their file."""


def make_islands(
    config: WorldConfig, rng: random.Random, years: random.Random
) -> dict[str, dict[str, Entity]]:
    """Draws the entities of each split, their facts from `rng` and their years from `years`."""
    common = common_island()
    taken = set(common)
    islands = {"common": common}
    for split, people in (
        ("train", config.train_people),
        ("test", config.test_people),
        ("spare", config.spare_people),
    ):
        islands[split] = make_island(rng, people, taken) if people else {}
    if config.arithmetic:
        for island in islands.values():
            add_years(island, years)
    return islands


def make_world(config: WorldConfig) -> World:
    """Makes the world that a configuration describes."""
    rng = random.Random(config.seed)
    years = random.Random(f"years {config.seed}")  # of its own, so that the names stay the same
    islands = make_islands(config, rng, years)
    everyone = [entity for island in islands.values() for entity in island.values()]
    rng.shuffle(everyone)
    ids = {entity.name: str(number) for number, entity in enumerate(everyone)}
    passages = [
        {"id": ids[entity.name], "contents": "\n".join(passage(entity, rng, config.filler))}
        for entity in everyone
    ]
    rows = rows_of(islands, ids, config, rng)
    if config.arithmetic:
        counts = {"train": config.train_questions, "test": config.test_questions}
        rows |= year_rows(islands, ids, counts, years)
    if config.train_three_hops:
        rows["train_3hop"] = three_hop_rows(islands, ids, config)
    if config.deep:
        rows |= deep_rows(islands, ids, config)
    return World(passages, rows)


def rows_of(
    islands: dict[str, dict[str, Entity]],
    ids: dict[str, str],
    config: WorldConfig,
    rng: random.Random,
) -> dict[str, list[dict[str, Any]]]:
    """Draws the rows of each file of questions about names."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for file, questions in questions_of(islands, config, rng).items():
        rows[file] = to_rows(questions, file.split("_")[0], ids, islands)
    return rows


def to_rows(
    questions: list[Question],
    split: str,
    ids: dict[str, str],
    islands: dict[str, dict[str, Entity]],
) -> list[dict[str, Any]]:
    """The rows of a file."""
    return [
        row(question, split, index, ids, islands["common"])
        for index, question in enumerate(questions)
    ]


def three_hop_rows(
    islands: dict[str, dict[str, Entity]], ids: dict[str, str], config: WorldConfig
) -> list[dict[str, Any]]:
    """Draws training questions of three hops, from a generator of its own."""
    rng = random.Random(f"three hops {config.seed}")
    questions = ask(islands["train"], 3, config.train_questions // 2, rng)
    return to_rows(questions, "train", ids, islands)


def deep_rows(
    islands: dict[str, dict[str, Entity]], ids: dict[str, str], config: WorldConfig
) -> dict[str, list[dict[str, Any]]]:
    """Draws the rows of the files of deep questions, each from a generator of its own.

    So the other files stay what they are without them.
    """
    rows: dict[str, list[dict[str, Any]]] = {}
    for split, count in (("train", config.train_questions), ("test", config.test_questions)):
        rng = random.Random(f"deep {split} {config.seed}")
        questions: list[Question] = []
        for hops in DEEP_HOPS:
            share = count // len(DEEP_HOPS)
            questions += ask_along(islands[split], plain_chains(hops), share, rng)
        rng.shuffle(questions)
        rows[f"{split}_deep"] = to_rows(questions, split, ids, islands)
    return rows


def questions_of(
    islands: dict[str, dict[str, Entity]], config: WorldConfig, rng: random.Random
) -> dict[str, list[Question]]:
    """Draws the questions of each file. Half of the common facts are asked only in test_common."""
    common = islands["common"]
    known = ask(common, 1, len(common) * 2, rng)
    half = len(known) // 2
    seen = int(config.common_share * config.train_questions)
    train: list[Question] = []
    for hops in (1, 2):
        train += ask(islands["train"], hops, config.train_questions // 2, rng)
    train += [known[i % half] for i in range(seen)]
    rng.shuffle(train)
    test: list[Question] = []
    for hops in (1, 2):
        test += ask(islands["test"], hops, config.test_questions // 2, rng)
    return {
        "train": train,
        "test": test,
        "test_common": known[half:],
        "test_3hop": ask(islands["test"], 3, config.test_questions // 2, rng),
    }


def row(
    question: Question, split: str, index: int, ids: dict[str, str], common: dict[str, Entity]
) -> dict[str, Any]:
    """The row of a question in the training parquet."""
    hops = len(question.relations)
    is_common = question.path[0] in common
    return training_row(
        question.text,
        [question.path[-1]],
        "closed_world_common" if is_common else f"closed_world_{hops}hop",
        build_prompt(question.text, "short"),
        split=split,
        index=index,
        hops=hops,
        common=is_common,
        gold_ids=[ids[name] for name in question.path[:-1]],
        path=list(question.path),
    )
