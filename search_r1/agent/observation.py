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

    It is cut inside, so the closing tag always survives. `emitted` is what the policy wrote after its closing tag:
    line breaks among it (`>` and `\\n\\n` are one token for some vocabularies) are not added a second time.
    """
    body = encode_text(tokenizer, format_passages([(neutralise(title), neutralise(text)) for title, text in passages]))
    newlines = len(emitted) - len(emitted.lstrip("\n"))
    head = encode_text(tokenizer, OBSERVATION_HEAD[min(newlines, 2) :])
    tail = encode_text(tokenizer, OBSERVATION_TAIL)
    room = max(0, max_tokens - len(head) - len(tail))
    return head + body[:room] + tail, len(body) > room
