"""What a turn of the policy asks for."""

import re
from dataclasses import dataclass

ACTIONS = [re.compile(rf"<({tag})>(.*?)</{tag}>", re.DOTALL) for tag in ("search", "answer")]


@dataclass(frozen=True)
class Search:
    query: str


@dataclass(frozen=True)
class Answer:
    text: str


@dataclass(frozen=True)
class Invalid:
    pass


Action = Search | Answer | Invalid


def parse_action(text: str) -> tuple[Action, int]:
    """The first complete action of a turn, and where in `text` it ends (len(text) without one).

    Of two that overlap, the one that closes first decides: where it closes, the engine stops. An empty query is no
    search: there is nothing to ask.

    >>> parse_action("<think> hm </think> <search> capital of Peru </search>\\n\\n")
    (Search(query='capital of Peru'), 54)
    """
    found = [match for pattern in ACTIONS if (match := pattern.search(text))]
    if not found:
        return Invalid(), len(text)
    match = min(found, key=re.Match.end)
    content = match.group(2).strip()
    if match.group(1) == "answer":
        return Answer(content), match.end()
    return (Search(content) if content else Invalid()), match.end()
