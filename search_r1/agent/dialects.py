"""How a policy and its environment speak: what a call looks like, and what a result looks like.

`TagDialect` is Search-R1's own: a call stands in tags in the middle of the policy's turn, which the
engine stops there, and the result follows within the same turn.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol

from search_r1.agent.actions import (
    Answer,
    TextCall,
    ToolCall,
    Turn,
    parse_action,
    whole_characters,
)
from search_r1.agent.config import SearchAgentConfig
from search_r1.agent.observation import (
    TAGS,
    encode_illustrated,
    encode_observation,
    neutralise,
    tag_pattern,
)
from search_r1.prompts import ANSWER_END, CALLS, FOLD_ACTION, SEARCHES, remaining
from search_r1.tools.base import SEARCH_TOOL, Tool, ToolResponse
from search_r1.tools.formats import SEARCH_R1, ToolFormat
from verl.agent import Image, Trajectory
from verl.utils.images import ImageReader
from verl.utils.tokenizer import Message, encode_chat, encode_text, user_turn


@dataclass(frozen=True)
class Observation:
    """What the environment says, as tokens."""

    token_ids: list[int]
    cut: bool = False
    """Whether the result was cut to fit."""
    shown: str = ""
    """The text of the result, as far as it is shown."""
    images: list[Image] = field(default_factory=list)
    """Those whose tokens are among the tokens."""


class Dialect(Protocol):
    """What the agent loop asks of a dialect."""

    shows_tools: ClassVar[bool] = False
    """Whether prompts show the tools, so that those of the data are made anew."""
    call_tags: tuple[str, ...]
    """Names of the tags in which tools are called."""
    result_tags: tuple[str, ...]
    """Names of the tags around their results."""
    unit: tuple[str, str]
    """What the policy is told to have left, for one and for many."""
    image_reader: ImageReader | None = None
    """Reads the images of results; None: results are shown without them."""

    def preflight(self) -> list[str]:
        """What keeps the dialect from working with this tokenizer and these tools."""
        ...

    def stop(self, may_call: bool) -> list[str]:
        """Strings at which the engine ends a turn."""
        ...

    def instructions(self) -> str:
        """How to call the tools: stands before a prompt made from `template`; may be empty."""
        ...

    def ask(self, messages: Sequence[Message]) -> list[int]:
        """Ids of the prompt that a conversation makes."""
        ...

    def parse(self, token_ids: Sequence[int]) -> Turn:
        """What a turn of the policy asks for."""
        ...

    def results(
        self, turn: Turn, responses: Sequence[ToolResponse], ended_by: int | None, note: str = ""
    ) -> list[Observation]:
        """The results of a turn's calls, one observation each.

        `ended_by` is the token by which the policy ended its turn, None where it did not. `note`
        stands behind the last result and is never cut. Raises DataError for an image that cannot be
        read.
        """
        ...

    def correction(self, ended_by: int | None, note: str = "") -> list[int]:
        """What a policy is told whose turn was invalid."""
        ...

    def summary_request(self) -> list[int]:
        """What a policy is told that is to sum up its context."""
        ...

    def folded(self, prompt_ids: list[int], messages: Sequence[Message], summary: str) -> list[int]:
        """The context that a folded trajectory goes on from.

        `messages` are those of the prompt, where the loop made it.
        """
        ...

    def departure(
        self, trajectory: Trajectory, messages: Sequence[Message], shown: Sequence[str]
    ) -> str | None:
        """Where a chat template would have written the trajectory otherwise.

        None where the trajectory is not meant to be what a template writes.
        """
        return None


@dataclass(frozen=True)
class TagWords:
    """The words of a method that speaks in tags."""

    search_format: ToolFormat
    invalid_action: str
    """The answer to a turn without an action, in the policy's own turn."""
    invalid_message: str
    """The same as a user's message: the answer where the policy has ended its turn."""


