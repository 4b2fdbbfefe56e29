"""What the agent loop knows of a question while it is under way."""

from dataclasses import asdict, dataclass, field
from typing import Any

from search_r1.agent.actions import ToolCall
from search_r1.agent.condense import SideCall
from search_r1.agent.contexts import ContextState
from search_r1.agent.dialects import Observation
from search_r1.tools.base import SEARCH_TOOL, Tool, ToolResponse
from verl.agent import Generate, Row, Trajectory
from verl.utils.tokenizer import Message

DROPPED = "dropped"
"""Counts calls that were left without an answer."""
GOLD_KEYS = ("hops", "gold_ids", "gold_titles")
"""What of a row's `extra_info` metrics and rewards read in the trajectory's `info`."""


@dataclass(frozen=True)
class Answered:
    """A call and what the policy is to read."""

    response: ToolResponse
    latency_s: float | None = None
    """Seconds that it took; None for a call that was not executed."""
    side_call: SideCall | None = None
    """The policy's own call that shortened the result."""


@dataclass
class CallCounts:
    """The calls of one tool in a trajectory, all of them answered."""

    calls: int = 0
    errors: dict[str, int] = field(default_factory=dict)
    """Calls that the policy got wrong, by what was wrong."""
    cut: int = 0
    """Results that were cut to fit into an observation."""
    tokens: int = 0
    """Tokens of the observations, with what stands around the results."""
    latency_s: list[float] = field(default_factory=list)

    def add(self, executed: Answered, observation: Observation) -> None:
        """Counts a call."""
        self.calls += 1
        if error := executed.response.error:
            self.errors[error] = self.errors.get(error, 0) + 1
        self.cut += observation.cut
        self.tokens += len(observation.token_ids)
        if executed.latency_s is not None:
            self.latency_s.append(executed.latency_s)


@dataclass
class AgentData:
    """A question, its trajectory so far, and what is counted of it."""

    row: Row
    generate: Generate
    trajectory: Trajectory
    tools: list[Tool]
    max_calls: int = 0
    """Turns that may call, from the first to the last."""
    turns: int = 0
    valid_actions: int = 0
    overruns: list[str] = field(default_factory=list)
    """What a turn's last token brought behind the tag that it completed."""
    counts: dict[str, CallCounts] = field(init=False)
    """By the name of the tool."""
    context: ContextState = field(init=False)
    folds: int = 0
    """How often the context was folded."""
    messages: list[Message] = field(default_factory=list)
    """Those of the prompt, where the loop made it."""
    shown: list[str] = field(default_factory=list)
    """The results of the calls so far, as they were shown."""
    dropped: int = 0
    """Calls that a turn held beyond those that are answered at all."""
    unknown: CallCounts = field(default_factory=CallCounts)
    """Calls of tools that do not exist, or that could not be read at all."""

    def __post_init__(self) -> None:
        self.counts = {tool.name: CallCounts() for tool in self.tools}
        self.context = ContextState(self.trajectory.prompt_ids)

    def count(self, call: ToolCall, executed: Answered, observation: Observation) -> None:
        """Counts a call under its tool."""
        self.counts.get(call.tool, self.unknown).add(executed, observation)

    @property
    def num_calls(self) -> int:
        """Answered calls of all tools."""
        return sum(counts.calls for counts in self.counts.values())

    def facts(self) -> dict[str, Any]:
        """The `info` of the finished trajectory."""
        search = self.counts.get(SEARCH_TOOL, CallCounts())
        facts: dict[str, Any] = {
            "turns": self.turns,
            "valid_actions": self.valid_actions,
            "searches": search.calls - sum(search.errors.values()),
            "cut": search.cut,
            "overruns": self.overruns,
            "latency_s": search.latency_s,
        }
        extra = self.row.get("extra_info") or {}
        facts |= {key: extra[key] for key in GOLD_KEYS if extra.get(key) is not None}
        facts["tools"] = {name: asdict(counts) for name, counts in self.counts.items()}
        if self.trajectory.rewrites:
            facts["folds"] = self.folds
        if unknown := self.unknown.errors | ({DROPPED: self.dropped} if self.dropped else {}):
            facts["unknown_calls"] = unknown
        return facts
