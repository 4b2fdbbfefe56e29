"""What a trajectory shows of its searches: one reading for metrics, rewards and evaluation.

A trajectory is read as the loop left it (`Trajectory`), or as validation and evaluation wrote it (a
record, `verl.rollout.records`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from search_r1.rewards.matching import normalize_answer
from search_r1.tools.base import OPEN_TOOL, SEARCH_TOOL
from verl.agent import Row, Source, Trajectory
from verl.utils.errors import DataError

Record = dict[str, Any]


@dataclass(frozen=True)
class Search:
    """An executed search."""

    query: str
    passages: list[dict[str, Any]]
    """Each with `id`, `title` and `text`."""
    latency_s: float | None = None

    @property
    def texts(self) -> list[str]:
        """Title and text of each passage."""
        return [f"{p['title']}\n{p['text']}" for p in self.passages]


def read_searches(trajectory: Trajectory | Record) -> list[Search]:
    """The executed searches, in their order."""
    return [
        Search(str(facts["query"]), facts.get("passages") or [], facts.get("latency_s"))
        for facts in observed_facts(trajectory)
        if facts.get("kind", SEARCH_TOOL) == SEARCH_TOOL and "query" in facts
    ]


def read_passages(trajectory: Trajectory | Record) -> list[dict[str, Any]]:
    """The passages that searches found and opened pages showed, in their order."""
    return [
        passage
        for facts in observed_facts(trajectory)
        if facts.get("kind", SEARCH_TOOL) in (SEARCH_TOOL, OPEN_TOOL)
        for passage in facts.get("passages") or []
    ]


def observed_facts(trajectory: Trajectory | Record) -> list[dict[str, Any]]:
    """The `info` of each observation."""
    if isinstance(trajectory, Trajectory):
        return [s.info for s in trajectory.segments if s.source is Source.OBSERVATION]
    return [s["info"] for s in trajectory["segments"] if s["source"] == Source.OBSERVATION]


@dataclass(frozen=True)
class GoldPassages:
    """The passages that hold the evidence of a question, as the data name them."""

    names: frozenset[str]
    """Ids, or where these are unknown titles; empty where the data do not say."""
    key: str
    """Which of a passage these are: `id` or `title`."""

    def found_in(self, passages: Sequence[dict[str, Any]]) -> frozenset[str]:
        """The names of those that are among `passages`."""
        return self.names & {bare_name(passage[self.key]) for passage in passages}


def gold_passages(facts: dict[str, Any]) -> GoldPassages:
    """What `gold_ids` or `gold_titles` say: of a row's `extra_info`, or a trajectory's `info`."""
    if facts.get("gold_ids"):
        return GoldPassages(frozenset(map(bare_name, facts["gold_ids"])), "id")
    return GoldPassages(frozenset(map(bare_name, facts.get("gold_titles") or ())), "title")


def bare_name(value: object) -> str:
    """An id or a title, without the quotes that titles have in a corpus."""
    return str(value).strip('"')


def num_repeated(queries: Sequence[str]) -> int:
    """How many of the queries, normalised, were asked before."""
    normal = [normalize_answer(query) for query in queries]
    return len(normal) - len(set(normal))


def question_of(row: Row) -> str:
    """The question of a row or record; empty where the data hold only its prompt."""
    question = (row.get("extra_info") or {}).get("question") or row.get("question")
    return str(question or "")


def required_question(row: Row) -> str:
    """The question of a row. Raises DataError where the data hold only its prompt."""
    if question := question_of(row):
        return question
    raise DataError(
        f"a {row.get('data_source')} row has no extra_info.question, which `template` needs: "
        "prepare it anew"
    )


def question_key(record: Record) -> str:
    """What two results are matched by: the question where the data keep it, else the prompt."""
    return f"{record['data_source']}: {question_of(record) or record['prompt']}"
