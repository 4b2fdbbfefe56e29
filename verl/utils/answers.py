"""Accepted answers as data files hold them: a text, a number, or a list of those."""

import math
from typing import Any


def answers_of(value: Any) -> list[str]:
    """The texts of a value or a list of values, numbers as they are written; blank texts, None and
    NaN are none.

    Raises ValueError saying what was found instead of a text or a number.

    >>> answers_of(["Rome", 1947, 3.0, None, " "])
    ['Rome', '1947', '3']
    """
    value = plain(value)
    values = value if isinstance(value, list | tuple) else [value]
    return [text for v in values if (text := text_of(plain(v))).strip()]


def text_of(value: Any) -> str:
    """One value as a text, "" for None and NaN. Raises ValueError for anything that is no text,
    number or bool."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if (
        isinstance(value, float) and value.is_integer()
    ):  # a column of integers in which some are missing
        return str(int(value))
    if isinstance(value, str | int | float):
        return str(value)
    raise ValueError(f"expected a text, a number or a list of them, got {kind_of(value)}")


def plain(value: Any) -> Any:
    """A NumPy array as a list, a NumPy number as a number; anything else as it is."""
    return value.tolist() if callable(getattr(value, "tolist", None)) else value


def kind_of(value: Any) -> str:
    """What a value is, for messages: of a dict its keys, of a list what it holds."""
    if isinstance(value, dict):
        return f"a dict (keys: {', '.join(map(str, value)) or 'none'})"
    if isinstance(value, list | tuple):
        return f"a list that holds {kind_of(value[0])}" if value else "an empty list"
    return "None" if value is None else f"{type(value).__name__} {repr(value)[:60]}"
