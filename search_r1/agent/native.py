"""Native tool calls: as the chat template of the model writes them.

The tools' schemas stand in the prompt, calls are read by a parser of vLLM, results come back in the
template's own tool role. A turn may hold several calls. The final answer stays in
`<answer>..</answer>`, so that one scorer reads all formats.
"""

import json
import re
from collections.abc import Sequence
from typing import Any, ClassVar

from search_r1.agent.actions import ANSWER, ToolCall, Turn, whole_characters
from search_r1.agent.config import SearchAgentConfig
from search_r1.agent.dialects import Dialect, Observation
from search_r1.agent.native_template import (
    choose_parser,
    native_tags,
    opening_tags,
    read_template,
    schema_of,
)
from search_r1.agent.observation import neutralise
from search_r1.prompts import (
    ANSWER_END,
    CALLING_TURNS,
    FOLD_MESSAGE,
    FOLDED,
    NATIVE_INVALID_MESSAGE,
    remaining,
)
from search_r1.tools.base import Tool, ToolResponse
from verl.agent import Source, Trajectory
from verl.utils.errors import ConfigError, DataError
from verl.utils.tokenizer import Message, encode_chat, encode_text, user_turn
from verl.utils.tool_parser import NativeCall, ToolCallParser
from verl.utils.tool_turns import (
    ChatMessage,
    ResultPiece,
    ResultTurn,
    call_message,
    render,
    result_message,
)

OPENED = re.compile(r"<think>\s*$")
"""A thought that the chat template opens for the policy."""
UNREADABLE = ToolResponse("The call could not be read.", error="unreadable")


