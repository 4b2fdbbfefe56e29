"""Measures how a policy searches: pure functions of records of validation and evaluation."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain

import numpy as np

from search_r1.rewards.matching import gold_answers, holds_gold, normalize_answer
from search_r1.tools.base import SEARCH_TOOL
from search_r1.trajectory import (
    GoldPassages,
    Record,
    Search,
    gold_passages,
    num_repeated,
    question_key,
    question_of,
    read_searches,
)

NEAR = 0.8
"""Jaccard similarity of words from which two queries count as nearly the same."""
NAME = re.compile(r"\b[A-Z0-9][\w'’-]*")
"""A word with a capital or a digit at its beginning, as names and years have."""
GENERAL_WORDS = frozenset(
    re.findall(
        r"\w+",
        "and are as at be by did do does for from had has have how in is it its many much of on or "
        "that their there they this to was were what when where which who whom whose why will with",
    )
)
"""Words that do not say what a query is about; `normalize_answer` drops articles."""
Figures = dict[str, float]


@dataclass(frozen=True)
class SearchStep:
    """An executed search, and how much of the evidence has been found after it."""

    query: str
    ids: list[str]
    """Ids of the passages that it found."""
    new: list[str]
    """Ids that no earlier search found."""
    gold_seen: frozenset[str]
    """Names of the gold passages retrieved so far, including by this search."""
    has_answer: bool
    """Whether a passage of this or an earlier search holds a gold answer."""
    drifts: bool
    """Whether the query names nothing of the question or of a passage found before."""
    latency_s: float | None


@dataclass(frozen=True)
class SearchHistory:
    """The searches of a record, and how it ended."""

    searches: list[SearchStep]
    gold: frozenset[str]
    """Names of the gold passages; empty where they are not known."""
    answered: bool
    right: bool
    record: Record = field(repr=False)

    @property
    def complete_at(self) -> int | None:
        """Number of searches after which all gold passages had been retrieved.

        None if that never happened, or the gold passages are not known.
        """
        done = (i for i, s in enumerate(self.searches, 1) if self.gold and s.gold_seen == self.gold)
        return next(done, None)


def read_history(record: Record) -> SearchHistory:
    """The searches of a record."""
    gold = gold_passages(record.get("extra_info") or {})
    reward = record["reward"]  # has no components if the policy wrote no token
    return SearchHistory(
        follow(
            read_searches(record),
            gold,
            gold_answers(record["ground_truth"]),
            question_of(record) or record["prompt"],
        ),
        gold.names,
        answered=record["stop_reason"] == "answer",
        right=reward.get("em", 0.0) >= 0.5,
        record=record,
    )


def follow(
    searches: Sequence[Search], gold: GoldPassages, answers: Sequence[str], question: str
) -> list[SearchStep]:
    """The searches with what had been found after each of them."""
    steps: list[SearchStep] = []
    seen: set[str] = set()
    read = words(question)
    gold_seen: frozenset[str] = frozenset()
    has_answer = False
    for search in searches:
        ids = [str(passage["id"]) for passage in search.passages]
        new = [id for id in ids if id not in seen]
        gold_seen |= gold.found_in(search.passages)
        has_answer = has_answer or holds_gold(search.texts, answers)
        drifts = read.isdisjoint(subject_words(search.query))
        steps.append(
            SearchStep(search.query, ids, new, gold_seen, has_answer, drifts, search.latency_s)
        )
        seen.update(ids)
        read = read.union(*map(words, search.texts))
    return steps


def subject_words(query: str) -> set[str]:
    """The words of a query that say what it is about: its names, or else all but general words.

    >>> sorted(subject_words("Who married Ada Lovelace in 1835"))
    ['1835', 'ada', 'lovelace']
    >>> sorted(subject_words("capital of peru"))
    ['capital', 'peru']
    """
    names = words(" ".join(NAME.findall(query))) - GENERAL_WORDS
    return names or words(query) - GENERAL_WORDS


def words(query: str) -> set[str]:
    """The different words of a query."""
    return set(normalize_answer(query).split())


def duplicates(history: SearchHistory) -> int:
    """Number of searches whose normalised query repeats an earlier one."""
    return num_repeated([search.query for search in history.searches])


def near_duplicates(history: SearchHistory) -> int:
    """Number of searches that nearly repeat an earlier query, exact duplicates included."""
    sets = [words(search.query) for search in history.searches]
    count = 0
    for i, new in enumerate(sets):
        count += any(similar(new, old) for old in sets[:i])
    return count


def similar(a: set[str], b: set[str]) -> bool:
    """Whether the Jaccard similarity of two sets of words is at least `NEAR`."""
    return len(a & b) >= NEAR * len(a | b)


def superfluous(history: SearchHistory) -> int:
    """Number of searches made after all gold passages had been retrieved."""
    complete_at = history.complete_at
    return 0 if complete_at is None else len(history.searches) - complete_at


def behaviour(histories: Sequence[SearchHistory]) -> Figures:
    """The figures of behaviour by name, as means over the records.

    Figures about gold passages are included only where gold passages are known.
    """
    figures = general_figures(histories)
    figures |= latency_figures(histories)
    figures |= tool_figures(histories)
    reasons = Counter(h.record["stop_reason"] for h in histories)
    for reason, count in sorted(reasons.items()):
        figures[f"stop/{reason}"] = count / len(histories)
    with_gold = [h for h in histories if h.gold]
    if with_gold:
        figures |= gold_figures(with_gold)
        figures["searches_after_gold"] = sum(map(superfluous, with_gold)) / num_searches(histories)
    return figures


def num_searches(histories: Sequence[SearchHistory]) -> int:
    """Number of executed searches to divide by: 1 if there are none."""
    return max(1, sum(len(h.searches) for h in histories))


def general_figures(histories: Sequence[SearchHistory]) -> Figures:
    """The figures that every record has."""
    searches = num_searches(histories)
    steps = list(chain.from_iterable(h.searches for h in histories))
    retrieved = sum(len(step.ids) for step in steps)
    return {
        "searches": mean(histories, lambda h: len(h.searches)),
        "no_search": mean(histories, lambda h: not h.searches),
        "answered": mean(histories, lambda h: h.answered),
        "valid_actions": mean(histories, share_of_valid_actions),
        "duplicate_queries": sum(map(duplicates, histories)) / searches,
        "near_duplicate_queries": sum(map(near_duplicates, histories)) / searches,
        "query_drift": sum(step.drifts for step in steps) / searches,
        "new_passages": sum(len(step.new) for step in steps) / max(1, retrieved),
        "own_tokens": mean(histories, lambda h: num_tokens(h.record, "model")),
        "retrieved_tokens": mean(histories, lambda h: num_tokens(h.record, "observation")),
        "answer_in_information": mean(histories, finds_answer),
    }


def share_of_valid_actions(history: SearchHistory) -> float:
    """Share of a record's turns that have a valid action."""
    info = history.record["info"]
    return info["valid_actions"] / max(1, info["turns"])


