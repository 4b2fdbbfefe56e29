"""What a chat template says of calls: how it writes them, who reads them, which tags they have."""

import re
from typing import Any

from search_r1.agent.config import SearchAgentConfig
from search_r1.agent.observation import tag_pattern
from search_r1.tools.base import Tool
from verl.utils.errors import ConfigError, DataError
from verl.utils.tool_parser import ToolCallParser, find_parser, reads
from verl.utils.tool_turns import ToolTurns, WrittenCall, written_call

BRACKETED = re.compile(r"<\S+>|\[\S+\]")
TAG = re.compile(r"<(/?)(\w+)[^<>]*>")
"""A tag in what a template writes around calls and results."""


def read_template(config: SearchAgentConfig, tokenizer: Any) -> tuple[WrittenCall, ToolTurns]:
    """A call and the results as the chat template writes them. Raises ConfigError."""
    kwargs = config.apply_chat_template_kwargs
    try:
        sample = written_call(tokenizer, kwargs)
        turns = ToolTurns(tokenizer, kwargs)
        turns.turn(1)
    except DataError as error:
        message = f"agent.format={config.format}: {error}; use agent.format=tags"
        raise ConfigError([message]) from error
    return sample, turns


def choose_parser(config: SearchAgentConfig, tokenizer: Any, sample: WrittenCall) -> str:
    """The name of the parser that reads such calls. Raises ConfigError where there is none."""
    name = find_parser(tokenizer, sample) if config.format == "auto" else config.format
    if not reads(ToolCallParser(name, tokenizer, [sample.schema]), sample):
        raise ConfigError(
            [
                f"agent.format={config.format}: this parser does not read calls as the chat "
                f"template of the tokenizer writes them ({sample.text!r}); auto finds one that does"
            ]
        )
    return name


def native_tags(tokenizer: Any, written: str) -> re.Pattern[str]:
    """Matches what no result may hold: tags of what the template has `written`, added tokens.

    Of these only such as stand in brackets: some vocabularies add runs of spaces, too.
    """
    added = [t.content for t in tokenizer.added_tokens_decoder.values() if not t.special]
    tokens = [text for text in added if BRACKETED.fullmatch(text)]
    return tag_pattern(native_tags=sorted(opening_tags(written)), tokens=tokens)


def schema_of(tool: Tool) -> dict[str, Any]:
    """A tool as chat templates and vLLM take it."""
    return {
        "type": "function",
        "function": {
            "name": tool.name,
            "description": tool.description,
            "parameters": tool.parameters,
        },
    }


def opening_tags(text: str) -> tuple[str, ...]:
    """Names of the opening tags in a text, each once, in their order.

    >>> opening_tags("<tool_call><function=look_up></function></tool_call>")
    ('tool_call', 'function')
    """
    return tuple(dict.fromkeys(name for slash, name in TAG.findall(text) if not slash))
