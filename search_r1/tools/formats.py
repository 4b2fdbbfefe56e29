"""How the calls of a tool are written in tags, and what stands around its results."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class ToolFormat:
    """The text of a call and of its result.

    The final answer is `<answer>..</answer>` beside every format, so that one scorer reads them
    all.
    """

    call: re.Pattern[str]
    """Matches a call; its first group is the argument."""
    stop: str
    """Where the engine stops, so that the environment can answer."""
    head: str
    """Stands before a result."""
    tail: str
    """Stands after a result."""
    call_tag: str = ""
    """Name of the tag around a call, where calls are written in tags."""
    result_tag: str = ""
    """Name of the tag around a result, where results are written in tags."""

    @property
    def margin(self) -> str:
        """The white space that `head` begins with."""
        return self.head[: len(self.head) - len(self.head.lstrip())]


def tagged(call_tag: str, result_tag: str) -> ToolFormat:
    """The format of a tool that is called in tags and answers in tags, as Search-R1 searches.

    >>> tagged("calculate", "result").head
    '\\n\\n<result>'
    """
    return ToolFormat(
        call=re.compile(rf"<{re.escape(call_tag)}>(.*?)</{re.escape(call_tag)}>", re.DOTALL),
        stop=f"</{call_tag}>",
        head=f"\n\n<{result_tag}>",
        tail=f"</{result_tag}>\n\n",
        call_tag=call_tag,
        result_tag=result_tag,
    )


SEARCH_R1 = tagged("search", "information")
SEARCH_O1 = ToolFormat(
    re.compile(r"<\|begin_search_query\|>(.*?)<\|end_search_query\|>", re.DOTALL),
    "<|end_search_query|>",
    "\n\n<|begin_search_result|>",
    "<|end_search_result|>\n\n",
)
REACT = ToolFormat(
    re.compile(r"Action:[ \t]*Search\[(.*?)\]"), "\nObservation:", "\nObservation: ", "\n"
)