class NativeDialect(Dialect):
    """Calls and results as the tokenizer's chat template writes them.

    Raises ConfigError where the template and the parser do not fit together.
    """

    shows_tools: ClassVar[bool] = True

    def __init__(self, config: SearchAgentConfig, tokenizer: Any, tools: Sequence[Tool]) -> None:
        if not tools:
            message = f"agent.format={config.format}: there is no tool to call; use tags"
            raise ConfigError([message])
        self.config = config
        self.tokenizer = tokenizer
        self.tools = {tool.name: tool for tool in tools}
        self.schemas = [schema_of(tool) for tool in tools]
        self.kwargs = config.apply_chat_template_kwargs
        sample, self.turns = read_template(config, tokenizer)
        name = choose_parser(config, tokenizer, sample)
        self.parser = ToolCallParser(name, tokenizer, self.schemas)
        # the last of these is told that it is one too many
        self.max_answered = config.max_parallel_calls + 1 if self._writes_several() else 1
        piece = self.turns.turn(1).pieces[0]
        around = tokenizer.decode(piece.before) + piece.opening + piece.closing
        self.call_tags = opening_tags(sample.text)[:1]
        self.result_tags = opening_tags(around)[-1:]
        self.tag = native_tags(tokenizer, sample.text + around)
        self.user_turn = user_turn(tokenizer, **self.kwargs)
        opened = OPENED.search(tokenizer.decode(self.user_turn.after))
        self.opened = opened.group() if opened else ""
        self.unit = CALLING_TURNS
        self.fold_ids = encode_text(tokenizer, FOLD_MESSAGE)

    def _writes_several(self) -> bool:
        """Whether the chat template can write several calls in a turn."""
        try:
            self.turns.turn(2)
        except DataError:
            return False
        return True

    def preflight(self) -> list[str]:
        """Schemas that the template does not show, and results for which there is no room."""
        problems = []
        user = {"role": "user", "content": "x"}
        shown = render(self.tokenizer, [user], self.schemas, self.kwargs)
        hidden = [name for name in self.tools if name not in shown]
        if hidden:
            problems.append(
                f"agent.format={self.config.format}: the chat template does not show the tools "
                f"{', '.join(hidden)}, so the policy cannot know them; use agent.format=tags"
            )
        shortest = len(self.ask([user]))
        if shortest > self.config.max_start_length:
            problems.append(
                f"data.max_start_length={self.config.max_start_length} has no room for the tools: "
                f"their schemas in the chat template take {shortest} tokens"
            )
        (piece,) = self.turns.turn(1).pieces
        tags = num_around(piece, self.tokenizer)
        if self.config.show_remaining:
            tags += len(self._note_ids(remaining(self.config.max_turns, self.unit)))
        if self.config.max_obs_length < 2 * tags:
            problems.append(
                f"data.max_obs_length={self.config.max_obs_length} has no room for a result: what "
                f"the chat template writes around it takes {tags}"
            )
        return problems

    def stop(self, may_call: bool) -> list[str]:
        """Where an answer ends; the policy ends a turn with calls by itself."""
        return [ANSWER_END] if self.config.stop_at_answer else []

    def instructions(self) -> str:
        """Nothing: the chat template shows the tools."""
        return ""

    def ask(self, messages: Sequence[Message]) -> list[int]:
        """Ids of the conversation, with the tools' schemas, as the chat template writes them."""
        kwargs = self.kwargs | ({"tools": self.schemas} if self.schemas else {})
        return encode_chat(self.tokenizer, messages, **kwargs)

    def parse(self, token_ids: Sequence[int]) -> Turn:
        """The calls of a turn, or its answer, whichever comes first.

        What is written within a thought is no call. Where calls have no tag to be found by (Llama's
        JSON), an answer comes first.
        """
        text = self.tokenizer.decode(self._without_end(token_ids), skip_special_tokens=False)
        said = self._outside_thoughts(text)
        place = text.rfind("</think>") + len("</think>") if "</think>" in text else 0
        answer = ANSWER.search(text)
        begins = self._begins(said)
        if answer and (begins is None or answer.end() <= place + begins):
            return Turn(answer=answer.group(1).strip(), overrun=text[answer.end() :])
        calls = self.parser.parse(said) if said else []
        if calls:
            answered = calls[: self.max_answered]
            num_dropped = len(calls) - len(answered)
            return Turn(tuple(map(read_call, answered)), num_dropped=num_dropped)
        if begins is not None:
            return Turn((ToolCall("", {}, UNREADABLE),))
        return Turn()

    def _outside_thoughts(self, text: str) -> str:
        """What follows the last thought; empty where one has not ended."""
        _, closed, said = text.rpartition("</think>")
        if not closed and self.opened:
            return ""
        return said.partition("<think>")[0]

    def _begins(self, said: str) -> int | None:
        """Where the first call begins, if the format marks that by a tag."""
        places = [said.find(f"<{tag}") for tag in self.call_tags]
        return min((place for place in places if place >= 0), default=None)

    def _without_end(self, token_ids: Sequence[int]) -> Sequence[int]:
        """A turn without the token by which it ends."""
        last = token_ids[-1] if token_ids else None
        if last is None:
            return token_ids
        ends = last == self.tokenizer.eos_token_id or last in self.user_turn.before[:1]
        return token_ids[:-1] if ends else token_ids

    def results(
        self, turn: Turn, responses: Sequence[ToolResponse], ended_by: int | None, note: str = ""
    ) -> list[Observation]:
        """The results as messages of the tool role; the last one ends with the next prompt.

        Together they take at most `max_obs_length` tokens, of which each gets an equal share; what
        a short one leaves goes to the others.
        """
        result_turn = self.turns.turn(len(responses))
        pieces = list(result_turn.pieces)
        before = pieces[0].before
        if ended_by is not None:
            before = before[before.index(ended_by) + 1 :]
        notes = ["" for _ in pieces[1:]] + [f"\n{note}" if note else ""]
        texts = [neutralise(response.text, self.tag) for response in responses]
        encoded = [
            self._encoded(piece, result_turn.content(text + said))
            for piece, text, said in zip(pieces, texts, notes, strict=True)
        ]
        shares = self._shares(pieces, encoded, len(self._note_ids(note)))
        observations = []
        for number, (piece, ids, share) in enumerate(zip(pieces, encoded, shares, strict=True)):
            cut = len(ids) > share
            shown = texts[number] + notes[number]
            if cut:
                ids, shown = self._cut_to(share, result_turn, piece, ids, notes[number])
            opening = before if number == 0 else piece.before
            observations.append(Observation([*opening, *ids, *piece.after], cut, shown))
        return observations

    def _cut_to(
        self, share: int, turn: ResultTurn, piece: ResultPiece, ids: list[int], note: str
    ) -> tuple[list[int], str]:
        """Cuts an encoded result to `share` tokens, its note and closing kept: ids and text."""
        end = turn.content(note) + piece.closing
        closing = encode_text(self.tokenizer, end) if end else []
        kept = ids[: max(0, share - len(closing))]
        text = turn.text(self.tokenizer.decode(kept).removeprefix(piece.opening))
        return kept + closing, text + note

    def _encoded(self, piece: ResultPiece, content: str) -> list[int]:
        """A result with what a token may join to it."""
        return encode_text(self.tokenizer, piece.opening + content + piece.closing)

    def _shares(
        self, pieces: Sequence[ResultPiece], encoded: Sequence[list[int]], note: int
    ) -> list[int]:
        """Tokens that each result may take, the last one with a note of so many tokens."""
        fixed = sum(len(piece.before) + len(piece.after) for piece in pieces)
        lengths = [len(ids) for ids in encoded]
        lengths[-1] -= note
        shares = fair_shares(lengths, max(0, self.config.max_obs_length - fixed - note))
        shares[-1] += note
        return shares

    def _note_ids(self, note: str) -> list[int]:
        """A note as it stands behind a result."""
        if not note:
            return []
        return encode_text(self.tokenizer, self.turns.turn(1).content(f"\n{note}"))

    def correction(self, ended_by: int | None, note: str = "") -> list[int]:
        """A user's message for a turn that neither called nor answered."""
        return self._as_user(encode_text(self.tokenizer, invalid_message(note)), ended_by)

    def summary_request(self) -> list[int]:
        """A user's message that asks for a summary, behind the turn that has just been opened."""
        return self._as_user(self.fold_ids, ended_by=None)

    def folded(self, prompt_ids: list[int], messages: Sequence[Message], summary: str) -> list[int]:
        """The conversation of the prompt, with the summary in its last message."""
        *earlier, last = messages
        content = FOLDED.format(content=last["content"], summary=neutralise(summary, self.tag))
        return self.ask([*earlier, {**last, "content": content}])

    def _as_user(self, ids: list[int], ended_by: int | None) -> list[int]:
        """Ids as a user's message, behind the policy's turn, which they end if need be."""
        if ended_by is not None:
            return self.user_turn.following(ended_by, ids)
        return [*self.user_turn.before, *ids, *self.user_turn.after]

    def departure(
        self, trajectory: Trajectory, messages: Sequence[Message], shown: Sequence[str]
    ) -> str | None:
        """Where the chat template would have written another token first.

        The conversation is rendered whole and compared with the tokens of the trajectory: `prompt`,
        `model`, `observation`, `refused` where the template cannot write it, or empty where all
        tokens are the same; None where the loop has written contexts anew. `messages` are those of
        the prompt, `shown` the results.
        """
        if trajectory.rewrites:
            return None
        conversation: list[ChatMessage] = list(messages)
        results = iter(shown)
        number = 0
        for segment in trajectory.segments:
            if segment.source is Source.MODEL:
                conversation.append(self._said(segment.token_ids))
                number = 0
            elif segment.info["kind"] == "invalid_action":
                said = invalid_message(segment.info.get("note", ""))
                conversation.append({"role": "user", "content": said})
            else:
                result = result_message(number, segment.info["kind"], next(results))
                conversation.append(result)
                number += 1
        try:
            rendered = self.ask(conversation)
        except DataError:
            return "refused"
        return place_of_difference(trajectory, rendered)

    def _said(self, token_ids: Sequence[int]) -> ChatMessage:
        """A turn of the policy as a message."""
        text = self.tokenizer.decode(self._without_end(token_ids), skip_special_tokens=False)
        calls = list(map(read_call, self.parser.parse(self._outside_thoughts(text))))
        if not calls or calls[0].malformed:
            return {"role": "assistant", "content": self.opened + text}
        said = text.rpartition("</think>")[2]
        begins = len(text) - len(said) + (self._begins(said) or 0)
        content = (self.opened + text[:begins]).strip()
        return call_message(content, [(call.tool, call.arguments) for call in calls])


