"""Encoding of text and chats, in which text from outside never becomes a control token.

Text from outside is questions and passages. What a chat template writes around messages is always
taken from the template itself; docs/templates.md shows the result for each family of models.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from jinja2 import TemplateError

from verl.utils.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, str]
MARK = re.compile("\x00(\\d+)\x00")
"""A placeholder for a message in a rendered template, with its number between two NULs."""

IMAGE_MARK = "<image>"
"""Where an image stands in the content of a message, as in verl."""
TRIED = "What is shown?"
"""A text to find out how a chat template takes what a message says."""
OWN_ARGUMENTS = frozenset({"messages", "tokenize", "add_generation_prompt"})
"""Arguments of a chat template that are set here and not by callers."""


def encode_text(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """Ids of plain `text`: a special token in it (`<|im_end|>`) is split into ordinary pieces."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def encode_illustrated(
    tokenizer: "PreTrainedTokenizerBase", text: str, mark: str, images: Sequence[Sequence[int]]
) -> list[int]:
    """Ids of plain `text`, with those of an image at each `mark`; without images a mark is text.

    Raises DataError where there are not as many marks as images.
    """
    if not images:
        return encode_text(tokenizer, text)
    first, *others = text.split(mark)
    if len(others) != len(images):
        raise DataError(f"{len(others)} places for images ({mark}), and {len(images)} images")
    ids = encode_text(tokenizer, first)
    for image, part in zip(images, others, strict=True):
        ids += [*image, *encode_text(tokenizer, part)]
    return ids


def encode_chat(
    tokenizer: "PreTrainedTokenizerBase",
    messages: Sequence[Message],
    images: Sequence[Sequence[int]] = (),
    /,
    **kwargs: Any,
) -> list[int]:
    """Ids of `messages` with the generation prompt.

    `kwargs` are further arguments of the chat template, which also decides about BOS. Without a
    template the ids are those of the contents alone, after the `leading_ids` of the tokenizer. Only
    the template can bring in special tokens. `images`: the ids of each image, which take the places
    of `IMAGE_MARK` in the contents. Raises DataError if the template refuses the messages, or if
    there are not as many marks as images.
    """
    if not has_template(tokenizer):
        text = "".join(message["content"] for message in messages)
        return leading_ids(tokenizer) + encode_illustrated(tokenizer, text, IMAGE_MARK, images)
    controls = control_tokens(tokenizer)
    if images or any(token in message["content"] for message in messages for token in controls):
        return _encode_around_controls(tokenizer, messages, controls, kwargs, images)
    return tokenizer(_render(tokenizer, messages, kwargs), add_special_tokens=False)["input_ids"]


