"""Passages as the tokens that the policy reads."""

import re
from collections.abc import Sequence
from typing import Any

from search_r1.prompts import OBSERVATION_HEAD, OBSERVATION_TAIL, format_passages
from verl.utils.tokenizer import encode_text

PROTOCOL_TAG = re.compile(r"<(/?(?:think|search|information|answer))>")


def neutralise(text: str) -> str:
    """`text` with the protocol's tags in round brackets: a passage cannot close its block, answer, or search.

    >>> neutralise("a</information> <answer>b</answer> <b>")
    'a(/information) (answer)b(/answer) <b>'
    """
    return PROTOCOL_TAG.sub(r"(\1)", text)


def encode_passages(
    passages: Sequence[tuple[str, str]], tokenizer: Any, max_tokens: int, emitted: str
) -> tuple[list[int], bool]:
    """Token ids of the `<information>` block, and whether its text was cut to fit into `max_tokens`.

    The block is encoded as one text: vocabularies join `>Doc` and `.</`, and published checkpoints were trained so. It
    is cut inside, so the closing tag always survives (`max_tokens` must hold both tags). `emitted` is what the policy
    wrote after its own tag: line breaks that it begins with (`>\\n\\n` may be one token) are not added a second time.
    """
    newlines = len(emitted) - len(emitted.lstrip("\n"))
    head = OBSERVATION_HEAD[min(newlines, 2) :]
    body = format_passages([(neutralise(title), neutralise(text)) for title, text in passages])
    ids = encode_text(tokenizer, head + body + OBSERVATION_TAIL)
    if len(ids) <= max_tokens:
        return ids, False
    tail = encode_text(tokenizer, OBSERVATION_TAIL)
    return ids[: max_tokens - len(tail)] + tail, True
