"""What a chat template writes around tool calls and their results, read off the template itself."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, cast

from jinja2 import TemplateError

from verl.utils.errors import DataError
from verl.utils.tokenizer import end_of_turn, has_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ChatMessage = Mapping[str, Any]
"""A message with `role` and `content`; an assistant's may have `tool_calls`."""
ToolSchema = Mapping[str, Any]
"""A tool as chat templates take it: `{"type": "function", "function": {"name": ..}}`."""
QUESTION = "QUESTION0MARK"
SAID = "SAID0MARK"
RESULT = re.compile(r"RESULT\d+MARK")
ESCAPED = 'ESCAPED"MARK'
SAMPLE_NAME = "look_up"
SAMPLE_VALUE = "Ada Marin"
SAMPLE_ARGUMENTS = {"name": SAMPLE_VALUE}
SAMPLE_SCHEMA: ToolSchema = {
    "type": "function",
    "function": {
        "name": SAMPLE_NAME,
        "description": "Looks a name up.",
        "parameters": {
            "type": "object",
            "properties": {"name": {"type": "string", "description": "The name."}},
            "required": ["name"],
        },
    },
}
USER: ChatMessage = {"role": "user", "content": QUESTION}


def render(
    tokenizer: "PreTrainedTokenizerBase",
    messages: Sequence[ChatMessage],
    schemas: Sequence[ToolSchema],
    kwargs: Mapping[str, Any],
    *,
    generation_prompt: bool = False,
) -> str:
    """The conversation as the chat template writes it.

    Raises DataError where the template refuses it, or where there is none.
    """
    if not has_template(tokenizer):
        raise DataError("the tokenizer has no chat template, which native tool calls need")
    try:
        rendered = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tools=[dict(schema) for schema in schemas],
            tokenize=False,
            add_generation_prompt=generation_prompt,
            **kwargs,
        )
    except (TemplateError, TypeError, KeyError, AttributeError) as error:
        raise DataError(
            f"the chat template of the tokenizer cannot write a conversation with tools ({error!r})"
        ) from error
    return cast("str", rendered)


def call_message(content: str, calls: Sequence[tuple[str, Mapping[str, Any]]]) -> ChatMessage:
    """An assistant's message with calls, (name, arguments) each.

    Their ids have nine letters and digits, because Mistral's templates ask for that.
    """
    written = [
        {
            "id": f"call{number:05}",
            "type": "function",
            "function": {"name": name, "arguments": dict(arguments)},
        }
        for number, (name, arguments) in enumerate(calls)
    ]
    return {"role": "assistant", "content": content, "tool_calls": written}


def result_message(number: int, name: str, content: str) -> ChatMessage:
    """The message with the result of the call `number` of a turn."""
    return {"role": "tool", "name": name, "tool_call_id": f"call{number:05}", "content": content}


@dataclass(frozen=True)
class WrittenCall:
    """A call as a chat template writes it, without the token that ends the turn."""

    text: str
    name: str
    arguments: Mapping[str, Any]
    schema: ToolSchema
    """The tool that is called."""


def written_call(tokenizer: "PreTrainedTokenizerBase", kwargs: Mapping[str, Any]) -> WrittenCall:
    """A sample call as the template writes it. Raises DataError where it does not write calls."""
    plain = render(tokenizer, [USER, {"role": "assistant", "content": SAID}], [], kwargs)
    header = plain.partition(SAID)[0].rpartition(QUESTION)[2].rstrip()
    calls = call_message("", [(SAMPLE_NAME, SAMPLE_ARGUMENTS)])
    whole = render(tokenizer, [USER, calls], [SAMPLE_SCHEMA], kwargs)
    answer = whole.rpartition(QUESTION)[2]
    if SAMPLE_NAME not in answer:
        raise DataError("the chat template of the tokenizer writes no tool calls")
    text = answer.removeprefix(header).partition(end_token(tokenizer, kwargs))[0]
    return WrittenCall(text, SAMPLE_NAME, SAMPLE_ARGUMENTS, SAMPLE_SCHEMA)


def end_token(tokenizer: "PreTrainedTokenizerBase", kwargs: Mapping[str, Any]) -> str:
    """The text of the token by which the template ends an assistant's turn."""
    return cast("str", tokenizer.convert_ids_to_tokens(end_of_turn(tokenizer, **kwargs)))


