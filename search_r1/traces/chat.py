"""Reads traces that are messages, as OpenAI's chat completions have them."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from search_r1.tools.base import Arguments
from search_r1.traces.text import CallTags, read_end, read_text, whole_thoughts
from search_r1.traces.trace import Reason, Rejected, Said, TracedCall, TracedTurn

ChatMessage = Mapping[str, Any]
USER, ASSISTANT, TOOL = "user", "assistant", "tool"
SETTING = ("system", "developer")
"""Roles whose messages are left out: the agent's own prompt takes their place."""


def read_messages(messages: Sequence[ChatMessage], tags: CallTags) -> Said:
    """What was said in messages, of which the first of a user is the question. Raises Rejected.

    Without a call of a tool they are read as one text with tags.
    """
    spoken = [message for message in messages if message.get("role") not in SETTING][1:]
    if not any(message.get("tool_calls") for message in spoken):
        return read_text("".join(said_in(message) for message in spoken), tags)
    parts: list[str] = []
    calls: list[tuple[TracedCall, ...]] = []
    place = 0
    while place < len(spoken) and spoken[place].get("tool_calls"):
        results = following_results(spoken, place + 1)
        parts.append(said_in(spoken[place]))
        calls.append(read_calls(spoken[place]["tool_calls"], results))
        place += 1 + len(results)
    last, answer, _ = read_end(last_words(spoken[place:]))
    *before, last = whole_thoughts([*parts, last], in_one_text=False)
    turns = [TracedTurn(said, called) for said, called in zip(before, calls, strict=True)]
    return Said(tuple(turns), last, answer)


def question_in(messages: Sequence[ChatMessage]) -> str:
    """The text of the first message that sets nothing; empty where a user has not written it."""
    first = next((m for m in messages if m.get("role") not in SETTING), {})
    return text_in(first.get("content")) if first.get("role") == USER else ""


def following_results(messages: Sequence[ChatMessage], place: int) -> list[ChatMessage]:
    """The messages of tools that stand from `place` on."""
    results: list[ChatMessage] = []
    for message in messages[place:]:
        if message.get("role") != TOOL:
            break
        results.append(message)
    return results


def last_words(messages: Sequence[ChatMessage]) -> str:
    """What the last message says, which is to hold the answer. Raises Rejected."""
    if not messages:
        raise Rejected(Reason.NO_ANSWER, "the last message is a call or its result")
    first, *others = messages
    if first.get("role") == TOOL:
        raise Rejected(Reason.NO_CALL, "a message of a tool follows no call")
    if others or first.get("role") != ASSISTANT:
        roles = ", ".join(str(message.get("role")) for message in messages)
        raise Rejected(
            Reason.NO_ACTION,
            f"expected one last message of an assistant behind the calls, got: {roles}",
        )
    return said_in(first)


def read_calls(
    calls: Sequence[Mapping[str, Any]], results: Sequence[ChatMessage]
) -> tuple[TracedCall, ...]:
    """The calls of a message with their results, told by their ids or else by their order.

    Ids that several calls share tell nothing. Raises Rejected.
    """
    by_id = {result.get("tool_call_id"): result for result in results}
    ids = {call.get("id") for call in calls}
    are_told = len(ids) == len(calls) and ids <= by_id.keys() and all(ids)
    own = [by_id[call["id"]] for call in calls] if are_told else list(results)
    if len(own) < len(calls):
        raise Rejected(Reason.NO_RESULT, f"{len(calls)} calls with {len(results)} results")
    if len(results) > len(calls):
        raise Rejected(Reason.NO_CALL, f"{len(calls)} calls with {len(results)} results")
    return tuple(
        TracedCall(*name_and_arguments(call), text_in(result.get("content")).strip())
        for call, result in zip(calls, own, strict=True)
    )


def name_and_arguments(call: Mapping[str, Any]) -> tuple[str, Arguments]:
    """The name and the arguments of a call. Raises Rejected where they cannot be read."""
    function = call.get("function") or call
    arguments = function.get("arguments")
    try:
        read = json.loads(arguments) if isinstance(arguments, str) else arguments
    except ValueError as error:
        raise Rejected(
            Reason.UNKNOWN_FORM, f"tool_calls: arguments are no JSON: {error}"
        ) from error
    if not isinstance(function.get("name"), str) or not isinstance(read, dict):
        raise Rejected(
            Reason.UNKNOWN_FORM, f"tool_calls: expected a name and arguments, got {function!r:.80}"
        )
    # a table has all columns that any call has, empty ones too
    return function["name"], {key: value for key, value in read.items() if value is not None}


def said_in(message: ChatMessage) -> str:
    """The text of a message, behind its thought where that stands apart. Raises Rejected."""
    thought = message.get("reasoning_content") or message.get("reasoning") or ""
    content = text_in(message.get("content"))
    if not isinstance(thought, str):
        raise Rejected(Reason.UNKNOWN_FORM, f"reasoning: expected a text, got {thought!r:.80}")
    return f"<think>\n{thought.strip()}\n</think>\n\n{content}" if thought else content


def text_in(content: object) -> str:
    """The text of a message's content, which may be a list of parts. Raises Rejected."""
    if isinstance(content, list):
        return "".join(text_in(part.get("text")) for part in content if isinstance(part, dict))
    if content is not None and not isinstance(content, str):
        raise Rejected(Reason.UNKNOWN_FORM, f"content: expected a text, got {content!r:.80}")
    return content or ""
