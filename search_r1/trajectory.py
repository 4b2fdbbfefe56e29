"""Reads the searches of a trajectory, for metrics, rewards and evaluation alike.

A trajectory is a `Trajectory` from the agent loop, or a record that validation or evaluation wrote
(`verl.rollout.records`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from search_r1.rewards.matching import normalize_answer
from search_r1.tools.base import OPEN_TOOL, SEARCH_TOOL
from verl.agent import Row, Source, Trajectory
from verl.utils.errors import DataError

Record = dict[str, Any]
FINDING_KIND = "finding"
"""In the `info` of a segment in which the policy shortens a result, beside the conversation."""
SUMMARY_KIND = "summary"
"""In the `info` of a segment in which the policy sums up a context that is then left behind."""
SUMMARY_REQUEST = "summary_request"
"""The `kind` of the observation that asks for a summary."""
NO_TOOLS = frozenset({"invalid_action", "context", SUMMARY_KIND, SUMMARY_REQUEST})
"""Kinds of observations that no tool has brought."""


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
    found = [search_of(facts) for facts in observed_facts(trajectory)]
    return [search for search in found if search is not None]


def search_of(facts: dict[str, Any]) -> Search | None:
    """The search that an observation with these facts answers, None if it answers none."""
    if facts.get("kind", SEARCH_TOOL) != SEARCH_TOOL or "query" not in facts:
        return None
    return Search(str(facts["query"]), facts.get("passages") or [], facts.get("latency_s"))


def searches_by_turn(trajectory: Trajectory) -> tuple[list[Search], list[list[Search]]]:
    """The searches before the first turn, and those that each of `trajectory.turns` asked for.

    The observations after a turn answer it. An aside asks for nothing, even where it stands between
    a turn and the answers to it.
    """
    before: list[Search] = []
    searches: list[list[Search]] = []
    asked = before
    for segment in trajectory.segments:
        if segment.source is Source.MODEL:
            searches.append([])
            if not segment.is_aside:
                asked = searches[-1]
        elif search := search_of(segment.info):
            asked.append(search)
    return before, searches


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
    """The passages that hold the evidence for a question, as the data name them."""

    names: frozenset[str]
    """Ids, or titles where the ids are unknown; empty where the data have neither."""
    key: str
    """The field of a passage that the names are compared with: `id` or `title`."""

    def found_in(self, passages: Sequence[dict[str, Any]]) -> frozenset[str]:
        """The names of the gold passages that are among `passages`."""
        return self.names & {bare_name(passage[self.key]) for passage in passages}


def gold_passages(facts: dict[str, Any]) -> GoldPassages:
    """The gold passages that a row's `extra_info`, or a trajectory's `info`, names."""
    if facts.get("gold_ids"):
        return GoldPassages(frozenset(map(bare_name, facts["gold_ids"])), "id")
    return GoldPassages(frozenset(map(bare_name, facts.get("gold_titles") or ())), "title")


def bare_name(value: object) -> str:
    """An id or a title, without the quotes that titles have in a corpus."""
    return str(value).strip('"')


def num_repeated(queries: Sequence[str]) -> int:
    """How many of the queries, after normalisation, repeat an earlier one."""
    normal = [normalize_answer(query) for query in queries]
    return len(normal) - len(set(normal))


def question_of(row: Row) -> str:
    """The question of a row or record; empty where the data have only its prompt."""
    question = (row.get("extra_info") or {}).get("question") or row.get("question")
    return str(question or "")


def required_question(row: Row) -> str:
    """The question of a row. Raises DataError where the data have only its prompt."""
    if question := question_of(row):
        return question
    raise DataError(
        f"a {row.get('data_source')} row has no extra_info.question, which `template` needs: "
        "prepare it anew"
    )


def question_key(record: Record) -> str:
    """The key by which the records of two results are matched: the question, or else the prompt."""
    return f"{record['data_source']}: {question_of(record) or record['prompt']}"
