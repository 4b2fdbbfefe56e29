"""What a turn of the policy asks for."""

import re
from dataclasses import dataclass

ACTION = re.compile(r"<(search|answer)>(.*?)</\1>", re.DOTALL)


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

    An empty query is no search: there is nothing to ask.

    >>> parse_action("<think> hm </think> <search> capital of Peru </search>\\n\\n")
    (Search(query='capital of Peru'), 54)
    """
    match = ACTION.search(text)
    if match is None:
        return Invalid(), len(text)
    content = match.group(2).strip()
    if match.group(1) == "answer":
        return Answer(content), match.end()
    return (Search(content) if content else Invalid()), match.end()
