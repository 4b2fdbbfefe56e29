"""Traces of questions of up to six hops, on which the base model for deep questions is trained.

They are those of `traces.py` with three things more.

- Every thought ends with a plan: the verbs of the facts that are to follow. The policy reads it off
  the question once and then copies what is left of it, because so small a model does not find its
  place in a long question again in every turn.
- In half of the traces the context is folded after a few searches: the policy sums up the newest
  fact and what is left of the plan, which is all that is needed, and goes on from that.
- In some of them every search's passages are first shortened to a finding, by the policy itself: a
  text of its own that holds the passages and the query, and ends with the facts about what the
  query names. Of some others the row is one turn alone, with older passages left out before it.

A trace is several rows then, one for each context. Each holds only what the policy says in it, so
that nothing is trained twice.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from search_r1.prompts import (
    FOLD_ACTION,
    LEFT_OUT,
    SHORT_CONDENSE_PROMPT,
    build_prompt,
    format_passages,
)
from search_r1.world.generate import RELATIONS, Question, plain_chains
from search_r1.world.names import fresh_name
from search_r1.world.tokenizer import EOS
from search_r1.world.traces import PolicyMix, TraceSegment, TraceWriter

FOLDED = 0.5
"""Share of the traces in which contexts are folded."""
SEARCHES_PER_CONTEXT = (1, 2, 2, 3)
"""After how many searches they are folded then."""
CONDENSED = 0.15
"""Share of the traces in which passages are shortened."""
SHORTENED = 0.2
"""Share of the other traces without a fold of which one turn is kept, older passages left out."""
FILLERS = (0, 1, 2, 3, 4)
"""Sentences without a fact in each passage of a trace, ..."""
CONDENSED_FILLERS = (3, 6)
"""... and where passages are shortened."""
PLAN_END = "answer"
"""What follows the last relation of a plan."""
NOTHING = " nothing"
"""A summary, or a finding, without a fact."""


@dataclass(frozen=True)
class DeepMix(PolicyMix):
    """The probability of each deviation from a clean trace, also in summaries and findings."""

    lose: float = 0.0
    """Leaves the last fact out of a summary."""
    misstate: float = 0.0
    """States the last fact of a summary with a random name."""
    misread: float = 0.0
    """Takes a finding from another passage than that of what the query names."""


CLEAN_DEEP = DeepMix()
POOR_DEEP = DeepMix(
    guess=0.6,
    guess_known=0.1,
    wrong_query=0.12,
    stop_early=0.12,
    search_again=0.02,
    bold=frozenset({"employer", "country", "founder", "capital", "home"}),
    lose=0.1,
    misstate=0.1,
    misread=0.15,
)


@dataclass
class Progress:
    """How far a trace has come."""

    question: Question
    known: int = 0
    """Facts that the policy knows."""
    searches: int = 0
    """Searches in the present context."""


class DeepTraceWriter(TraceWriter):
    """Draws rows of traces. Those of one trace follow each other."""

    max_turns = 7

    def __init__(
        self,
        rng: random.Random,
        mix: DeepMix,
        num_passages: int = 3,
        hops: Sequence[int] = (1, 2, 3, 4, 5, 6),
        is_noisy: bool = True,
    ) -> None:
        """`is_noisy`: whether passages have sentences without a fact."""
        super().__init__(rng, mix, num_passages, ())
        self.deep_mix = mix
        self.is_noisy = is_noisy
        self.chains = {h: plain_chains(h) for h in hops}
        self.pending: list[list[TraceSegment]] = []

    def __call__(self) -> list[TraceSegment]:
        """Draws a row: the next one of the trace under way, or the first one of a new trace."""
        if not self.pending:
            self.pending = self.trace()
        return self.pending.pop(0)

    def trace(self) -> list[list[TraceSegment]]:
        """Draws a trace about entities that appear in no other one."""
        chain = self.rng.choice(self.chains[self.rng.choice(list(self.chains))])
        taken = set(self.common_names)
        path = tuple(fresh_name(self.rng, taken) for _ in range(len(chain) + 1))
        is_condensed = self.rng.random() < CONDENSED
        if self.is_noisy:
            self.filler = self.rng.choice(CONDENSED_FILLERS if is_condensed else FILLERS)
        most = self.rng.choice(SEARCHES_PER_CONTEXT) if self.rng.random() < FOLDED else None
        rows = self.rows(Progress(Question(chain, path)), taken, is_condensed, most)
        is_plain = len(rows) == 1 and not is_condensed
        if is_plain and self.rng.random() < SHORTENED:
            return [self.shortened(rows[0])]
        return rows

    def rows(
        self, progress: Progress, taken: set[str], is_condensed: bool, most_searches: int | None
    ) -> list[list[TraceSegment]]:
        """Draws the turns of a trace as rows, those of findings before the row that goes on."""
        prompt = TraceSegment("prompt", build_prompt(progress.question.text, "short"))
        row = [prompt]
        rows: list[list[TraceSegment]] = []
        for turn in range(self.max_turns + 1):
            if progress.searches == most_searches:
                request, summary = self.fold(progress)
                rows.append([*row, *request])
                row = [prompt, summary]
            if self.guesses(progress.question, progress.known, turn):
                return [*rows, [*row, self.guess(taken)]]
            if self.answers(progress.question, progress.known, turn):
                return [*rows, [*row, *self.answer(progress)]]
            turn_segments, known = self.search(progress.question, progress.known, taken)
            progress.searches += 1
            if is_condensed:
                call, turn_segments, known = self.condense(turn_segments, progress, known)
                rows.append(call)
            row += turn_segments
            progress.known = known
        raise AssertionError("the last turn answers")

    def shortened(self, row: list[TraceSegment]) -> list[TraceSegment]:
        """Draws a turn of the row, and leaves all passages but the newest out of its context."""
        begins = [
            i + 1 for i, segment in enumerate(row) if segment.kind in ("prompt", "observation")
        ]
        place = self.rng.randrange(len(begins))
        begin, end = begins[place], [*begins[1:], len(row)][place]
        context: list[TraceSegment] = []
        for number, segment in enumerate(row[:begin]):
            if segment.kind != "observation":
                context.append(TraceSegment("prompt", segment.text))
            elif number == begin - 1:
                context.append(segment)
            else:
                context.append(TraceSegment("finding", LEFT_OUT))
        return [*context, *(s for s in row[begin:end] if s.kind != "observation")]

    def think(self, question: Question, known: int, query: str) -> list[TraceSegment]:
        """The thought of a turn: what to look for, or the last fact, and what is to follow."""
        said = last_fact(question, known) if known else [TraceSegment("model", f" find {query}")]
        plan = f", {remaining(question, known)} </think>"
        return [TraceSegment("model", "<think>"), *said, TraceSegment("model", plan)]

    def guess(self, taken: set[str]) -> TraceSegment:
        """Draws an answer out of nothing."""
        name = fresh_name(self.rng, taken)
        return TraceSegment("model", f"<think> I guess </think> <answer> {name} </answer>")

    def answer(self, progress: Progress) -> list[TraceSegment]:
        """The turn that answers with the last name that is known."""
        name = progress.question.path[progress.known]
        thought = self.think(progress.question, progress.known, name)
        return [*thought, TraceSegment("model", f" <answer> {name} </answer>")]

    def fold(self, progress: Progress) -> tuple[list[TraceSegment], TraceSegment]:
        """Draws a summary, which the trace goes on from.

        Returns what ends the present row, and what follows the prompt in the next one.
        """
        progress.searches = 0
        is_wrong = False
        if progress.known and self.rng.random() < self.deep_mix.lose:
            progress.known -= 1
        elif progress.known and self.rng.random() < self.deep_mix.misstate:
            is_wrong = True
            path = list(progress.question.path)
            path[progress.known] = fresh_name(self.rng, set(path))
            progress.question = replace(progress.question, path=tuple(path))
        said = [TraceSegment("model", "<summary>"), *self.summed_up(progress, is_wrong)]
        text = "".join(segment.text for segment in said)
        return [TraceSegment("prompt", FOLD_ACTION), *said], TraceSegment("prompt", f"{text}\n")

    def summed_up(self, progress: Progress, is_wrong: bool) -> list[TraceSegment]:
        """What a summary says: the last fact, from which the others are no longer needed."""
        question, known = progress.question, progress.known
        if known == 0:
            return [TraceSegment("model", f"{NOTHING} </summary>")]
        subject, fact = last_fact(question, known)
        if is_wrong:
            fact = replace(fact, kind="model")  # it stands in no passage
        plan = f", {remaining(question, known)} </summary>"
        return [subject, fact, TraceSegment("model", plan)]

    def condense(
        self, turn: Sequence[TraceSegment], progress: Progress, known: int
    ) -> tuple[list[TraceSegment], list[TraceSegment], int]:
        """Draws the finding that a search's passages are shortened to.

        Returns the row of the call that makes it, the turn with the finding in the passages' place,
        and how many facts are known then.
        """
        *said, observation = turn
        query = said[-1].text.split()[1]
        about = query
        others = [title.strip('"') for title, _ in observation.passages]
        if self.rng.random() < self.deep_mix.misread:
            about = self.rng.choice(others)
        finding = facts_about(about, observation.passages)
        context = format_passages(observation.passages)
        request = SHORT_CONDENSE_PROMPT.format(query=query, context=context)
        call = [TraceSegment("prompt", request), *finding, TraceSegment("end", EOS)]
        text = "".join(segment.text for segment in finding).strip()
        shown = [*said, TraceSegment("finding", text)]
        return call, shown, known if about == query else progress.known


def remaining(question: Question, known: int) -> str:
    """The verbs of the facts that are to follow, and the end of the plan.

    >>> remaining(Question(("residence", "mayor"), ("Torvel", "Zorbin", "Kalmen")), 1)
    'elected answer'
    """
    verbs = [RELATIONS[relation].sentence for relation in question.relations[known:]]
    return " ".join([*verbs, PLAN_END])


def last_fact(question: Question, known: int) -> list[TraceSegment]:
    """The newest fact that is known."""
    verb = RELATIONS[question.relations[known - 1]].sentence
    return [
        TraceSegment("model", f" {question.path[known - 1]}"),
        TraceSegment("read", f" {verb} {question.path[known]}"),
    ]


def facts_about(name: str, passages: Sequence[tuple[str, str]]) -> list[TraceSegment]:
    """The sentences with a fact of the passage about `name`."""
    verbs = {relation.sentence for relation in RELATIONS.values()}
    segments: list[TraceSegment] = []
    for title, text in passages:
        if title != f'"{name}"':
            continue
        for sentence in text.rstrip(".").split(". "):
            subject, verb, *rest = sentence.split()
            if verb in verbs:
                segments += [
                    TraceSegment("model", f" {subject}"),
                    TraceSegment("read", f" {verb} {rest[0]}"),
                    TraceSegment("model", "."),
                ]
    return segments or [TraceSegment("model", NOTHING)]
