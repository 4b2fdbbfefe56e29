"""What the agent loop knows of a question while it is under way."""

from dataclasses import asdict, dataclass, field
from typing import Any

from search_r1.agent.actions import SEARCH_TOOL
from search_r1.agent.tools import Tool
from verl.agent import Generate, Row, Trajectory

GOLD_KEYS = ("hops", "gold_ids", "gold_titles")
"""What of a row's `extra_info` metrics and rewards read in the trajectory's `info`."""


@dataclass
class CallCounts:
    """The executed calls of one tool in a trajectory."""

    calls: int = 0
    valid_calls: int = 0
    cut: int = 0
    """Results that were cut to fit into an observation."""
    latency_s: list[float] = field(default_factory=list)


@dataclass
class AgentData:
    """A question, its trajectory so far, and what is counted of it."""

    row: Row
    generate: Generate
    trajectory: Trajectory
    tools: list[Tool]
    turns: int = 0
    valid_actions: int = 0
    overruns: list[str] = field(default_factory=list)
    """What a turn's last token brought behind the tag that it completed."""
    counts: dict[str, CallCounts] = field(init=False)
    """By the name of the tool."""

    def __post_init__(self) -> None:
        self.counts = {tool.name: CallCounts() for tool in self.tools}

    @property
    def num_calls(self) -> int:
        """Executed calls of all tools."""
        return sum(counts.calls for counts in self.counts.values())

    def facts(self) -> dict[str, Any]:
        """The `info` of the finished trajectory; `tools` is there only beside search."""
        search = self.counts.get(SEARCH_TOOL, CallCounts())
        facts: dict[str, Any] = {
            "turns": self.turns,
            "valid_actions": self.valid_actions,
            "searches": search.calls,
            "cut": search.cut,
            "overruns": self.overruns,
            "latency_s": search.latency_s,
        }
        extra = self.row.get("extra_info") or {}
        facts |= {key: extra[key] for key in GOLD_KEYS if extra.get(key) is not None}
        further = {tool.name: self._facts_of(tool) for tool in self.tools if not is_search(tool)}
        return facts | ({"tools": further} if further else {})

    def _facts_of(self, tool: Tool) -> dict[str, Any]:
        tags = {"call_tag": tool.format.call_tag, "result_tag": tool.format.result_tag}
        return tags | asdict(self.counts[tool.name])


def is_search(tool: Tool) -> bool:
    return tool.name == SEARCH_TOOL