def invalid_message(note: str) -> str:
    """What a policy is told that neither called nor answered."""
    return f"{NATIVE_INVALID_MESSAGE}\n{note}" if note else NATIVE_INVALID_MESSAGE


def place_of_difference(trajectory: Trajectory, rendered: Sequence[int]) -> str:
    """The part of a trajectory in which the first token differs; empty where none does."""
    own = trajectory.token_ids
    pairs = zip(own, rendered, strict=False)
    shared = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(own), len(rendered)))
    if shared == len(own):
        return ""
    end = len(trajectory.prompt_ids)
    if shared < end:
        return "prompt"
    for segment in trajectory.segments:
        end += len(segment.token_ids)
        if shared < end:
            return str(segment.source)
    raise AssertionError("a difference lies within the trajectory")


def read_call(call: NativeCall) -> ToolCall:
    """A call with its arguments; malformed where these are no JSON object."""
    name = whole_characters(call.name)
    try:
        arguments = json.loads(call.arguments)
    except (ValueError, RecursionError) as error:
        return ToolCall(name, {}, ToolResponse(f"No JSON: {error}.", error="json"))
    if not isinstance(arguments, dict):
        return ToolCall(name, {}, ToolResponse("The arguments are no JSON object.", error="json"))
    return ToolCall(name, whole_characters(arguments))


def num_around(piece: ResultPiece, tokenizer: Any) -> int:
    """Tokens that stand around a result."""
    text = piece.opening + piece.closing
    return len(piece.before) + len(encode_text(tokenizer, text)) + len(piece.after)


def fair_shares(lengths: Sequence[int], total: int) -> list[int]:
    """How much of `total` each of several gets, of which none takes more than its length.

    >>> fair_shares([10, 300, 400], 500)
    [10, 245, 245]
    """
    shares = [0] * len(lengths)
    left = total
    by_length = sorted(range(len(lengths)), key=lambda index: lengths[index])
    for position, index in enumerate(by_length):
        shares[index] = min(lengths[index], left // (len(lengths) - position))
        left -= shares[index]
    return shares
