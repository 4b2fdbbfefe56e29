"""Traces on which the base model is trained before reinforcement learning.

*Recall*: facts that are to be looked up in a list. *Reading*: clean traces in which every search
and the answer are right. *Poor policy*: the same, but with guesses, wrong queries and answers
before the last hop; `PolicyMix` says how often. Every trace has new entities and facts, because a
model that is trained on a fixed set memorises it instead of reading. Only the common facts stay the
same.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from search_r1.agent.observation import encode_observation, encode_passages
from search_r1.prompts import build_prompt
from search_r1.tools.formats import SEARCH_R1, tagged
from search_r1.world.generate import (
    KINDS,
    OF_KIND,
    RELATIONS,
    Entity,
    Question,
    ask,
    common_island,
    passage,
    relation_chains,
)
from search_r1.world.names import fresh_name, random_name
from verl.utils.tokenizer import encode_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class PolicyMix:
    """The probability of each deviation from a clean trace."""

    guess: float = 0.0
    """Answers with a random name instead of searching, while nothing is known. In the first turn
    this holds only if the first relation is in `bold`."""
    guess_known: float = 0.0
    """The same in the first turn for all other relations. A model that decodes greedily searches
    there, because this probability is low."""
    wrong_query: float = 0.0
    """Searches for a random name instead of the right one."""
    stop_early: float = 0.0
    """Answers with a bridge entity."""
    search_again: float = 0.0
    """Searches for the answer instead of giving it."""
    common: float = 0.0
    """The trace is about a common fact, which is answered without a search."""
    bold: frozenset[str] = frozenset({"employer", "country", "founder", "capital"})


READING = PolicyMix(common=0.1)
POOR = PolicyMix(
    guess=0.85, guess_known=0.2, wrong_query=0.25, stop_early=0.5, search_again=0.05, common=0.1
)
MAX_TURNS = 4
PYTHON_FORMAT = tagged("python", "result")
"""How a program and its result are written."""
WRITTEN = ("model", "read", "end")
"""The kinds of segments that the model writes."""
WHOLE = 1 << 20
"""More tokens than any observation has."""


@dataclass(frozen=True)
class TraceSegment:
    """A part of a trace by one author.

    `kind` is prompt (whatever else the environment says), model, read (written by the model, but
    copied out of a passage), end (the model's, the token that ends a text), observation (passages),
    finding (what they were shortened to) or result (what a program printed).
    """

    kind: str
    text: str
    passages: tuple[tuple[str, str], ...] = ()


class RecallWriter:
    """Draws lists of `count` facts that are stated once, and then again in another order.

    In the second list every object can be looked up in the first one.
    """

    def __init__(self, rng: random.Random, count: int = 8) -> None:
        self.rng = rng
        self.count = count

    def __call__(self) -> list[TraceSegment]:
        taken: set[str] = set()
        facts = [self.fact(taken) for _ in range(self.count)]
        segments = [TraceSegment("prompt", " ".join(f"{x} {verb} {y}." for x, verb, y in facts))]
        self.rng.shuffle(facts)
        for x, verb, y in facts:
            segments += [
                TraceSegment("prompt", f" {x} {verb}"),
                TraceSegment("read", f" {y}"),
                TraceSegment("prompt", "."),
            ]
        return segments

    def fact(self, taken: set[str]) -> tuple[str, str, str]:
        """Draws a fact: subject, verb and object."""
        subject = fresh_name(self.rng, taken)
        relation = self.rng.choice(list(RELATIONS.values()))
        return subject, relation.sentence, fresh_name(self.rng, taken)


class PassageWriter:
    """Draws what a search finds: `num_passages` passages."""

    filler: int = 0
    """Number of sentences without a fact in each of them."""

    def __init__(self, rng: random.Random, num_passages: int = 3) -> None:
        self.rng = rng
        self.num_passages = num_passages

    def found(self, entities: list[Entity], query: str, kind: str, taken: set[str]) -> TraceSegment:
        """Draws distractors beside the entities, and the passages of all in a random order."""
        while len(entities) < self.num_passages:
            entities.append(self.distractor(query, kind, taken))
        self.rng.shuffle(entities)
        passages = tuple(passage(e, self.rng, self.filler) for e in entities)
        return TraceSegment("observation", "", passages)

    def entity(self, name: str, kind: str, taken: set[str]) -> Entity:
        return Entity(name, kind, {r.name: fresh_name(self.rng, taken) for r in OF_KIND[kind]})

    def distractor(self, query: str, kind: str, taken: set[str]) -> Entity:
        """Draws an entity that the question is not about, often of the kind that is searched for.

        Often `query` is the object of one of its facts, so that its passage matches the query.
        """
        kind = kind if self.rng.random() < 0.4 else self.rng.choice(KINDS)
        entity = self.entity(fresh_name(self.rng, taken), kind, taken)
        if self.rng.random() < 0.4:
            entity.facts[self.rng.choice(OF_KIND[entity.kind]).name] = query
        return entity


class TraceWriter(PassageWriter):
    """Draws traces of one to three hops, in which every search finds `num_passages` passages."""

    max_turns: int = MAX_TURNS
    """Turns that may search; one more may only answer."""

    def __init__(
        self,
        rng: random.Random,
        mix: PolicyMix,
        num_passages: int = 3,
        hops: Sequence[int] = (1, 2, 3),
    ) -> None:
        super().__init__(rng, num_passages)
        self.mix = mix
        self.chains = {h: relation_chains(h) for h in hops}
        common = common_island()
        self.common = ask(common, 1, len(common) * 2, random.Random(0))
        self.common_names = set(common)

    def __call__(self) -> list[TraceSegment]:
        """Draws one trace."""
        if self.rng.random() < self.mix.common:
            return self.common_trace(self.rng.choice(self.common))
        chain = self.rng.choice(self.chains[self.rng.choice(list(self.chains))])
        taken = set(self.common_names)
        path = tuple(fresh_name(self.rng, taken) for _ in range(len(chain) + 1))
        return self.question_trace(Question(chain, path), taken)

    def common_trace(self, question: Question) -> list[TraceSegment]:
        x, y = question.path
        return [
            TraceSegment("prompt", build_prompt(question.text, "short")),
            TraceSegment(
                "model",
                f"<think> {RELATIONS[question.relations[0]].state(x, y)} </think> <answer> {y} "
                "</answer>",
            ),
        ]

    def question_trace(self, question: Question, taken: set[str]) -> list[TraceSegment]:
        """Draws one trace about entities that appear in no other trace."""
        segments = [TraceSegment("prompt", build_prompt(question.text, "short"))]
        known = 0
        for turn in range(self.max_turns + 1):
            if self.guesses(question, known, turn):
                guess = random_name(self.rng)
                segments.append(
                    TraceSegment("model", f"<think> I guess </think> <answer> {guess} </answer>")
                )
                break
            if self.answers(question, known, turn):
                name = question.path[known]
                segments += self.think(question, known, name)
                segments.append(TraceSegment("model", f" <answer> {name} </answer>"))
                break
            turn_segments, known = self.search(question, known, taken)
            segments += turn_segments
        return segments

    def guesses(self, question: Question, known: int, turn: int) -> bool:
        """Draws whether the policy answers with a random name, which it does only before any fact
        is known."""
        mix = self.mix
        searches_first = turn == 0 and question.relations[0] not in mix.bold
        return known == 0 and self.rng.random() < (mix.guess_known if searches_first else mix.guess)

    def answers(self, question: Question, known: int, turn: int) -> bool:
        """Draws whether the policy answers with the last name that it knows: at the last turn, too
        early, or once it knows all facts."""
        hops = len(question.relations)
        is_last = turn == self.max_turns
        if is_last or (0 < known < hops and self.rng.random() < self.mix.stop_early):
            return True
        return known == hops and self.rng.random() >= self.mix.search_again

    def search(
        self, question: Question, known: int, taken: set[str]
    ) -> tuple[list[TraceSegment], int]:
        """Draws a turn that searches; returns it and how many facts are known after it."""
        is_complete = known == len(question.relations)
        is_wrong = not is_complete and self.rng.random() < self.mix.wrong_query
        query = random_name(self.rng) if is_wrong else question.path[known]
        finds_next = not is_complete and not is_wrong
        segments = [
            *self.think(question, known, query),
            TraceSegment("model", f" <search> {query} </search>"),
            self.observation(question, known if finds_next else None, query, taken),
        ]
        return segments, known + finds_next

    def think(self, question: Question, known: int, query: str) -> list[TraceSegment]:
        """The thought of a turn: what to look for, or, once a fact is known, the last one read."""
        if known == 0:
            return [TraceSegment("model", f"<think> find {query} </think>")]
        x = question.path[known - 1]
        relation = RELATIONS[question.relations[known - 1]]
        fact = (
            TraceSegment("model", f"<think> {x}"),
            TraceSegment("read", f" {relation.sentence} {question.path[known]}"),
        )
        return [*fact, TraceSegment("model", " </think>")]

    def observation(
        self, question: Question, known: int | None, query: str, taken: set[str]
    ) -> TraceSegment:
        """Draws what a search finds: the passage of path[known], if not None, among distractors."""
        rng = self.rng
        entities = []
        kind = rng.choice(KINDS)
        if known is not None:
            relation = RELATIONS[question.relations[known]]
            kind = relation.subject
            entity = self.entity(query, kind, taken)
            entity.facts[relation.name] = question.path[known + 1]
            entities.append(entity)
        return self.found(entities, query, kind, taken)


def encode_trace(
    segments: Sequence[TraceSegment], tokenizer: "PreTrainedTokenizerBase"
) -> dict[str, list[int]]:
    """The `input_ids` of a trace, with `loss_mask` and `read_mask`.

    `loss_mask` is 1 on the model's tokens, and `read_mask` on those it copied out of a passage.
    """
    ids: list[int] = []
    loss: list[int] = []
    read: list[int] = []
    for segment in segments:
        if segment.kind == "observation":
            new, _ = encode_passages(segment.passages, tokenizer, WHOLE, emitted="")
        elif segment.kind == "result":
            new, _ = encode_observation(segment.text, tokenizer, WHOLE, "", PYTHON_FORMAT)
        elif segment.kind == "finding":
            new, _ = encode_observation(segment.text, tokenizer, WHOLE, "", SEARCH_R1)
        elif segment.kind == "end":
            new = [tokenizer.get_vocab()[segment.text]]
        else:
            new = encode_text(tokenizer, segment.text)
        ids += new
        loss += [int(segment.kind in WRITTEN)] * len(new)
        read += [int(segment.kind == "read")] * len(new)
    return {"input_ids": ids, "loss_mask": loss, "read_mask": read}
