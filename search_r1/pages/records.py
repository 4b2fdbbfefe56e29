"""Reads trajectory records for pages, and makes of each what a page shows.

A line that cannot be read is no error: it becomes an entry that says which line it is, and why.
"""

import json
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from search_r1.rewards.matching import gold_answers, last_answer
from search_r1.trajectory import (
    GoldPassages,
    Record,
    bare_name,
    gold_passages,
    question_of,
    read_searches,
)
from verl.agent import Source
from verl.utils.errors import DataError

EXCERPT = 2000
"""Characters of an unreadable line that are shown."""
NAME = re.compile(r"(train|val)_(\d+)")
NOT_SHOWN = ("prompt_ids", "row")


@dataclass(frozen=True)
class Entry:
    """A line of a file of records."""

    file: str
    """Name of the file without its folder."""
    line: int
    """From 1."""
    kind: str
    """`train`, `val`, or `evaluation`."""
    step: int | None
    """Step of the weights, or of the training; None for an evaluation."""
    record: Record | None
    """None where the line cannot be read."""
    problem: str = ""
    """Why the line cannot be read."""
    excerpt: str = ""
    """The beginning of a line that cannot be read."""

    @property
    def name(self) -> str:
        """A name that stays the same while the files do, for links."""
        return f"{Path(self.file).stem}:{self.line}"


def record_files(place: Path) -> list[Path]:
    """The files of records of a run folder, of a folder of results, or the file `place` itself.

    Training comes before validation of the same step. Raises DataError where there is none.
    """
    if place.is_file():
        return [place]
    is_run = (place / "trajectories").is_dir() or (place / "config.yaml").exists()
    folder = place / "trajectories" if is_run else place
    found = [path for path in folder.glob("*.jsonl") if path.name != "metrics.jsonl"]
    if not found:
        raise DataError(
            f"{place}: neither a file of trajectory records nor a folder with some (a run folder "
            "has them in trajectories/*.jsonl)"
        )
    return sorted(found, key=lambda path: (step_of(path)[::-1], path.name))


def step_of(path: Path) -> tuple[str, int]:
    """Whether a file is of training or of a validation, and of which step; -1 without one."""
    match = NAME.fullmatch(path.stem)
    return (match[1], int(match[2])) if match else ("evaluation", -1)


def read_entries(
    place: Path, steps: Collection[int] | None = None, limit: int | None = None
) -> Iterator[Entry]:
    """Reads the entries of all files of `place`, in their order.

    `steps`: only files of these; `limit`: of each file only the first so many lines. Raises
    DataError where `place` has no file of records.
    """
    for path in record_files(place):
        kind, step = step_of(path)
        if steps is not None and step not in steps:
            continue
        with path.open(encoding="utf-8", errors="replace") as lines:
            for number, line in enumerate(islice(lines, limit), 1):
                if line.strip():
                    record, problem = parse(line)
                    excerpt = line[:EXCERPT] if record is None else ""
                    known = None if step < 0 else step
                    yield Entry(path.name, number, kind, known, record, problem, excerpt)


def parse(line: str) -> tuple[Record | None, str]:
    """The record of a line, or None and why it is none. What JSON cannot express becomes null."""
    try:
        record = json.loads(line, parse_constant=lambda _: None)
    except (ValueError, RecursionError) as error:
        cause = "" if line.endswith("\n") else "; the line does not end, so it was cut off"
        return None, f"not JSON: {error}{cause}"
    problem = shape_problem(record)
    return (None, problem) if problem else (record, "")


def shape_problem(record: object) -> str:
    """Why a page could not show `record`; empty if it can."""
    if not isinstance(record, dict):
        return f"not a record but a {type(record).__name__}"
    kinds = {"prompt": str, "segments": list, "data_source": str, "reward": dict}
    for name, kind in kinds.items():
        if not isinstance(record.get(name), kind):
            return f"not a trajectory record: {name} is {excerpt_of(record.get(name))}"
    for number, segment in enumerate(record["segments"]):
        is_known = isinstance(segment, dict) and segment.get("source") in tuple(Source)
        if not is_known or not isinstance(segment.get("text"), str):
            return f"not a trajectory record: segment {number} has no author or no text"
        if not isinstance(segment.get("info", {}), dict):
            return f"not a trajectory record: info of segment {number} is no mapping"
    return ""


