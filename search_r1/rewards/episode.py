"""What a reward may read: the policy's own text, and separately what its searches found."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING

from search_r1.rewards.matching import gold_answers, last_answer
from search_r1.trajectory import (
    NO_TOOLS,
    GoldPassages,
    Search,
    gold_passages,
    question_of,
    searches_by_turn,
)
from verl.agent import Row, Segment, Source, Trajectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

THINK_START = "<think>"
OPENING_TOKENS = 16
"""Number of tokens that holds a `<think>` and the white space after it in every vocabulary."""


@dataclass(frozen=True)
class ToolUse:
    """What a trajectory made of a tool."""

    calls: int = 0
    """Its answered calls, those included that the policy got wrong."""
    errors: int = 0
    """Calls that the policy got wrong."""
    tokens: int = 0
    """Tokens of the observations, with what stands around the results."""


@dataclass(frozen=True)
class Episode:
    """A finished trajectory and what its question asks for."""

    question: str
    golds: list[str]
    turns: list[str]
    """The policy's text, one entry for each turn. A `<think>` with which the chat template opened
    the turn is included, because the thought is well-formed only with it; nothing else that the
    environment wrote is."""
    searches_by_turn: list[list[Search]]
    """The executed searches that each turn asked for. There is an entry for each of the
    trajectory's turns, the asides included, which ask for nothing."""
    searches_before: list[Search] = field(default_factory=list)
    """Those that the agent made by itself before the first turn."""
    gold: GoldPassages | None = None
    """The passages with the evidence; None where the data do not say."""
    own_tokens: int = 0
    """Tokens that the policy wrote."""
    call_tags: tuple[str, ...] = ("search",)
    """Names of the tags in which tools are called."""
    result_tags: tuple[str, ...] = ("information",)
    """Names of the tags around their results."""
    tools: Mapping[str, ToolUse] = field(default_factory=dict)
    """The tools that were called, by name."""

    @property
    def all_searches(self) -> list[Search]:
        """The executed searches, in their order."""
        return [*self.searches_before, *chain.from_iterable(self.searches_by_turn)]

    @property
    def queries(self) -> list[str]:
        """The queries of the executed searches, in their order."""
        return [search.query for search in self.all_searches]

    @property
    def passages(self) -> list[list[str]]:
        """The passages that each of these searches found, as title and text."""
        return [search.texts for search in self.all_searches]

    def use_of(self, tool: str) -> ToolUse:
        """What was made of a tool; nothing where it was not called."""
        return self.tools.get(tool, ToolUse())

    @property
    def answer(self) -> str | None:
        """The last complete `<answer>` that stands within one turn, None without one."""
        return last_answer(self.turns)

    @property
    def searches(self) -> int:
        return len(self.queries)


def read_episode(trajectory: Trajectory, row: Row, tokenizer: "PreTrainedTokenizerBase") -> Episode:
    """The episode of a trajectory. Special tokens are left out of its texts."""
    facts = row.get("extra_info") or {}
    before, by_turn = searches_by_turn(trajectory)
    says_gold = any(facts.get(key) is not None for key in ("gold_ids", "gold_titles"))
    tags = trajectory.info.get("tags", {"call": ["search"], "result": ["information"]})
    return Episode(
        question=question_of(row),
        golds=gold_answers(row["reward_model"]["ground_truth"]),
        turns=read_turns(trajectory, tokenizer),
        searches_by_turn=by_turn,
        searches_before=before,
        gold=gold_passages(facts) if says_gold else None,
        own_tokens=trajectory.num_tokens(Source.MODEL),
        call_tags=tuple(tags["call"]),
        result_tags=tuple(tags["result"]),
        tools=read_tools(trajectory.segments),
    )


def read_tools(segments: Iterable[Segment]) -> dict[str, ToolUse]:
    """What was made of each tool, by the `kind` of the observations."""
    uses: dict[str, ToolUse] = {}
    for segment in segments:
        kind = segment.info.get("kind")
        if segment.source is not Source.OBSERVATION or kind in (None, *NO_TOOLS):
            continue
        use = uses.get(kind, ToolUse())
        uses[kind] = ToolUse(
            use.calls + 1,
            use.errors + bool(segment.info.get("error")),
            use.tokens + len(segment.token_ids),
        )
    return uses


def read_turns(trajectory: Trajectory, tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """The policy's text, one entry for each turn.

    If the text before a turn ends with `<think>`, the turn begins with it: some chat templates open
    the thought (Qwen3.5, Qwen3-Thinking, QwQ, the distilled R1 models).
    """
    turns: list[str] = []
    before = trajectory.prompt_ids
    contexts = {rewrite.at: rewrite.prompt_ids for rewrite in trajectory.rewrites}
    for number, segment in enumerate(trajectory.segments):
        before = contexts.get(number, before)
        if segment.is_aside:
            continue
        if segment.source is Source.MODEL:
            opened = ends_with_think(before, tokenizer)
            said = str(tokenizer.decode(segment.token_ids, skip_special_tokens=True))
            turns.append(f"{THINK_START}{said}" if opened else said)
            before = []
        else:
            before = segment.token_ids or before
    return turns


def ends_with_think(token_ids: list[int], tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether the text of `token_ids` ends with `<think>`."""
    return str(tokenizer.decode(token_ids[-OPENING_TOKENS:])).rstrip().endswith(THINK_START)
