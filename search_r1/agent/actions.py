"""What a turn of the policy asks for."""

import re
from dataclasses import dataclass

SEARCH = re.compile(r"<search>(.*?)</search>", re.DOTALL)
ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


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


def parse_action(text: str, search: re.Pattern[str] = SEARCH) -> tuple[Action, int]:
    """The first complete action of a turn, and where in `text` it ends (len(text) without one).

    Of two that overlap, the one that closes first decides: where it closes, the engine stops. An
    empty query is no search: there is nothing to ask.

    >>> parse_action("<think> hm </think> <search> capital of Peru </search>\\n\\n")
    (Search(query='capital of Peru'), 54)
    """
    found = [match for pattern in (search, ANSWER) if (match := pattern.search(text))]
    if not found:
        return Invalid(), len(text)
    match = min(found, key=re.Match.end)
    content = match.group(1).strip()
    if match.re is ANSWER:
        return Answer(content), match.end()
    return (Search(content) if content else Invalid()), match.end()
