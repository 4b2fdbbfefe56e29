"""Reads traces that are one text with tags, as several programs write them.

Search-R1, ReSearch   <think> .. </think> <search> q </search> <information> .. </information>
R1-Searcher           <think> .. <|begin_of_query|> q <|end_of_query|> <|begin_of_documents|> ..
all                   <answer> a </answer>, or \\boxed{a} in it or in the place of it
"""

import re
from collections.abc import Iterable, Mapping, Sequence

from search_r1.prompts import INVALID_ACTION
from search_r1.tools.base import SEARCH_TOOL, Tool
from search_r1.traces.trace import Reason, Rejected, Said, TracedCall, TracedTurn

CallTags = Mapping[str, tuple[str, str]]
"""By the tag that opens a call: the tag that closes it, and the tool that is called."""
SEARCHES: CallTags = {
    "<search>": ("</search>", SEARCH_TOOL),
    "<|begin_of_query|>": ("<|end_of_query|>", SEARCH_TOOL),
    "<|begin_search_query|>": ("<|end_search_query|>", SEARCH_TOOL),
}
RESULTS = {
    "<information>": "</information>",
    "<result>": "</result>",
    "<|begin_of_documents|>": "<|end_of_documents|>",
    "<|begin_search_result|>": "<|end_search_result|>",
}
ANSWER, ANSWER_CLOSED = "<answer>", "</answer>"
THINK, THINK_CLOSED = "<think>", "</think>"
THOUGHT = re.compile("</?think>")
BOXED = re.compile(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}")
"""A boxed answer, which may hold commands such as `\\text{..}`."""
TEX_TEXT = re.compile(r"\\text(?:bf|it|rm)?\{([^{}]*)\}")
CORRECTION = INVALID_ACTION.strip().partition(".")[0]
"""By this Search-R1 answers a turn without an action."""


def call_tags(tools: Iterable[Tool]) -> CallTags:
    """The tags of calls that are understood: those of searches, and those of the agent's tools."""
    names = {tool.tags.call_tag: tool.name for tool in tools if tool.tags.call_tag}
    return {**SEARCHES, **{f"<{tag}>": (f"</{tag}>", name) for tag, name in names.items()}}


def read_text(text: str, tags: CallTags) -> Said:
    """What was said in a text with tags. Raises Rejected."""
    closings = [closing for closing, _ in tags.values()]
    known = [*tags, *RESULTS, *closings, *RESULTS.values(), ANSWER, ANSWER_CLOSED]
    pattern = re.compile("|".join(map(re.escape, known)))
    parts: list[str] = []
    calls: list[TracedCall] = []
    rest = text
    while (tag := pattern.search(rest)) is not None and tag.group() != ANSWER:
        parts.append(rest[: tag.start()])
        call, rest = read_call(tag.group(), rest[tag.end() :], tags)
        calls.append(call)
    last, answer, after = read_end(rest)
    if any(opening in after for opening in tags):
        raise Rejected(Reason.GOES_ON, f"a call stands behind <answer>{answer}</answer>")
    if any(CORRECTION in part for part in [*parts, last]):
        raise Rejected(Reason.NO_ACTION, f"the environment answered: {CORRECTION}")
    *before, last = whole_thoughts([*parts, last])
    turns = [TracedTurn(said, (call,)) for said, call in zip(before, calls, strict=True)]
    return Said(tuple(turns), last, answer)


def read_call(opening: str, rest: str, tags: CallTags) -> tuple[TracedCall, str]:
    """The call that the tag `opening` begins, and what follows its result. Raises Rejected."""
    if opening in RESULTS:
        raise Rejected(Reason.NO_CALL, f"no call stands before {opening}")
    if opening not in tags:
        raise Rejected(Reason.UNBALANCED, f"nothing opens what {opening} closes")
    closing, tool = tags[opening]
    argument, closed, behind = rest.partition(closing)
    if not closed or any(other in argument for other in (*tags, *RESULTS, ANSWER)):
        raise Rejected(Reason.UNBALANCED, f"{opening} is not closed by {closing}")
    behind = behind.lstrip()
    result_tag = next((tag for tag in RESULTS if behind.startswith(tag)), None)
    if result_tag is None:
        expected = ", ".join(RESULTS)
        raise Rejected(Reason.NO_RESULT, f"{closing} is followed by none of {expected}")
    result, closed, after = behind.removeprefix(result_tag).partition(RESULTS[result_tag])
    if not closed:
        raise Rejected(Reason.UNBALANCED, f"{result_tag} is not closed by {RESULTS[result_tag]}")
    # the two line breaks behind a result are the environment's, like the result
    return TracedCall(tool, argument, result.strip()), re.sub(r"\A\n{1,2}", "", after)


def read_end(text: str) -> tuple[str, str, str]:
    """The last words before the answer, the answer, and what follows it. Raises Rejected."""
    said, opened, rest = text.partition(ANSWER)
    if opened:
        answer, closed, after = rest.partition(ANSWER_CLOSED)
        if not closed:
            raise Rejected(Reason.UNBALANCED, f"{ANSWER} is not closed by {ANSWER_CLOSED}")
        boxed = BOXED.findall(answer)
        answer = f" {unboxed(boxed[-1])} " if boxed else answer
    else:
        boxed = BOXED.findall(text)
        if not boxed:
            raise Rejected(Reason.NO_ANSWER, "expected <answer> or \\boxed{} in the last turn")
        said = BOXED.sub(lambda box: unboxed(box.group(1)), text).rstrip() + "\n"
        answer, after = f" {unboxed(boxed[-1])} ", ""
    if not answer.strip():
        raise Rejected(Reason.NO_ANSWER, "the answer is empty")
    return said, answer, after


def unboxed(text: str) -> str:
    r"""The content of a box without the commands that set it as text.

    >>> unboxed(r"\text{Ada Marin}")
    'Ada Marin'
    """
    return TEX_TEXT.sub(r"\1", text).strip()


def whole_thoughts(parts: Sequence[str], in_one_text: bool = True) -> list[str]:
    """The parts that were said, in which every thought is opened and closed.

    A thought that goes on behind a call is closed before the call, and opened again after it where
    the parts stand in one text. A first one that nothing opens was opened by the prompt; where
    the parts are messages of their own, that holds for each of them. Raises Rejected.
    """
    whole: list[str] = []
    goes_on = False
    for number, part in enumerate(parts):
        marks = THOUGHT.findall(part)
        opened_by_prompt = marks[:1] == [THINK_CLOSED] and (number == 0 or not in_one_text)
        if goes_on or opened_by_prompt:
            part = f"{THINK}{part}"
            marks = [THINK, *marks]
        alternating = [(THINK, THINK_CLOSED)[place % 2] for place in range(len(marks))]
        is_open = len(marks) % 2 == 1
        if marks != alternating or (is_open and number == len(parts) - 1):
            raise Rejected(Reason.UNBALANCED, f"{THINK} and {THINK_CLOSED} do not alternate")
        whole.append(f"{part.rstrip()} {THINK_CLOSED} " if is_open else part)
        goes_on = is_open and in_one_text
    return whole
