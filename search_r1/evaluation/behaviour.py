"""How a policy searches: pure functions of trajectory records, as validation and evaluation write
them."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from search_r1.rewards.matching import gold_answers, normalize_answer

Record = dict[str, Any]
NEAR = 0.8
"""Jaccard similarity of the words of two queries from which they count as nearly the same."""


@dataclass(frozen=True)
class Search:
    """An executed search: its query, the passages it brought, what of the evidence is known after
    it."""

    query: str
    ids: list[str]
    new: list[str]
    """Ids that no earlier search brought."""
    gold_seen: frozenset[str]
    """Gold passages retrieved so far, this search included."""
    has_answer: bool
    """Whether a passage of this or an earlier search holds a gold answer."""


@dataclass(frozen=True)
class Course:
    """A record read as a sequence of searches."""

    searches: list[Search]
    gold: frozenset[str]
    """Ids, or where these are unknown titles, of the gold passages; empty when the data do not
    say."""
    answered: bool
    right: bool
    record: Record = field(repr=False)

    @property
    def complete_at(self) -> int | None:
        """Number of searches after which all gold passages had been retrieved, None if never or
        unknown."""
        done = (i for i, s in enumerate(self.searches, 1) if self.gold and s.gold_seen == self.gold)
        return next(done, None)


def read_course(record: Record) -> Course:
    """The course of a record."""
    extra = record.get("extra_info") or {}
    by_id = bool(extra.get("gold_ids"))
    gold = frozenset(name(g) for g in extra.get("gold_ids" if by_id else "gold_titles") or ())
    answers = [a for g in gold_answers(record["ground_truth"]) if (a := normalize_answer(g))]
    searches: list[Search] = []
    seen: set[str] = set()
    has_answer = False
    for segment in record["segments"]:
        info = segment["info"]
        if segment["source"] != "observation" or "query" not in info:
            continue
        passages = info.get("passages") or []
        ids = [str(p["id"]) for p in passages]
        names = {name(p["id"] if by_id else p["title"]) for p in passages}
        texts = [normalize_answer(f"{p['title']} {p['text']}") for p in passages]
        has_answer = has_answer or any(answer in text for answer in answers for text in texts)
        known = (searches[-1].gold_seen if searches else frozenset()) | (names & gold)
        searches.append(
            Search(info["query"], ids, [i for i in ids if i not in seen], known, has_answer)
        )
        seen.update(ids)
    answered = record["stop_reason"] == "answer"
    right = record["reward"].get("em", 0.0) >= 0.5  # a trajectory without a token has no components
    return Course(searches, gold, answered, right, record)


def name(value: object) -> str:
    return str(value).strip('"')


def words(query: str) -> set[str]:
    return set(normalize_answer(query).split())


def duplicates(course: Course) -> int:
    """Searches whose normalised query was asked before."""
    normal = [normalize_answer(s.query) for s in course.searches]
    return len(normal) - len(set(normal))


def near_duplicates(course: Course) -> int:
    """Searches whose words are nearly those of an earlier query, exact duplicates included."""
    sets = [words(s.query) for s in course.searches]
    return sum(any(similar(new, old) for old in sets[:i]) for i, new in enumerate(sets))


def similar(a: set[str], b: set[str]) -> bool:
    return len(a & b) >= NEAR * len(a | b)


def superfluous(course: Course) -> int:
    """Searches made after all gold passages had been retrieved."""
    return len(course.searches) - course.complete_at if course.complete_at is not None else 0


def behaviour(courses: Sequence[Course]) -> dict[str, float]:
    """Means over the courses, under names that say what is counted. Shares of gold only where gold
    is known."""
    made = max(1, sum(len(c.searches) for c in courses))
    figures: dict[str, float] = {
        "searches": mean(courses, lambda c: len(c.searches)),
        "no_search": mean(courses, lambda c: not c.searches),
        "answered": mean(courses, lambda c: c.answered),
        "valid_actions": mean(
            courses, lambda c: c.record["info"]["valid_actions"] / max(1, c.record["info"]["turns"])
        ),
        "duplicate_queries": sum(duplicates(c) for c in courses) / made,
        "near_duplicate_queries": sum(near_duplicates(c) for c in courses) / made,
        "new_passages": sum(len(s.new) for c in courses for s in c.searches)
        / max(1, sum(len(s.ids) for c in courses for s in c.searches)),
        "own_tokens": mean(courses, lambda c: tokens(c.record, "model")),
        "retrieved_tokens": mean(courses, lambda c: tokens(c.record, "observation")),
        "answer_in_information": mean(courses, lambda c: any(s.has_answer for s in c.searches)),
    }
    if latencies := [
        s["info"]["latency_s"]
        for c in courses
        for s in c.record["segments"]
        if "latency_s" in s["info"]
    ]:
        p50, p95 = np.percentile(latencies, [50, 95])
        figures |= {"search_latency_s/p50": float(p50), "search_latency_s/p95": float(p95)}
    reasons = Counter(c.record["stop_reason"] for c in courses)
    figures |= {f"stop/{reason}": count / len(courses) for reason, count in sorted(reasons.items())}
    with_gold = [c for c in courses if c.gold]
    if with_gold:
        figures |= {
            "gold_retrieved": mean(with_gold, lambda c: c.complete_at is not None),
            "gold_recall": mean(with_gold, lambda c: recall_after(c, len(c.searches))),
            "premature_answers": mean(with_gold, lambda c: c.answered and c.complete_at is None),
            "searches_after_gold": sum(superfluous(c) for c in with_gold) / made,
        }
        if found := [c for c in with_gold if c.complete_at is not None]:
            figures["right_if_gold_retrieved"] = mean(found, lambda c: c.right)
        longest = max(len(c.searches) for c in with_gold)
        figures |= {
            f"gold_recall/turn_{turn}": mean(
                [c for c in with_gold if len(c.searches) >= turn], recall_at(turn)
            )
            for turn in range(1, longest + 1)
        }
    return figures


def recall_after(course: Course, turn: int) -> float:
    """Share of the gold passages retrieved by the first `turn` searches."""
    return len(course.searches[turn - 1].gold_seen) / len(course.gold) if turn else 0.0


def recall_at(turn: int) -> Callable[[Course], float]:
    return lambda course: recall_after(course, turn)


def search_counts(courses: Sequence[Course]) -> dict[int, int]:
    """How many courses made so many searches."""
    return dict(sorted(Counter(len(c.searches) for c in courses).items()))


def over_and_under_search(
    courses: Sequence[Course], closed_book: dict[str, float]
) -> dict[str, float]:
    """Search where it was not needed, none where it was; `closed_book` says which questions the
    model knows, by prompt.

    over_search: share of the known questions that were searched for. under_search: share of the
    unknown ones that were answered, wrong, without a search.
    """
    by_knowledge = [(c, closed_book[question_of(c.record)] >= 0.5) for c in courses]
    known, unknown = (
        [c for c, knows in by_knowledge if knows is wanted] for wanted in (True, False)
    )
    return {
        "known": len(known) / len(courses),
        "over_search": mean(known, lambda c: bool(c.searches)),
        "under_search": mean(unknown, lambda c: not c.searches and not c.right),
    }


def question_of(record: Record) -> str:
    """What two results are matched by: the question where the data keep it, else the prompt."""
    question = (record.get("extra_info") or {}).get("question")
    return f"{record['data_source']}: {question or record['prompt']}"


def tokens(record: Record, source: str) -> int:
    return sum(len(s["token_ids"]) for s in record["segments"] if s["source"] == source)


def mean(courses: Sequence[Course], figure: Callable[[Course], float]) -> float:
    """0 of none."""
    return sum(float(figure(c)) for c in courses) / len(courses) if courses else 0.0
