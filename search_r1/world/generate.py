"""A closed world of fictional people, cities, companies and countries.

It has passages and questions about them. Every name is two invented syllables ("Torvel"), each one
token each: names must be copied, not looked up. The splits `train`, `test` and `spare` (passages
nobody asks about) are islands: no fact leads from one to another, so entities of test questions
appear in no training question. The island `common` is the same for every seed: its facts are what a
base model may know without searching.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, pairwise, product, zip_longest
from typing import Any

from pydantic import NonNegativeInt, PositiveInt

from search_r1.data.rows import training_row
from search_r1.prompts import build_prompt
from verl.utils.config import Config


@dataclass(frozen=True)
class Relation:
    """A functional relation: one object for every subject."""

    name: str
    subject: str
    object: str
    sentence: str
    question: str
    noun: str

    def state(self, x: str, y: str) -> str:
        """The fact as a sentence without its full stop."""
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
KINDS = ("person", "city", "company", "country")
COMMON_SEED = 20_250_312
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
"""What a world consists of."""
OPTIONS_FILE = "options.json"
"""In the folder of a world: the WorldConfig that made it."""
DATA_SOURCES = {1: "closed_world_1hop", 2: "closed_world_2hop", 3: "closed_world_3hop"}


def relations_of(kind: str) -> list[Relation]:
    """The relations whose subjects are of this kind."""
    return [relation for relation in RELATIONS.values() if relation.subject == kind]


OF_KIND = {kind: relations_of(kind) for kind in KINDS}


def _syllables() -> tuple[list[str], list[str]]:
    """Two disjoint pools of 96 syllables: the first and the second halves of names."""
    syllables = ["".join(s) for s in product("bdfgklmnprstvz", "aeiou", "bdgklmnprtvz")]
    random.Random(COMMON_SEED).shuffle(syllables)
    return [s.capitalize() for s in syllables[:96]], syllables[96:192]


FIRST, SECOND = _syllables()


class WorldConfig(Config):
    """Sizes of a world."""

    seed: int = 0
    """The world is a function of this and the sizes below."""
    train_people: PositiveInt = 400
    """People of the training questions; half as many cities and companies, a tenth as many
    countries."""
    test_people: PositiveInt = 120
    """The same for the test questions."""
    spare_people: NonNegativeInt = 60
    """The same for passages that no question is about."""
    train_questions: PositiveInt = 4000
    """Half of them 1-hop, half 2-hop."""
    test_questions: PositiveInt = 500
    """Half of them 1-hop, half 2-hop."""
    common_share: float = 0.05
    """Training questions about common facts, beside the others."""
    filler: NonNegativeInt = 0
    """Sentences without a fact in every passage: 0 makes short passages, 10 long and noisy ones."""


@dataclass
class Entity:
    name: str
    kind: str
    facts: dict[str, str]
    """Object's name by relation."""


def random_name(rng: random.Random) -> str:
    return rng.choice(FIRST) + rng.choice(SECOND)


def fresh_name(rng: random.Random, taken: set[str]) -> str:
    """A name that was not in `taken`, and now is."""
    while (name := random_name(rng)) in taken:
        pass
    taken.add(name)
    return name


def passage(entity: Entity, rng: random.Random, filler: int = 0) -> tuple[str, str]:
    """The title of an entity's passage, in quotes, and its text.

    The text has the entity's facts, and sentences without a fact between them.
    """
    sentences = [RELATIONS[r].state(entity.name, y) + "." for r, y in entity.facts.items()]
    for _ in range(filler):
        sentences.insert(rng.randint(0, len(sentences)), rng.choice(FILLER).format(entity.name))
    return f'"{entity.name}"', " ".join(sentences)


def make_island(rng: random.Random, people: int, taken: set[str]) -> dict[str, Entity]:
    """Entities by name, whose facts stay among themselves."""
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
    """The entities of the common facts: the same in every world."""
    return make_island(random.Random(COMMON_SEED), 16, set())


@dataclass(frozen=True)
class Question:
    relations: tuple[str, ...]
    path: tuple[str, ...]
    """Names from the subject over the bridges to the answer: one more than relations."""

    @property
    def text(self) -> str:
        """The last relation's question, about the noun phrases of the ones before.

        >>> Question(("residence", "mayor"), ("Torvel", "Zorbin", "Kalmen")).text
        'Who leads the residence of Torvel?'
        """
        subject = self.path[0]
        for r in self.relations[:-1]:
            subject = RELATIONS[r].noun.format(subject)
        return RELATIONS[self.relations[-1]].question.format(subject) + "?"


def relation_chains(hops: int) -> list[tuple[str, ...]]:
    """Every sequence of relations in which each one may follow the one before."""
    chains: list[tuple[str, ...]] = []
    for relations in product(RELATIONS.values(), repeat=hops):
        if all(may_follow(first, second) for first, second in pairwise(relations)):
            chains.append(tuple(relation.name for relation in relations))
    return chains


def may_follow(first: Relation, second: Relation) -> bool:
    """Whether `second` starts where `first` ends, and does not lead straight back: the country of
    a country's capital is that country."""
    leads_back = (first.name, second.name) == ("capital", "country")
    return first.object == second.subject and not leads_back


def ask(island: dict[str, Entity], hops: int, count: int, rng: random.Random) -> list[Question]:
    """Up to `count` different questions, spread evenly over the kinds of chains.

    No path visits an entity twice.
    """
    by_chain: list[list[Question]] = []
    for chain in relation_chains(hops):
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

    None if `name` is of another kind or the path comes back to a name.
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
    """Corpus lines: `id`, `contents`."""
    rows: dict[str, list[dict[str, Any]]]
    """Questions in the training schema, by file name."""


def make_world(config: WorldConfig) -> World:
    """The world of a seed and its sizes."""
    rng = random.Random(config.seed)
    common = common_island()
    taken = set(common)
    islands = {"common": common}
    for split, people in (
        ("train", config.train_people),
        ("test", config.test_people),
        ("spare", config.spare_people),
    ):
        islands[split] = make_island(rng, people, taken) if people else {}
    everyone = [entity for island in islands.values() for entity in island.values()]
    rng.shuffle(everyone)
    ids = {entity.name: str(number) for number, entity in enumerate(everyone)}
    passages = [
        {"id": ids[entity.name], "contents": "\n".join(passage(entity, rng, config.filler))}
        for entity in everyone
    ]
    rows: dict[str, list[dict[str, Any]]] = {}
    for file, questions in questions_of(islands, config, rng).items():
        split = file.split("_")[0]
        rows[file] = [
            row(question, split, index, ids, common) for index, question in enumerate(questions)
        ]
    return World(passages, rows)


def questions_of(
    islands: dict[str, dict[str, Entity]], config: WorldConfig, rng: random.Random
) -> dict[str, list[Question]]:
    """The questions of each file. Half of the common facts are asked in training, half held out."""
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
    """One line of the training parquet."""
    hops = len(question.relations)
    is_common = question.path[0] in common
    return training_row(
        question.text,
        [question.path[-1]],
        "closed_world_common" if is_common else DATA_SOURCES[hops],
        build_prompt(question.text, "short"),
        split=split,
        index=index,
        hops=hops,
        common=is_common,
        gold_ids=[ids[name] for name in question.path[:-1]],
        path=list(question.path),
    )