def finds_answer(history: SearchHistory) -> bool:
    """Whether any retrieved passage held a gold answer."""
    return any(search.has_answer for search in history.searches)


def latency_figures(histories: Sequence[SearchHistory]) -> Figures:
    """Median and 95 % quantile of the seconds per search; empty where none are known."""
    steps = chain.from_iterable(h.searches for h in histories)
    seconds = [step.latency_s for step in steps if step.latency_s is not None]
    if not seconds:
        return {}
    p50, p95 = np.percentile(seconds, [50, 95])
    return {"search_latency_s/p50": float(p50), "search_latency_s/p95": float(p95)}


def tool_figures(histories: Sequence[SearchHistory]) -> Figures:
    """Executed calls per record, of each tool other than search."""
    counts = [h.record["info"].get("tools", {}) for h in histories]
    figures: Figures = {}
    for name in sorted(set().union(*counts) - {SEARCH_TOOL}):
        calls = sum(tools[name]["calls"] for tools in counts if name in tools)
        figures[f"calls/{name}"] = calls / len(histories)
    return figures


def gold_figures(with_gold: Sequence[SearchHistory]) -> Figures:
    """The figures of records whose gold passages are known."""
    figures = {
        "gold_retrieved": mean(with_gold, lambda h: h.complete_at is not None),
        "gold_recall": mean(with_gold, lambda h: recall_after(h, len(h.searches))),
        "premature_answers": mean(with_gold, lambda h: h.answered and h.complete_at is None),
    }
    complete = [h for h in with_gold if h.complete_at is not None]
    if complete:
        figures["right_if_gold_retrieved"] = mean(complete, lambda h: h.right)
    longest = max(len(h.searches) for h in with_gold)
    for turn in range(1, longest + 1):
        long_enough = [h for h in with_gold if len(h.searches) >= turn]
        recalls = [recall_after(h, turn) for h in long_enough]
        figures[f"gold_recall/turn_{turn}"] = sum(recalls) / len(recalls)
    return figures


def recall_after(history: SearchHistory, turn: int) -> float:
    """Share of the gold passages retrieved by the first `turn` searches."""
    return len(history.searches[turn - 1].gold_seen) / len(history.gold) if turn else 0.0


def search_counts(histories: Sequence[SearchHistory]) -> dict[int, int]:
    """The number of records by their number of searches."""
    return dict(sorted(Counter(len(h.searches) for h in histories).items()))


def over_and_under_search(
    histories: Sequence[SearchHistory], closed_book: dict[str, float]
) -> Figures:
    """Shares of questions that were searched for needlessly, or should have been searched for.

    `closed_book` says which questions the model knows, by `question_key`. over_search: share of the
    known questions that were searched for. under_search: share of the unknown ones that were
    answered, wrong, without a search.
    """
    known = [h for h in histories if closed_book[question_key(h.record)] >= 0.5]
    unknown = [h for h in histories if closed_book[question_key(h.record)] < 0.5]
    return {
        "known": len(known) / len(histories),
        "over_search": mean(known, lambda h: bool(h.searches)),
        "under_search": mean(unknown, lambda h: not h.searches and not h.right),
    }


def num_tokens(record: Record, source: str) -> int:
    """Number of tokens of a record by one author."""
    return sum(len(s["token_ids"]) for s in record["segments"] if s["source"] == source)


def mean(histories: Sequence[SearchHistory], figure: Callable[[SearchHistory], float]) -> float:
    """The mean of a figure over the records, 0 if there are none."""
    return sum(float(figure(h)) for h in histories) / len(histories) if histories else 0.0
