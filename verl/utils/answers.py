"""Accepted answers as data files hold them: a text, a number, or a list of those."""

import math
from typing import Any


def answers_of(value: object) -> list[str]:
    """The texts of a value or of a list of values; numbers are as they are written.

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
    # a column of integers in which some are missing comes as floats
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, str | int | float):
        return str(value)
    raise ValueError(f"expected a text, a number or a list of them, got {kind_of(value)}")


def plain(value: object) -> Any:
    """A NumPy array as a list, a NumPy number as a number; anything else as it is."""
    tolist = getattr(value, "tolist", None)
    return tolist() if callable(tolist) else value


def kind_of(value: object) -> str:
    """What a value is, for messages: a dict by its keys, a list by what it holds."""
    if isinstance(value, dict):
        return f"a dict (keys: {', '.join(map(str, value)) or 'none'})"
    if isinstance(value, list | tuple):
        return f"a list that holds {kind_of(value[0])}" if value else "an empty list"
    return "None" if value is None else f"{type(value).__name__} {repr(value)[:60]}"
