"""Writes the turns of a trace as the policy of an agent would have said them."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from search_r1.agent.actions import TextCall
from search_r1.agent.dialects import read_call
from search_r1.agent.loop import SearchAgentLoop
from search_r1.agent.native import NativeDialect
from search_r1.tools.base import SEARCH_TOOL, Arguments, Tool, ToolResponse
from search_r1.traces.text import THINK, THINK_CLOSED
from search_r1.traces.trace import Reason, Rejected, Said, TracedCall, TracedTurn
from verl.utils.errors import DataError
from verl.utils.tokenizer import control_tokens, end_of_turn
from verl.utils.tool_turns import USER, call_message, end_token, render

OPENED = re.compile(r"<think>\s*\Z")
"""The end of a prompt that opens the policy's thought."""


@dataclass(frozen=True)
class ScriptedTurns:
    """What the policy says, and what its calls bring."""

    turns: tuple[str, ...]
    responses: tuple[tuple[str, ToolResponse], ...]
    """For each call, in their order, the name of the tool and its response."""


def scripted_turns(
    said: Said, agent: SearchAgentLoop, names: Mapping[str, str], prompt_ids: Sequence[int]
) -> ScriptedTurns:
    """The turns of a trace in the format of the agent, and the responses to its calls.

    `names`: for names of tools in traces those of the agent, where they differ. Raises Rejected.
    """
    check_no_control_tokens(said, agent)
    opened = OPENED.search(str(agent.tokenizer.decode(list(prompt_ids)))) is not None
    tools = {tool.name: tool for tool in agent.tools}
    native = agent.dialect if isinstance(agent.dialect, NativeDialect) else None
    writes_several = native is not None and native.max_answered > 1
    turns = said.turns if writes_several else single_calls(said.turns)
    called = [[(find_tool(call, tools, names), call) for call in turn.calls] for turn in turns]
    answer = f"<answer>{said.answer}</answer>{end_of_answer(agent)}"
    if native is None:
        texts = [
            turn_in_tags(turn.said, *first) for turn, (first,) in zip(turns, called, strict=True)
        ]
        texts.append(said.last + answer)
        # all of them stand in the one turn that the prompt has opened
        texts[:1] = [unopened(texts[0])] if opened else texts[:1]
    else:
        texts = [
            native_turn(native, turn.said, calls) for turn, calls in zip(turns, called, strict=True)
        ]
        texts.append((unopened(said.last) if opened else said.last) + answer)
    responses = [(tool.name, response_of(tool, call)) for calls in called for tool, call in calls]
    return ScriptedTurns(tuple(texts), tuple(responses))


def check_no_control_tokens(said: Said, agent: SearchAgentLoop) -> None:
    """Raises Rejected where the policy would say a control token in the middle of its words."""
    arguments = [call.argument for turn in said.turns for call in turn.calls]
    texts = [*(turn.said for turn in said.turns), said.last, said.answer]
    texts += [a if isinstance(a, str) else json.dumps(a, ensure_ascii=False) for a in arguments]
    for token in control_tokens(agent.tokenizer):
        place = next((text for text in texts if token in text), None)
        if place is not None:
            around = place[max(0, place.index(token) - 30) :][:80]
            raise Rejected(Reason.CONTROL_TOKENS, f"{token} in {around!r}")


def single_calls(turns: Sequence[TracedTurn]) -> list[TracedTurn]:
    """The turns divided into turns of one call, for a format that has no others."""
    return [
        TracedTurn(turn.said if number == 0 else "", (call,))
        for turn in turns
        for number, call in enumerate(turn.calls)
    ]


def find_tool(call: TracedCall, tools: Mapping[str, Tool], names: Mapping[str, str]) -> Tool:
    """The agent's tool that a call means. Raises Rejected where there is none."""
    name = names.get(call.tool, call.tool)
    if name not in tools:
        known = ", ".join(tools) or "none"
        raise Rejected(
            Reason.UNKNOWN_TOOL,
            f"{name} is none of the agent's tools ({known}); finetune.trace_tools can name one of "
            "them for it",
        )
    return tools[name]


def arguments_of(tool: Tool, call: TracedCall) -> Arguments:
    """The arguments of a call by the tool's own names for them. Raises Rejected.

    Where both the tool and the call have a single one, its name in the trace does not matter.
    """
    if isinstance(call.argument, str):
        read = read_call(TextCall(tool.name, call.argument.strip()), tool)
        if read.malformed is not None:
            raise Rejected(Reason.MISREAD, f"{tool.name}: {read.malformed.text}")
        return read.arguments
    names = list(tool.parameters.get("properties", {}))
    if len(names) == len(call.argument) == 1:
        return dict(zip(names, call.argument.values(), strict=True))
    return call.argument


def response_of(tool: Tool, call: TracedCall) -> ToolResponse:
    """The response of a tool, with the facts that rewards read of a search."""
    arguments = arguments_of(tool, call)
    is_search = tool.name == SEARCH_TOOL
    facts = {"query": arguments.get(tool.argument_key, "")} if is_search else {}
    return ToolResponse(call.result, facts=facts)


def turn_in_tags(said: str, tool: Tool, call: TracedCall) -> str:
    """A turn that calls in tags; what stands between these in the trace stays as it is."""
    argument = call.argument
    if not isinstance(argument, str):
        arguments = arguments_of(tool, call)
        only = arguments.get(tool.argument_key) if len(arguments) == 1 else None
        written = only if isinstance(only, str) else json.dumps(arguments, ensure_ascii=False)
        argument = f" {written} "
    gap = "" if not said or said[-1].isspace() else " "
    return f"{said}{gap}<{tool.tags.call_tag}>{argument}</{tool.tags.call_tag}>"


def native_turn(
    dialect: NativeDialect, said: str, called: Sequence[tuple[Tool, TracedCall]]
) -> str:
    """A turn that calls as the chat template writes calls, behind its generation prompt.

    Raises Rejected where the template does not write it there.
    """
    tokenizer, schemas, kwargs = dialect.tokenizer, dialect.schemas, dialect.kwargs
    calls = [(tool.name, arguments_of(tool, call)) for tool, call in called]
    try:
        asked = render(tokenizer, [USER], schemas, kwargs, generation_prompt=True)
        whole = render(tokenizer, [USER, call_message(said.strip(), calls)], schemas, kwargs)
    except DataError as error:
        raise Rejected(Reason.MISREAD, str(error)) from error
    if not whole.startswith(asked):
        raise Rejected(
            Reason.MISREAD,
            f"the chat template does not write this turn behind its prompt: {said!r:.80}",
        )
    end = end_token(tokenizer, kwargs)
    return whole[len(asked) :].rpartition(end)[0] + end


def unopened(said: str) -> str:
    """What is said behind a prompt that has opened a thought.

    What does not begin with a thought of its own ends the one of the prompt first.
    """
    words = said.lstrip()
    if words.startswith(THINK):
        return words.removeprefix(THINK).removeprefix("\n")
    return f"\n{THINK_CLOSED}\n\n{said}"


def end_of_answer(agent: SearchAgentLoop) -> str:
    """What the policy says behind its answer: nothing where the engine stops it there."""
    if agent.config.stop_at_answer:
        return ""
    kwargs = agent.config.apply_chat_template_kwargs
    return str(agent.tokenizer.convert_ids_to_tokens(end_of_turn(agent.tokenizer, **kwargs)))
