"""A trajectory of another program or model, free of the format in which it was written."""

from dataclasses import dataclass
from enum import StrEnum

from search_r1.tools.base import Arguments


class Reason(StrEnum):
    """Why a trace cannot be trained on; the words are those of the summary."""

    UNKNOWN_FORM = "in no known form"
    NO_QUESTION = "without a question"
    NO_ANSWER = "without an answer"
    UNBALANCED = "with unbalanced tags"
    NO_RESULT = "with a call without an observation"
    NO_CALL = "with an observation without a call"
    NO_ACTION = "with a turn without an action"
    GOES_ON = "that go on after their answer"
    UNKNOWN_TOOL = "that call a tool which the agent lacks"
    TOO_MANY_CALLS = "with more calls than the agent may make"
    TOO_LONG = "too long"
    CONTROL_TOKENS = "with control tokens"
    REWRITTEN = "whose context was written anew"
    MISREAD = "that the agent would read otherwise"
    LOW_SCORE = "with a score below finetune.min_score"


class Rejected(ValueError):
    """A trace cannot be trained on: why, and what was found and expected."""

    def __init__(self, reason: Reason, found: str) -> None:
        super().__init__(found)
        self.reason = reason


@dataclass(frozen=True)
class TracedCall:
    """A call and its result."""

    tool: str
    """Name of the tool, as the trace has it."""
    argument: Arguments | str
    """The arguments by name, or the text between the tags of the call."""
    result: str
    """What the tool brought, without what stands around it."""


@dataclass(frozen=True)
class TracedTurn:
    """What the model said, and the calls that it made then."""

    said: str
    calls: tuple[TracedCall, ...]


@dataclass(frozen=True)
class Said:
    """Everything that the model said, and what its calls brought."""

    turns: tuple[TracedTurn, ...]
    """The turns that called."""
    last: str
    """What it said in the end, before the answer."""
    answer: str
    """The answer as it stands between its tags."""


@dataclass(frozen=True)
class Trace:
    """A question and what was said to it."""

    question: str
    said: Said
    golds: tuple[str, ...] = ()
    """The accepted answers; empty where they are unknown."""
    score: float | None = None
    """The reward, where the trace has one."""