class TagDialect(Dialect):
    """Calls in tags, each tool in its own, within the policy's turn."""

    def __init__(
        self, config: SearchAgentConfig, tokenizer: Any, tools: Sequence[Tool], words: TagWords
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.tools = {tool.name: tool for tool in tools}
        # Without a tool, a turn that asks for a search all the same is no void turn.
        self.call_patterns = {tool.name: tool.tags.call for tool in tools} or {
            SEARCH_TOOL: words.search_format.call
        }
        formats = [tool.tags for tool in tools]
        self.call_tags = unique(SEARCH_R1.call_tag, *(f.call_tag for f in formats))
        self.result_tags = unique(SEARCH_R1.result_tag, *(f.result_tag for f in formats))
        self.tag = tag_pattern(formats)
        self.words = words
        self.unit = SEARCHES if set(self.tools) <= {SEARCH_TOOL} else CALLS
        self.fold_ids = encode_text(tokenizer, FOLD_ACTION)
        self.user_turn = user_turn(tokenizer, **config.apply_chat_template_kwargs)

    def preflight(self) -> list[str]:
        """Tools that are called in the same way, and results for which there is no room."""
        stops = Counter(tool.tags.stop for tool in self.tools.values())
        problems = [
            f"agent.tools: expected tools that are called differently, but {stop} ends calls of two"
            for stop, times in stops.items()
            if times > 1
        ]
        for tool in self.tools.values():
            if tool.name != SEARCH_TOOL and tool.tags.call_tag in TAGS:
                problems.append(
                    f"agent.tools: <{tool.tags.call_tag}>, by which {tool.name} is called, has "
                    "another meaning; rename the tool, or use agent.format=auto"
                )
            problems += self._block_problems(tool)
        return problems

    def _block_problems(self, tool: Tool) -> list[str]:
        """Whether the tags around a result leave no room for the result itself."""
        limit = self.config.max_obs_length
        note = remaining(self.config.max_turns, self.unit) if self.config.show_remaining else ""
        block = tool.tags.head + noted(tool.tags, note).tail
        tags = len(encode_text(self.tokenizer, block))
        if limit >= 2 * tags:
            return []
        result = "a passage" if tool.name == SEARCH_TOOL else f"a result of {tool.name}"
        return [
            f"data.max_obs_length={limit} has no room for {result}: {block.strip()} takes {tags}"
        ]

    def stop(self, may_call: bool) -> list[str]:
        """Where a call ends, where tools may be called at all, and where an answer ends."""
        calls = [tool.tags.stop for tool in self.tools.values()] if may_call else []
        return [*calls, ANSWER_END] if self.config.stop_at_answer else calls

    def instructions(self) -> str:
        """What stands before a prompt made from `template`; may be empty."""
        return " ".join(text for tool in self.tools.values() if (text := tool.tag_instruction))

    def ask(self, messages: Sequence[Message]) -> list[int]:
        """Ids of the conversation as the chat template writes it."""
        return encode_chat(self.tokenizer, messages, **self.config.apply_chat_template_kwargs)

    def parse(self, token_ids: Sequence[int]) -> Turn:
        """The first complete action of the turn's text; special tokens are no text."""
        text = self.tokenizer.decode(token_ids, skip_special_tokens=True)
        action, end = parse_action(text, self.call_patterns)
        overrun = text[end:]
        if isinstance(action, Answer):
            return Turn(answer=action.text, overrun=overrun)
        if isinstance(action, TextCall) and action.tool in self.tools:
            return Turn((read_call(action, self.tools[action.tool]),), overrun=overrun)
        return Turn(asks_in_vain=isinstance(action, TextCall), overrun=overrun)

    def results(
        self, turn: Turn, responses: Sequence[ToolResponse], ended_by: int | None, note: str = ""
    ) -> list[Observation]:
        """The block of the one call, in the policy's turn or else as a user's message."""
        (call,) = turn.calls
        (response,) = responses
        tags = noted(self.tools[call.tool].tags, note)
        limit = self.config.max_obs_length
        emitted = tags.margin if ended_by is not None else turn.overrun
        text = neutralise(response.text, self.tag)
        if self.image_reader is None or not response.images:
            ids, cut = encode_observation(text, self.tokenizer, limit, emitted, tags)
            return [Observation(self._placed(ids, ended_by), cut)]
        images = [self.image_reader.read_text(encoded) for encoded in response.images]
        ids, cut, shown = encode_illustrated(text, images, self.tokenizer, limit, emitted, tags)
        return [Observation(self._placed(ids, ended_by), cut, images=shown)]

    def correction(self, ended_by: int | None, note: str = "") -> list[int]:
        """The sentence for a turn without an action."""
        if ended_by is None:
            said = self.words.invalid_action + (f"{note}\n" if note else "")
        else:
            said = f"{self.words.invalid_message}\n{note}" if note else self.words.invalid_message
        return self._placed(encode_text(self.tokenizer, said), ended_by)

    def summary_request(self) -> list[int]:
        """The sentence that asks for a summary, in the policy's turn."""
        return self.fold_ids

    def folded(self, prompt_ids: list[int], messages: Sequence[Message], summary: str) -> list[int]:
        """The prompt, then the summary as the first that the policy says."""
        said = f"<summary> {neutralise(summary, self.tag)} </summary>\n"
        return [*prompt_ids, *encode_text(self.tokenizer, said)]

    def _placed(self, ids: list[int], ended_by: int | None) -> list[int]:
        """Ids in the policy's turn or, where the policy has ended that, as a user's message."""
        return ids if ended_by is None else self.user_turn.following(ended_by, ids)


def noted(written: ToolFormat, note: str) -> ToolFormat:
    """The format with a note behind its blocks, before the white space that follows them.

    Outside of the block no passage can pass for it.
    """
    if not note:
        return written
    margin = written.tail[len(written.tail.rstrip()) :]
    return replace(written, tail=f"{written.tail}{note}{margin}")


def read_call(call: TextCall, tool: Tool) -> ToolCall:
    """A call in tags with its arguments by name.

    A tool of one argument gets the text. One of several takes a JSON object too.
    """
    properties = tool.parameters.get("properties", {})
    of_text = properties.get(tool.argument_key, {}).get("type") == "string"
    is_object = len(properties) > 1 and call.argument.startswith("{")
    if of_text and not is_object:
        return ToolCall(call.tool, {tool.argument_key: call.argument})
    try:
        value = json.loads(call.argument)
    except (ValueError, RecursionError) as error:
        malformed = ToolResponse(f"The arguments are no JSON: {error}.", error="json")
        return ToolCall(call.tool, {tool.argument_key: call.argument}, malformed)
    arguments = value if isinstance(value, dict) else {tool.argument_key: value}
    return ToolCall(call.tool, whole_characters(arguments))


def unique(*names: str) -> tuple[str, ...]:
    """The names that are not empty, each once, in their order."""
    return tuple(dict.fromkeys(name for name in names if name))
