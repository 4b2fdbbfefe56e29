"""Reads accepted answers in the forms that data files have: a text, a number, or a list."""

import math
from typing import Any


def answers_of(value: object) -> list[str]:
    """The accepted answers, as texts, in a value or a list of values.

    Blank texts, None and NaN are left out. Raises ValueError saying what was found instead of a
    text or a number.

    >>> answers_of(["Rome", 1947, 3.0, None, " "])
    ['Rome', '1947', '3']
    """
    value = plain(value)
    values = value if isinstance(value, list | tuple) else [value]
    texts = [text_of(plain(one)) for one in values]
    return [text for text in texts if text.strip()]


def text_of(value: object) -> str:
    """One value as a text, "" for None and NaN.

    Raises ValueError for anything that is no text, number or bool.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    # a column of integers with missing values is read as floats
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, str | int | float):
        return str(value)
    raise ValueError(f"expected a text, a number or a list of them, got {kind_of(value)}")


def plain(value: object) -> Any:
    """A NumPy array as a list, a NumPy number as a number, anything else unchanged."""
    tolist = getattr(value, "tolist", None)
    return tolist() if callable(tolist) else value


def kind_of(value: object) -> str:
    """The kind of a value, for messages: a dict with its keys, a list with its kinds of items."""
    if isinstance(value, dict):
        return f"a dict (keys: {', '.join(map(str, value)) or 'none'})"
    if isinstance(value, list | tuple):
        return f"a list that holds {kind_of(value[0])}" if value else "an empty list"
    return "None" if value is None else f"{type(value).__name__} {repr(value)[:60]}"
