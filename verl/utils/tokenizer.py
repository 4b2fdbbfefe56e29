"""Text to ids with one rule: text from outside (questions, passages) never becomes a control token."""

from typing import Any


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Ids of plain `text`: a special token spelled in it (`<|im_end|>`) is split into ordinary pieces."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def encode_chat(tokenizer: Any, messages: list[dict[str, str]], **kwargs: Any) -> list[int]:
    """Ids of `messages` with the generation prompt; without a chat template, of their bare contents.

    Special tokens are those of the template only: a message that spells one is cut out of the rendered text and encoded
    as plain text.
    """
    if not getattr(tokenizer, "chat_template", None):
        return encode_text(tokenizer, "".join(m["content"] for m in messages))
    if not any(token in m["content"] for m in messages for token in tokenizer.all_special_tokens):
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **kwargs)
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    marks = [f"\x00{i}\x00" for i in range(len(messages))]
    marked = [{**m, "content": mark} for m, mark in zip(messages, marks, strict=True)]
    rest = tokenizer.apply_chat_template(marked, tokenize=False, add_generation_prompt=True, **kwargs)
    ids: list[int] = []
    for mark, message in zip(marks, messages, strict=True):
        before, _, rest = rest.partition(mark)
        ids += tokenizer(before, add_special_tokens=False)["input_ids"] + encode_text(tokenizer, message["content"])
    return ids + tokenizer(rest, add_special_tokens=False)["input_ids"]