def has_template(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether the tokenizer has a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def template_problems(tokenizer: "PreTrainedTokenizerBase", kwargs: Mapping[str, Any]) -> list[str]:
    """Messages about wrong further arguments of the chat template.

    Each is one line and begins with the name of the argument.
    """
    template = tokenizer.get_chat_template() if has_template(tokenizer) else ""
    problems: list[str] = []
    for name in kwargs:
        if name in OWN_ARGUMENTS:
            problems.append(f"{name}: set by this program; remove it")
        elif not re.search(rf"\b{re.escape(name)}\b", template):
            which = (
                "the chat template does not read it"
                if template
                else "no chat template is applied here"
            )
            problems.append(f"{name}: {which}, so it would have no effect; remove it")
    return problems


def leading_ids(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The ids that the tokenizer puts before every text: BOS for Llama and Gemma, none for Qwen."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    start = next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
    return whole[:start]


def control_tokens(tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """The texts of all special tokens, the longest first.

    Special tokens without a role, such as `<|start_header_id|>`, are included.
    """
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return sorted({*added, *tokenizer.all_special_tokens}, key=lambda text: (-len(text), text))


@dataclass(frozen=True)
class UserTurn:
    """What a chat template writes around a user's message that follows an assistant's."""

    before: list[int]
    """What stands between the assistant's and the user's text: the end of the assistant's turn, and
    the beginning of the user's."""
    after: list[int]
    """What stands between the user's text and the assistant's, up to the generation prompt."""

    def following(self, end: int, message: list[int]) -> list[int]:
        """The ids after the token `end`, which was sampled to end a turn, up to the next turn.

        Raises ValueError for a token with which the template does not end a turn.
        """
        return [*self.before[self.before.index(end) + 1 :], *message, *self.after]


def user_turn(tokenizer: "PreTrainedTokenizerBase", **kwargs: Any) -> UserTurn:
    """The UserTurn of a chat template, taken from its rendering of three messages.

    Without a template both parts are empty. Raises DataError for a template that cannot render such
    a conversation.
    """
    if not has_template(tokenizer):
        return UserTurn([], [])
    roles = ("user", "assistant", "user")
    messages = [{"role": role, "content": f"\x00{number}\x00"} for number, role in enumerate(roles)]
    rendered = _render(tokenizer, messages, kwargs)
    if MARK.findall(rendered) != ["0", "1", "2"]:
        raise DataError(
            "the chat template of the tokenizer does not write messages of the roles "
            f"{', '.join(roles)} once each and in this order, but: {rendered!r}"
        )
    *_, before, _, after = MARK.split(rendered)
    ids = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in (before, after)]
    return UserTurn(*ids)


def end_of_turn(tokenizer: "PreTrainedTokenizerBase", **kwargs: Any) -> int:
    """The token that ends an assistant's turn: that of the template, or EOS without a template.

    Raises DataError for a tokenizer that has neither.
    """
    before = user_turn(tokenizer, **kwargs).before
    special = [tokenizer.convert_tokens_to_ids(token) for token in control_tokens(tokenizer)]
    if before and before[0] in special:
        return before[0]
    eos = tokenizer.eos_token_id
    if not isinstance(eos, int):
        raise DataError(
            "the tokenizer has no EOS token, and no chat template that ends a turn with a special "
            "token"
        )
    return eos


def _render(
    tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], kwargs: dict[str, Any]
) -> str:
    """The messages as the template writes them. Raises DataError if it refuses them.

    Templates of models that read images may take the content of a message in parts only.
    """
    takes_parts = _takes_parts(tokenizer)
    try:
        rendered = tokenizer.apply_chat_template(
            [_in_parts(message) if takes_parts else dict(message) for message in messages],
            tokenize=False,
            add_generation_prompt=True,
            **kwargs,
        )
        return cast("str", rendered)
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise DataError(
            f"the chat template of the tokenizer refuses messages of the roles {roles} ({error}); "
            "where it knows no system role, put the instructions at the beginning of the user's "
            "message"
        ) from error


_parts_of_templates: dict[str, bool] = {}


def _takes_parts(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether the template shows what a message says only if its content is a list of parts."""
    template = str(tokenizer.chat_template)
    if template not in _parts_of_templates:
        message = {"role": "user", "content": TRIED}
        shows_text = _shows(tokenizer, message)
        _parts_of_templates[template] = not shows_text and _shows(tokenizer, _in_parts(message))
    return _parts_of_templates[template]


def _shows(tokenizer: "PreTrainedTokenizerBase", message: dict[str, Any]) -> bool:
    """Whether the rendering of a message holds the text that is tried."""
    try:
        return TRIED in str(tokenizer.apply_chat_template([message], tokenize=False))
    except (TemplateError, TypeError, AttributeError, KeyError, ValueError):
        return False


def _in_parts(message: Message) -> dict[str, Any]:
    return {**message, "content": [{"type": "text", "text": message["content"]}]}


def _encode_around_controls(
    tokenizer: "PreTrainedTokenizerBase",
    messages: Sequence[Message],
    controls: Sequence[str],
    kwargs: dict[str, Any],
    images: Sequence[Sequence[int]] = (),
) -> list[int]:
    """Ids of messages whose text contains special tokens, or places for images.

    The template is rendered with placeholders instead of messages, and split at its own special
    tokens. The text between these is encoded as plain text, with the messages put back. White space
    around a message is kept around its placeholder, because a template may strip it.
    """
    cores = [message["content"].strip() for message in messages]
    marked: list[Message] = []
    for number, (message, core) in enumerate(zip(messages, cores, strict=True)):
        content = message["content"]
        mark = content.replace(core, f"\x00{number}\x00") if core else content
        marked.append({**message, "content": mark})
    rendered = _render(tokenizer, marked, kwargs)
    ids: list[int] = []
    waiting = list(images)
    for part in re.split(f"({'|'.join(map(re.escape, controls))})", rendered):
        if part in controls:
            ids.append(cast("int", tokenizer.convert_tokens_to_ids(part)))
        elif part:
            text = MARK.sub(lambda mark: cores[int(mark.group(1))], part)
            number = text.count(IMAGE_MARK) if images else 0
            ids += encode_illustrated(tokenizer, text, IMAGE_MARK, waiting[:number])
            del waiting[:number]
    if waiting:
        raise DataError(f"{len(waiting)} images have no place ({IMAGE_MARK}) in the messages")
    return ids