@dataclass(frozen=True)
class ResultPiece:
    """What a chat template writes around one result of several, as far as it can be told apart."""

    before: list[int]
    """Tokens that stand before it whatever the result says. Those of the first result begin with
    the token that ends the assistant's turn."""
    opening: str
    """Text that is encoded together with the result, because a token may join them."""
    closing: str
    """The same behind the result."""
    after: list[int]
    """Tokens that follow whatever the result says; those of the last end with the generation
    prompt."""


@dataclass(frozen=True)
class ResultTurn:
    """What a chat template writes around the results of a turn's calls."""

    pieces: tuple[ResultPiece, ...]
    """One for each call."""
    escape: bool
    """Whether results stand in JSON strings, as in Mistral's templates."""

    def content(self, text: str) -> str:
        """A result as it stands in the conversation."""
        return json.dumps(text, ensure_ascii=False)[1:-1] if self.escape else text

    def text(self, content: str) -> str:
        """The result of which `content` stands in the conversation; the reverse of `content`.

        What was cut within an escape is returned as it stands.
        """
        if not self.escape:
            return content
        try:
            return json.loads(f'"{content}"')
        except ValueError:
            return content


class ToolTurns:
    """The result turns of a tokenizer's chat template, by the number of results."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", kwargs: Mapping[str, Any]) -> None:
        self.tokenizer = tokenizer
        self.kwargs = dict(kwargs)
        self.end = end_token(tokenizer, kwargs)
        added = [token.content for token in tokenizer.added_tokens_decoder.values()]
        longest_first = sorted(added, key=len, reverse=True)
        self.fixed = re.compile("|".join(map(re.escape, longest_first)))
        self.turn = cache(self._turn)

    def _turn(self, num_results: int) -> ResultTurn:
        """What stands around `num_results` results.

        Raises DataError for a template that does not write each result once, in their order.
        """
        marks = [f"RESULT{number}MARK" for number in range(num_results)]
        conversation = self._conversation(marks)
        if RESULT.findall(conversation) != marks:
            raise DataError(
                "the chat template of the tokenizer does not write each result of a tool once and "
                f"in their order, but: {conversation!r}"
            )
        first, *texts = RESULT.split(conversation)
        place = first.rfind(self.end)
        before = first[place:]
        around = "".join([before, *texts])
        if place < first.rfind(SAMPLE_VALUE) or SAMPLE_NAME in around or SAMPLE_VALUE in around:
            raise DataError(
                "what the chat template of the tokenizer writes around results depends on the call "
                f"(between {self.end!r} and the next turn): {conversation!r}"
            )
        pieces: list[ResultPiece] = []
        for number, text in enumerate(texts, 1):
            fixed_before, opening = self._split_behind_last(before)
            closing, rest = self._split_before_first(text)
            after = self._ids(rest) if number == num_results else []
            pieces.append(ResultPiece(self._ids(fixed_before), opening, closing, after))
            before = rest
        escape = ESCAPED not in self._conversation([ESCAPED])
        return ResultTurn(tuple(pieces), escape)

    def _conversation(self, results: Sequence[str]) -> str:
        """What the template writes behind the question: calls, their results, the next prompt."""
        calls = call_message("", [(SAMPLE_NAME, SAMPLE_ARGUMENTS) for _ in results])
        answers = [result_message(i, SAMPLE_NAME, text) for i, text in enumerate(results)]
        rendered = render(
            self.tokenizer,
            [USER, calls, *answers],
            [SAMPLE_SCHEMA],
            self.kwargs,
            generation_prompt=True,
        )
        return rendered.rpartition(QUESTION)[2]

    def _split_behind_last(self, text: str) -> tuple[str, str]:
        """The text up to and with its last added token, and the rest."""
        ends = [match.end() for match in self.fixed.finditer(text)]
        place = ends[-1] if ends else 0
        return text[:place], text[place:]

    def _split_before_first(self, text: str) -> tuple[str, str]:
        """The text before its first added token, and the rest."""
        match = self.fixed.search(text)
        place = match.start() if match else len(text)
        return text[:place], text[place:]

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
