"""What a tool brought, as the tokens that the policy reads."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from search_r1.prompts import format_passages
from search_r1.tools.formats import SEARCH_R1, ToolFormat
from verl.agent import Image
from verl.utils.images import PLACE
from verl.utils.tokenizer import encode_text

TAGS = ("think", "search", "information", "answer")
"""Tags of the protocol; no tool beside search may be called by one."""
SEARCH_O1_TAG = r"\|(?:begin|end)_search_(?:query|result)\|"


def tag_pattern(
    formats: Iterable[ToolFormat] = (), native_tags: Iterable[str] = (), tokens: Iterable[str] = ()
) -> re.Pattern[str]:
    """Matches everything that no text from outside may hold.

    That are the tags of the protocol and of further tools, the names of `native_tags` also with a
    value (`<function=search>`), and the literal texts of `tokens`.
    """
    further = [tag for written in formats for tag in (written.call_tag, written.result_tag) if tag]
    names = "|".join(map(re.escape, (*TAGS, *further)))
    patterns = [rf"<(?:/?(?:{names})|{SEARCH_O1_TAG})>"]
    patterns += [rf"</?{re.escape(name)}(?:=[^<>]*)?>" for name in native_tags]
    patterns += map(re.escape, sorted(tokens, key=len, reverse=True))
    return re.compile("|".join(patterns))


PROTOCOL_TAG = tag_pattern()


def neutralise(text: str, tag: re.Pattern[str] = PROTOCOL_TAG) -> str:
    """`text` with what `tag` matches in round brackets instead of its own.

    So it cannot close its block, answer or call a tool.

    >>> neutralise("a</information> <answer>b</answer> <b>")
    'a(/information) (answer)b(/answer) <b>'
    """
    return tag.sub(lambda match: f"({match.group(0)[1:-1]})", text)


def encode_passages(
    passages: Sequence[tuple[str, str]],
    tokenizer: Any,
    max_tokens: int,
    emitted: str,
    written: ToolFormat = SEARCH_R1,
) -> tuple[list[int], bool]:
    """`encode_observation` of numbered passages, (title, text) pairs, freed of tags."""
    text = neutralise(format_passages(passages))
    return encode_observation(text, tokenizer, max_tokens, emitted, written)


def encode_observation(
    text: str, tokenizer: Any, max_tokens: int, emitted: str, written: ToolFormat = SEARCH_R1
) -> tuple[list[int], bool]:
    """Token ids of the block around `text`, and whether the text was cut to fit into `max_tokens`.

    The block is encoded as one text: vocabularies join `>Doc` and `.</`, and published checkpoints
    were trained so. It is cut inside, so that the closing tag always survives (`max_tokens` must
    hold both tags). `emitted` is what stands after the policy's own tag: what of the block's head
    it begins with (`>\\n\\n` may be one token) is not added again.
    """
    ids = encode_text(tokenizer, unsaid_head(written, emitted) + text + written.tail)
    if len(ids) <= max_tokens:
        return ids, False
    tail = encode_text(tokenizer, written.tail)
    return ids[: max_tokens - len(tail)] + tail, True


def encode_illustrated(
    text: str,
    images: Sequence[Image],
    tokenizer: Any,
    max_tokens: int,
    emitted: str,
    written: ToolFormat = SEARCH_R1,
) -> tuple[list[int], bool, list[Image]]:
    """As `encode_observation`, of a text with an image at each `PLACE`.

    An image for which there is no room is left out. Also returns the images that are in the block.
    """
    first, *others = text.split(PLACE)
    tail = encode_text(tokenizer, written.tail)
    room = max_tokens - len(tail)
    ids = encode_text(tokenizer, unsaid_head(written, emitted) + first)
    shown: list[Image] = []
    for number, part in enumerate(others):
        image = images[number] if number < len(images) else None
        if image is not None and len(ids) + len(image.token_ids) <= room:
            shown.append(image)
            ids += image.token_ids
        ids += encode_text(tokenizer, part)
    is_cut = len(ids) > room or len(shown) < len(images)
    return ids[:room] + tail, is_cut, shown


def unsaid_head(written: ToolFormat, emitted: str) -> str:
    """What of a block's head does not stand behind the policy's own tag already."""
    head = written.head
    shared = next(n for n in range(len(head), -1, -1) if emitted.startswith(head[:n]))
    return head[shared:]
