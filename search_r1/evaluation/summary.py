"""What a file of trajectory records says: scores with intervals, behaviour, per set, over all and
by hops."""

import json
from collections import defaultdict
from collections.abc import Sequence
from math import comb
from pathlib import Path
from typing import Any

from search_r1.evaluation.behaviour import (
    Course,
    behaviour,
    over_and_under_search,
    question_of,
    read_course,
    search_counts,
)
from search_r1.evaluation.scores import bootstrap_interval
from verl.utils.errors import DataError

Record = dict[str, Any]
SCORES = ("em", "f1", "sub_em")
ALL = "all"
AVERAGE = "average"


def read_records(path: Path) -> list[Record]:
    """The records of a file. Raises DataError naming file and line."""
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    records = []
    for number, line in enumerate(path.open(encoding="utf-8"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            missing = {
                "data_source",
                "segments",
                "reward",
                "stop_reason",
                "info",
                "ground_truth",
            } - record.keys()
        except (ValueError, AttributeError) as error:
            raise DataError(f"{path}, line {number}: not a trajectory record ({error})") from error
        if missing:
            raise DataError(
                f"{path}, line {number}: not a trajectory record, it lacks "
                f"{', '.join(sorted(missing))}"
            )
        records.append(record)
    if not records:
        raise DataError(f"{path}: no records")
    return records


def by_set(records: Sequence[Record]) -> dict[str, list[Record]]:
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        groups[record["data_source"]].append(record)
    return dict(groups)


def by_question(records: Sequence[Record], score: str) -> dict[str, float]:
    """Mean score of each question over its samples."""
    scores: dict[str, list[float]] = defaultdict(list)
    for record in records:
        # without a token: no components
        scores[question_of(record)].append(record["reward"].get(score, 0.0))
    return {question: sum(values) / len(values) for question, values in scores.items()}


def summarize(
    records: Sequence[Record], closed_book: dict[str, float] | None = None
) -> dict[str, Any]:
    """Per set and over all: scores with 95 % intervals over questions, behaviour, distribution of
    searches.

    A set whose questions need different numbers of hops also has `by_hops`. `average` is the
    unweighted mean of the sets' scores, as in the paper's table.
    """
    read = {
        id(record): read_course(record) for record in records
    }  # once: a record is in its set, in all, in its hops

    def figures_of(group: Sequence[Record]) -> dict[str, Any]:
        return figures([read[id(record)] for record in group], closed_book)

    groups = by_set(records)
    summary = {name: figures_of(group) for name, group in {**groups, ALL: list(records)}.items()}
    for name in (*groups, ALL):
        hops = by_hops(groups.get(name, records))
        if len(hops) > 1:
            summary[name]["by_hops"] = {
                str(n): figures_of(group) for n, group in sorted(hops.items())
            }
    summary[AVERAGE] = {
        score: sum(summary[name][score] for name in groups) / len(groups) for score in SCORES
    }
    return summary


def by_hops(records: Sequence[Record]) -> dict[int, list[Record]]:
    """By the number of facts a question needs; those of unknown number are left out."""
    groups: dict[int, list[Record]] = defaultdict(list)
    for record in records:
        if (hops := (record.get("extra_info") or {}).get("hops")) is not None:
            groups[hops].append(record)
    return dict(groups)


def figures(courses: Sequence[Course], closed_book: dict[str, float] | None) -> dict[str, Any]:
    """Scores and behaviour of some records, read as courses."""
    group = [course.record for course in courses]
    scores = {score: list(by_question(group, score).values()) for score in SCORES}
    found = {
        "questions": len(scores["em"]),
        "samples": len(group),
        **{score: sum(values) / len(values) for score, values in scores.items()},
        **{f"{score}_interval": bootstrap_interval(values) for score, values in scores.items()},
        **passes(group),
        "behaviour": behaviour(courses),
        "search_counts": search_counts(courses),
    }
    if closed_book is not None:
        found["behaviour"] |= over_and_under_search(courses, closed_book)
    return found


def passes(records: Sequence[Record]) -> dict[str, Any]:
    """`pass@k`: share of questions that one of k samples answers right, without bias from n samples
    (2107.03374).

    k is 1, 2, 4 ... and n, the fewest samples that a question has; empty where that is 1. pass@1 is
    the mean score, verl's mean@n.
    """
    right: dict[str, list[bool]] = defaultdict(list)
    for record in records:
        right[question_of(record)].append(record["reward"].get("em", 0.0) >= 0.5)
    n = min(len(samples) for samples in right.values())
    ks = sorted({n, *(2**i for i in range(n.bit_length()))}) if n > 1 else []
    rates = {
        str(k): [1 - comb(len(s) - sum(s), k) / comb(len(s), k) for s in right.values()] for k in ks
    }
    return {"pass@k": {k: sum(values) / len(values) for k, values in rates.items()}} if ks else {}
