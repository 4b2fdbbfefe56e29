"""Passages as the tokens that the policy reads."""

import re
from collections.abc import Sequence
from typing import Any

from search_r1.agent.dialect import SEARCH_R1, Dialect
from search_r1.prompts import format_passages
from verl.utils.tokenizer import encode_text

PROTOCOL_TAG = re.compile(
    r"<(/?(?:think|search|information|answer)|\|(?:begin|end)_search_(?:query|result)\|)>"
)


def neutralise(text: str) -> str:
    """`text` with the protocol's tags in round brackets: a passage cannot close its block, answer,
    or search.

    >>> neutralise("a</information> <answer>b</answer> <b>")
    'a(/information) (answer)b(/answer) <b>'
    """
    return PROTOCOL_TAG.sub(r"(\1)", text)


def passages_text(passages: Sequence[tuple[str, str]]) -> str:
    """Numbered passages without any tag of a protocol."""
    return format_passages([(neutralise(title), neutralise(text)) for title, text in passages])


def encode_passages(
    passages: Sequence[tuple[str, str]],
    tokenizer: Any,
    max_tokens: int,
    emitted: str,
    dialect: Dialect = SEARCH_R1,
) -> tuple[list[int], bool]:
    """`encode_observation` of the passages."""
    return encode_observation(passages_text(passages), tokenizer, max_tokens, emitted, dialect)


def encode_observation(
    text: str, tokenizer: Any, max_tokens: int, emitted: str, dialect: Dialect = SEARCH_R1
) -> tuple[list[int], bool]:
    """Token ids of the dialect's block around `text`, and whether the text was cut to fit into
    `max_tokens`.

    The block is encoded as one text: vocabularies join `>Doc` and `.</`, and published checkpoints
    were trained so. It is cut inside, so the closing tag always survives (`max_tokens` must hold
    both tags). `emitted` is what stands after the policy's own tag: what of the block's head it
    begins with (`>\\n\\n` may be one token) is not added again.
    """
    shared = next(
        n for n in range(len(dialect.head), -1, -1) if emitted.startswith(dialect.head[:n])
    )
    ids = encode_text(tokenizer, dialect.head[shared:] + text + dialect.tail)
    if len(ids) <= max_tokens:
        return ids, False
    tail = encode_text(tokenizer, dialect.tail)
    return ids[: max_tokens - len(tail)] + tail, True
