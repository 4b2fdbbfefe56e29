"""How a method writes its searches, and how what they bring stands in its context."""

import re
from dataclasses import dataclass

from search_r1.agent.actions import SEARCH
from search_r1.prompts import (
    INVALID_ACTION,
    INVALID_MESSAGE,
    OBSERVATION_HEAD,
    OBSERVATION_TAIL,
    SEARCH_END,
)


@dataclass(frozen=True)
class Dialect:
    """The final answer is `<answer>..</answer>` in all of them, so that one scorer reads them
    all."""

    search: re.Pattern[str]
    """Its first group is the query."""
    stop: str
    """Where the engine stops for the environment to answer."""
    head: str
    tail: str
    """What stands around the passages."""
    invalid: str = INVALID_ACTION
    """The answer to a turn without an action, in the policy's own turn."""
    invalid_message: str = INVALID_MESSAGE
    """The same as a user's message: the answer where the policy has ended its turn."""


SEARCH_R1 = Dialect(SEARCH, SEARCH_END, OBSERVATION_HEAD, OBSERVATION_TAIL)
SEARCH_O1 = Dialect(
    re.compile(r"<\|begin_search_query\|>(.*?)<\|end_search_query\|>", re.DOTALL),
    "<|end_search_query|>",
    "\n\n<|begin_search_result|>",
    "<|end_search_result|>\n\n",
    "\nI should search with <|begin_search_query|> query <|end_search_query|>, or give the answer "
    "inside <answer> and "
    "</answer>.\n",
    "Search with <|begin_search_query|> query <|end_search_query|>, or give the answer inside "
    "<answer> and </answer>.",
)
REACT = Dialect(
    re.compile(r"Action:[ \t]*Search\[(.*?)\]"),
    "\nObservation:",
    "\nObservation: ",
    "\n",
    "\nObservation: no valid action. Write Action: Search[query], or the answer inside <answer> "
    "and </answer>.\n",
    "Observation: no valid action. Write Action: Search[query], or the answer inside <answer> and "
    "</answer>.",
)