def excerpt_of(value: object) -> str:
    """A value as a few characters for a message."""
    return "missing" if value is None else repr(value)[:60]


def shown(entry: Entry) -> tuple[dict[str, Any], dict[str, Any]]:
    """The summary of an entry for the list of a page, and what is shown when it is opened.

    A record that has the shape of one, and yet something unknown within, gets a problem.
    """
    try:
        return summary_of(entry), content_of(entry)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        text = json.dumps(entry.record)[:EXCERPT]
        problem = f"not a record that this page knows: {error!r}"
        strange = replace(entry, record=None, problem=problem, excerpt=text)
        return summary_of(strange), content_of(strange)


def content_of(entry: Entry) -> dict[str, Any]:
    """What a page shows of an entry that is opened."""
    place = {"file": entry.file, "line": entry.line, "kind": entry.kind, "step": entry.step}
    if entry.record is None:
        return {**place, "problem": entry.problem, "excerpt": entry.excerpt}
    return {**view_of(entry.record), **place}


def view_of(record: Record) -> Record:
    """What a page shows of a record: gold passages are marked, ids that nobody reads left out.

    Answers of the policy and of the data are under `answer` and `gold`.
    """
    gold = gold_passages(record.get("extra_info") or {})
    segments = [view_of_segment(segment, gold) for segment in record["segments"]]
    kept = {name: value for name, value in record.items() if name not in NOT_SHOWN}
    rewrites = [
        {name: value for name, value in rewrite.items() if name not in NOT_SHOWN}
        for rewrite in record.get("rewrites") or ()
    ]
    return {
        **kept,
        **({"rewrites": rewrites} if rewrites else {}),
        "segments": segments,
        "question": question_of(record),
        "answer": answer_of(record),
        "gold": golds_of(record),
    }


def view_of_segment(segment: dict[str, Any], gold: GoldPassages) -> dict[str, Any]:
    """A segment of which each passage says whether it is gold."""
    kept = dict(segment)
    if "token_ends" not in segment:
        kept.pop("token_ids", None)  # without ends there is nothing to show them at
    info = dict(segment.get("info") or {})
    if isinstance(info.get("passages"), list):
        info["passages"] = [view_of_passage(passage, gold) for passage in info["passages"]]
    return {**kept, "info": info}


def view_of_passage(passage: object, gold: GoldPassages) -> dict[str, Any]:
    """A passage with `gold`; what is no passage is shown as a text."""
    if not isinstance(passage, dict):
        return {"title": "", "text": str(passage), "gold": False}
    is_gold = bare_name(passage.get(gold.key, "")) in gold.names
    return {**passage, "gold": is_gold}


def answer_of(record: Record) -> str | None:
    """The last complete answer of the policy, None without one."""
    said = [s for s in record["segments"] if s["source"] == Source.MODEL]
    turns = [s["text"] for s in said if not s.get("is_aside")]
    return last_answer(turns)


def golds_of(record: Record) -> list[str]:
    """The accepted answers; what is none of the known forms is shown as it is."""
    try:
        return gold_answers(record.get("ground_truth"))
    except (ValueError, TypeError):
        return [json.dumps(record.get("ground_truth"))]


def summary_of(entry: Entry) -> dict[str, Any]:
    """What the list of a page and its filters know of an entry."""
    summary: dict[str, Any] = {"name": entry.name, "kind": entry.kind, "step": entry.step}
    if entry.record is None:
        return {**summary, "problem": entry.problem}
    record = entry.record
    facts = record.get("extra_info") or {}
    info = record.get("info") or {}
    reward = record["reward"]
    segments = record["segments"]
    searches = read_searches(record)
    return {
        **summary,
        "source": record["data_source"],
        "group": f"{Path(entry.file).stem}/{record.get('uid') or question_of(record)}",
        "question": question_of(record) or record["prompt"][-300:],
        "answer": answer_of(record),
        "gold": golds_of(record),
        "score": reward.get("score"),
        "em": reward.get("em"),
        "hops": facts.get("hops", info.get("hops")),
        "searches": len(searches),
        "stop": record.get("stop_reason") or "unknown",
        "detail": "tokens" if any("mask" in s for s in segments) else "text",
        "tokens": sum(len(s.get("token_ids") or ()) for s in segments),
        "queries": [search.query for search in searches],
    }
