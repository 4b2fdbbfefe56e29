"""What a turn of the policy asks for."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

SEARCH = re.compile(r"<search>(.*?)</search>", re.DOTALL)
ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
SEARCH_TOOL = "search"
"""Name of the tool that searches."""


@dataclass(frozen=True)
class ToolCall:
    """A call of the tool that has this name."""

    tool: str
    argument: str


@dataclass(frozen=True)
class Answer:
    """The final answer."""

    text: str


@dataclass(frozen=True)
class Invalid:
    """Neither a call nor an answer."""


Action = ToolCall | Answer | Invalid
CallPatterns = Mapping[str, re.Pattern[str]]
"""How each tool is called, by its name; the first group of a pattern is the argument."""
SEARCH_ALONE: CallPatterns = {SEARCH_TOOL: SEARCH}


def parse_action(text: str, call_patterns: CallPatterns = SEARCH_ALONE) -> tuple[Action, int]:
    """The first complete action of a turn, and where in `text` it ends (len(text) without one).

    Of two that overlap, the one that closes first decides: where it closes, the engine stops. A
    call with an empty argument is no call: there is nothing to ask.

    >>> parse_action("<think> hm </think> <search> capital of Peru </search>\\n\\n")
    (ToolCall(tool='search', argument='capital of Peru'), 54)
    """
    found = [
        (match, tool)
        for tool, pattern in [*call_patterns.items(), (None, ANSWER)]
        if (match := pattern.search(text))
    ]
    if not found:
        return Invalid(), len(text)
    match, tool = min(found, key=lambda pair: pair[0].end())
    content = match.group(1).strip()
    if tool is None:
        return Answer(content), match.end()
    return (ToolCall(tool, content) if content else Invalid()), match.end()
