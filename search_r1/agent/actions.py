"""What a turn of the policy asks for."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from textwrap import dedent
from typing import Any

from search_r1.tools.base import SEARCH_TOOL, Arguments, ToolResponse
from search_r1.tools.formats import SEARCH_R1
from verl.agent import Completion

ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


@dataclass(frozen=True)
class TextCall:
    """A call as the text of a turn has it: the tool's name and what stands between the tags."""

    tool: str
    argument: str


@dataclass(frozen=True)
class Answer:
    """The final answer."""

    text: str


@dataclass(frozen=True)
class Invalid:
    """Neither a call nor an answer."""


Action = TextCall | Answer | Invalid
CallPatterns = Mapping[str, re.Pattern[str]]
"""How each tool is called, by its name; the first group of a pattern is the argument."""
SEARCH_ALONE: CallPatterns = {SEARCH_TOOL: SEARCH_R1.call}


@dataclass(frozen=True)
class ToolCall:
    """A call that the environment answers."""

    tool: str
    """Name of the tool, as the policy wrote it."""
    arguments: Arguments
    malformed: ToolResponse | None = None
    """The answer to a call that cannot be executed."""


@dataclass(frozen=True)
class Turn:
    """What a turn asks for: calls, or an answer, or neither, which is invalid."""

    calls: tuple[ToolCall, ...] = ()
    answer: str | None = None
    asks_in_vain: bool = False
    """Whether it asks for a search where there is no tool: that is not answered, but not void."""
    num_dropped: int = 0
    """Calls beyond those that can be answered."""
    overrun: str = ""
    """What the policy wrote behind its action."""

    @property
    def is_void(self) -> bool:
        """Whether the turn neither calls nor answers."""
        return not (self.calls or self.asks_in_vain) and self.answer is None


def parse_action(text: str, call_patterns: CallPatterns = SEARCH_ALONE) -> tuple[Action, int]:
    """The first complete action of a turn, and where in `text` it ends (len(text) without one).

    Of two that overlap, the one that closes first decides: where it closes, the engine stops. A
    call with an empty argument is no call: there is nothing to ask.

    >>> parse_action("<think> hm </think> <search> capital of Peru </search>\\n\\n")
    (TextCall(tool='search', argument='capital of Peru'), 54)
    """
    found = [
        (match, tool)
        for tool, pattern in [*call_patterns.items(), (None, ANSWER)]
        if (match := pattern.search(text))
    ]
    if not found:
        return Invalid(), len(text)
    match, tool = min(found, key=lambda pair: pair[0].end())
    # a program keeps the indentation of its lines to each other
    content = dedent(match.group(1).strip("\n")).strip()
    if tool is None:
        return Answer(content), match.end()
    return (TextCall(tool, content) if content else Invalid()), match.end()


def whole_characters(value: Any) -> Any:
    """A JSON value with `?` for each half of a surrogate pair, which no tokenizer can encode."""
    text = json.dumps(value, ensure_ascii=False)
    return json.loads(text.encode("utf-8", "replace").decode("utf-8"))


def stop_reason(completion: Completion, turn: Turn, may_call: bool) -> str:
    """Why a trajectory ends with this turn; empty where it goes on."""
    if not completion.token_ids:
        return "empty"
    if turn.answer is not None:
        return "answer"
    return "" if may_call else "max_turns"
