"""Summarises a file of trajectory records: scores with intervals, and behaviour.

The figures are per question set, over all questions, and by number of hops.
"""

import json
from collections import defaultdict
from collections.abc import Sequence
from math import comb
from pathlib import Path
from typing import Any

from search_r1.evaluation.behaviour import (
    SearchHistory,
    behaviour,
    over_and_under_search,
    read_history,
    search_counts,
)
from search_r1.evaluation.scores import bootstrap_interval
from search_r1.trajectory import Record, question_key
from verl.utils.errors import DataError

SCORES = ("em", "f1", "sub_em")
ALL = "all"
AVERAGE = "average"
KEYS = ("data_source", "segments", "reward", "stop_reason", "info", "ground_truth")
"""Keys that a trajectory record must have."""


def read_records(path: Path) -> list[Record]:
    """Reads the records of a file. Raises DataError, with file and line, for anything else."""
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    lines = enumerate(path.open(encoding="utf-8"), 1)
    records = [
        read_record(line, f"{path}, line {number}") for number, line in lines if line.strip()
    ]
    if not records:
        raise DataError(f"{path}: no records")
    return records


def read_record(line: str, location: str) -> Record:
    """Parses the record on a line. Raises DataError, with its location, for anything else."""
    try:
        record = json.loads(line)
        missing = set(KEYS) - record.keys()
    except (ValueError, AttributeError) as error:
        raise DataError(f"{location}: not a trajectory record ({error})") from error
    if missing:
        raise DataError(
            f"{location}: not a trajectory record, it lacks {', '.join(sorted(missing))}"
        )
    return record


def by_set(records: Sequence[Record]) -> dict[str, list[Record]]:
    """The records of each question set."""
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        groups[record["data_source"]].append(record)
    return dict(groups)


def by_question(records: Sequence[Record], score: str) -> dict[str, float]:
    """Mean score of each question over its samples."""
    scores: dict[str, list[float]] = defaultdict(list)
    for record in records:
        # The reward has no components if the policy wrote no token.
        scores[question_key(record)].append(record["reward"].get(score, 0.0))
    return {question: sum(values) / len(values) for question, values in scores.items()}


def summarize(
    records: Sequence[Record], closed_book: dict[str, float] | None = None
) -> dict[str, Any]:
    """Scores with 95 % intervals over questions, and behaviour, by name of the set and for `all`.

    Where questions differ in their number of hops, an entry also has `by_hops`. `average` is the
    unweighted mean of the sets' scores, as in the paper's table.
    """
    # A record belongs to its set, to all, and to its hops, but is read only once.
    histories = {id(record): read_history(record) for record in records}

    def figures_of(group: Sequence[Record]) -> dict[str, Any]:
        return figures([histories[id(record)] for record in group], closed_book)

    sets = by_set(records)
    groups = {**sets, ALL: list(records)}
    summary = {name: figures_of(group) for name, group in groups.items()}
    for name in (*sets, ALL):
        hops = by_hops(sets.get(name, records))
        if len(hops) > 1:
            parts = {str(n): figures_of(group) for n, group in sorted(hops.items())}
            summary[name]["by_hops"] = parts
    average: dict[str, float] = {}
    for score in SCORES:
        average[score] = sum(summary[name][score] for name in sets) / len(sets)
    summary[AVERAGE] = average
    return summary


def by_hops(records: Sequence[Record]) -> dict[int, list[Record]]:
    """The records by the number of facts that the question needs, if it is known."""
    groups: dict[int, list[Record]] = defaultdict(list)
    for record in records:
        if (hops := (record.get("extra_info") or {}).get("hops")) is not None:
            groups[hops].append(record)
    return dict(groups)


def figures(
    histories: Sequence[SearchHistory], closed_book: dict[str, float] | None
) -> dict[str, Any]:
    """Scores and behaviour of some records."""
    group = [history.record for history in histories]
    scores = {score: list(by_question(group, score).values()) for score in SCORES}
    found = {
        "questions": len(scores["em"]),
        "samples": len(group),
        **{score: sum(values) / len(values) for score, values in scores.items()},
        **{f"{score}_interval": bootstrap_interval(values) for score, values in scores.items()},
        **passes(group),
        "behaviour": behaviour(histories),
        "search_counts": search_counts(histories),
    }
    if closed_book is not None:
        found["behaviour"] |= over_and_under_search(histories, closed_book)
    return found


def passes(records: Sequence[Record]) -> dict[str, Any]:
    """`pass@k` by k: the share of questions that one of k samples answers right (2107.03374).

    The estimate from n samples is unbiased. n is the smallest number of samples of a question, and
    k is 1, 2, 4, ... and n. The result is empty if n is 1. pass@1 is the mean score, verl's mean@n.
    """
    right: dict[str, list[bool]] = defaultdict(list)
    for record in records:
        right[question_key(record)].append(record["reward"].get("em", 0.0) >= 0.5)
    n = min(len(samples) for samples in right.values())
    if n == 1:
        return {}
    rates: dict[str, float] = {}
    for k in sorted({n, *(2**i for i in range(n.bit_length()))}):
        found = [pass_at(k, samples) for samples in right.values()]
        rates[str(k)] = sum(found) / len(found)
    return {"pass@k": rates}


def pass_at(k: int, samples: Sequence[bool]) -> float:
    """The probability that at least one of k samples drawn without replacement is right."""
    wrong = len(samples) - sum(samples)
    return 1 - comb(wrong, k) / comb(len(samples), k)
