"""Reads native tool calls with the parsers of vLLM, one for each way in which models write them."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from verl.utils.errors import ConfigError
from verl.utils.tool_turns import ToolSchema, WrittenCall

log = logging.getLogger(__name__)
COMMON = ("hermes", "qwen3_xml", "llama3_json", "mistral", "pythonic")
"""Tried first, because most templates write one of these."""


@dataclass(frozen=True)
class NativeCall:
    """A call that a model wrote."""

    name: str
    arguments: str
    """JSON text; it may be malformed."""


class ToolCallParser:
    """One of vLLM's tool parsers, `name`, for the tools of `schemas`.

    Raises ConfigError where vLLM has no parser of that name, or where the parser needs a token that
    the tokenizer does not have.
    """

    def __init__(self, name: str, tokenizer: Any, schemas: Sequence[ToolSchema]) -> None:
        # Importing vLLM takes seconds, and only native formats need it here.
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
        from vllm.tokenizers.hf import get_cached_tokenizer
        from vllm.tool_parsers import ToolParserManager

        # A call that cannot be read is counted here; vLLM would log its stack for each.
        logging.getLogger("vllm.tool_parsers").setLevel(logging.CRITICAL)
        self.name = name
        # vLLM's own annotations contradict each other here
        self.tokenizer: Any = get_cached_tokenizer(tokenizer)
        self.request = ChatCompletionRequest.model_validate(
            {"messages": [], "model": "policy", "tools": [dict(schema) for schema in schemas]}
        )
        try:
            self.parser_class = ToolParserManager.get_tool_parser(name)
            self.tools: Any = self.request.tools
            self.parser_class(self.tokenizer, self.tools)
        except (KeyError, RuntimeError, ValueError) as error:
            message = f"agent.format={name}: no tool parser of vLLM reads this: {error}"
            raise ConfigError([message]) from error

    def parse(self, text: str) -> list[NativeCall]:
        """The calls in what a model wrote, none where there are none or they cannot be read."""
        # A new one for each text: parsers keep state between the texts of one stream.
        parser = self.parser_class(self.tokenizer, self.tools)
        try:
            found = parser.extract_tool_calls(text, self.request)
        except Exception as error:  # whatever a parser of vLLM raises on a text that it cannot read
            log.debug("%s cannot read %r: %s", self.name, text, error)
            return []
        return [
            NativeCall(call.function.name, call.function.arguments) for call in found.tool_calls
        ]


def parser_names() -> list[str]:
    """The names of vLLM's tool parsers, the common ones first."""
    from vllm.tool_parsers import ToolParserManager

    known = ToolParserManager.list_registered()
    return [*COMMON, *sorted(set(known) - set(COMMON))]


def reads(parser: ToolCallParser, written: WrittenCall) -> bool:
    """Whether the parser reads back a call that the chat template wrote."""
    calls = parser.parse(written.text)
    if [call.name for call in calls] != [written.name]:
        return False
    try:
        return json.loads(calls[0].arguments) == written.arguments
    except ValueError:
        return False


def find_parser(tokenizer: Any, written: WrittenCall) -> str:
    """Name of the first parser that reads back a call as the chat template writes it.

    Raises ConfigError where none does.
    """
    for name in parser_names():
        try:
            parser = ToolCallParser(name, tokenizer, [written.schema])
        except ConfigError:  # it needs a token that this tokenizer does not have
            continue
        if reads(parser, written):
            return name
    raise ConfigError(
        [
            "agent.format=auto: no tool parser of vLLM reads the calls that the chat template of "
            f"the tokenizer writes ({written.text!r}); use agent.format=tags"
        ]
    )
