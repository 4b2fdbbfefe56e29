"""Traces of questions that need a calculation, on which their base model is trained (traces.py).

A clean trace searches every entity, states the years that it has read, subtracts them by a program,
and answers with what the program printed. A question about one year is answered without a program.
"""

import random
from dataclasses import dataclass

from search_r1.prompts import build_prompt
from search_r1.world.arithmetic import (
    DIFFERENCES,
    QUESTION_KINDS,
    YEAR_OF,
    YEARS,
    YearQuestion,
    draw_year,
)
from search_r1.world.generate import Entity
from search_r1.world.names import fresh_name, random_name
from search_r1.world.traces import PassageWriter, RecallWriter, TraceSegment

MAX_SEARCHES = 3


@dataclass(frozen=True)
class ArithmeticMix:
    """The probability of each deviation from a clean trace."""

    guess: float = 0.0
    """Answers with a random number instead of searching, while nothing is known. In the first turn
    this holds only if the first entity is a person."""
    guess_known: float = 0.0
    """The same in the first turn where the first entity is a company."""
    wrong_query: float = 0.0
    """Searches for a random name instead of the right one."""
    stop_early: float = 0.0
    """Answers with the first of two years."""
    forget: float = 0.0
    """Answers with a random number instead of calculating."""
    wrong_year: float = 0.0
    """Calculates with a random year in the place of one that was read."""
    needless: float = 0.0
    """Calculates although a year alone is asked for."""


CLEAN = ArithmeticMix()
POOR_ARITHMETIC = ArithmeticMix(
    guess=0.6,
    guess_known=0.15,
    wrong_query=0.15,
    stop_early=0.2,
    forget=0.55,
    wrong_year=0.2,
    needless=0.05,
)


class YearRecallWriter(RecallWriter):
    """Draws lists of facts as `RecallWriter` does, half of them with years."""

    def fact(self, taken: set[str]) -> tuple[str, str, str]:
        """Draws a fact: subject, verb and object."""
        if self.rng.random() < 0.5:
            return super().fact(taken)
        verb = self.rng.choice(list(YEAR_OF.values()))
        return fresh_name(self.rng, taken), verb, draw_year(self.rng)


class ArithmeticWriter(PassageWriter):
    """Draws traces about years, with the deviations of `mix`."""

    def __init__(self, rng: random.Random, mix: ArithmeticMix, num_passages: int = 3) -> None:
        super().__init__(rng, num_passages)
        self.mix = mix

    def __call__(self) -> list[TraceSegment]:
        """Draws one trace, about entities that appear in no other one."""
        taken: set[str] = set()
        question = self.question(taken)
        segments = [TraceSegment("prompt", build_prompt(question.text, "short"))]
        known = 0
        for turn in range(MAX_SEARCHES):
            if known == len(question.names) or self.stops(question, known, turn):
                break
            new, known = self.search(question, known, taken)
            segments += new
        return [*segments, *self.finish(question, known)]

    def question(self, taken: set[str]) -> YearQuestion:
        """Draws a question about new entities."""
        kind = self.rng.choice(QUESTION_KINDS)
        names = tuple(fresh_name(self.rng, taken) for _ in kind.subjects)
        if not kind.is_difference:
            return YearQuestion(kind, names, (draw_year(self.rng),))
        difference = self.rng.choice(DIFFERENCES)
        first = self.rng.choice(YEARS[: len(YEARS) - difference])
        return YearQuestion(kind, names, (str(first), str(first + difference)))

    def stops(self, question: YearQuestion, known: int, turn: int) -> bool:
        """Draws whether the policy answers although it does not know all years."""
        if known:
            return self.rng.random() < self.mix.stop_early
        searches_first = turn == 0 and question.kind.subjects[0] == "company"
        return self.rng.random() < (self.mix.guess_known if searches_first else self.mix.guess)

    def search(
        self, question: YearQuestion, known: int, taken: set[str]
    ) -> tuple[list[TraceSegment], int]:
        """Draws a turn that searches; returns it and how many years are known after it."""
        is_wrong = self.rng.random() < self.mix.wrong_query
        query = random_name(self.rng) if is_wrong else question.names[known]
        kind = question.kind.subjects[known]
        entities: list[Entity] = []
        if not is_wrong:
            entity = self.entity(query, kind, taken)
            entity.facts[YEAR_OF[kind]] = question.years[known]
            entities.append(entity)
        segments = [
            *self.think(question, known, query),
            TraceSegment("model", f" <search> {query} </search>"),
            self.found(entities, query, kind, taken),
        ]
        return segments, known + (not is_wrong)

    def think(self, question: YearQuestion, known: int, query: str) -> list[TraceSegment]:
        """The thought of a turn: what to look for, or the years that are known, the last first."""
        if known == 0:
            return [TraceSegment("model", f"<think> find {query} </think>")]
        segments = [TraceSegment("model", "<think>")]
        for i in reversed(range(known)):
            verb = YEAR_OF[question.kind.subjects[i]]
            segments.append(TraceSegment("model", f" {question.names[i]} {verb}"))
            segments.append(TraceSegment("read", f" {question.years[i]}"))
        return [*segments, TraceSegment("model", " </think>")]

    def finish(self, question: YearQuestion, known: int) -> list[TraceSegment]:
        """Draws how the policy comes to its answer from the years that it knows."""
        if known == 0:
            return [TraceSegment("model", "<think> I guess </think>"), self.guess(question)]
        thought = self.think(question, known, "")
        is_complete = known == len(question.names)
        if is_complete and question.kind.is_difference:
            if self.rng.random() < self.mix.forget:
                return [*thought, self.guess(question)]
            return [*thought, *self.calculation(question)]
        if is_complete and self.rng.random() < self.mix.needless:
            years = (draw_year(self.rng), question.years[0])
            return [*thought, *self.calculation(YearQuestion(question.kind, (), years))]
        return [*thought, TraceSegment("model", f" <answer> {question.years[known - 1]} </answer>")]

    def guess(self, question: YearQuestion) -> TraceSegment:
        """Draws an answer out of nothing."""
        is_difference = question.kind.is_difference
        number = self.rng.choice(DIFFERENCES) if is_difference else draw_year(self.rng)
        return TraceSegment("model", f" <answer> {number} </answer>")

    def calculation(self, question: YearQuestion) -> list[TraceSegment]:
        """Draws a program, what it prints, and the answer with that."""
        years = list(question.years)
        if self.rng.random() < self.mix.wrong_year:
            years[self.rng.randrange(len(years))] = draw_year(self.rng)
        kinds = [
            "read" if year == right else "model"
            for year, right in zip(years, question.years, strict=True)
        ]
        result = str(int(years[1]) - int(years[0]))
        return [
            TraceSegment("model", " <python>"),
            TraceSegment(kinds[1], f" {years[1]}"),
            TraceSegment("model", " -"),
            TraceSegment(kinds[0], f" {years[0]}"),
            TraceSegment("model", " </python>"),
            TraceSegment("result", result),
            TraceSegment("model", "<think> that is"),
            TraceSegment("read", f" {result}"),
            TraceSegment("model", f" </think> <answer> {result} </answer>"),
        ]

    def entity(self, name: str, kind: str, taken: set[str]) -> Entity:
        """Draws an entity with its facts, and its year where its kind has one."""
        entity = super().entity(name, kind, taken)
        if kind in YEAR_OF:
            entity.facts[YEAR_OF[kind]] = draw_year(self.rng)
        return entity
