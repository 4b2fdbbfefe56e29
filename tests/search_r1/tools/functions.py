"""Functions that tests call as tools: nothing in them knows of tools but `CallError`."""

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from functools import wraps
from typing import Annotated, Any

from pydantic import Field

from search_r1.tools.base import CallError, ToolFailed

POPULATIONS = {("Torvel", 2020): 1200}
calls: list[Any] = []
release = threading.Event()
"""Lets `waits` end."""


def population(
    city: Annotated[str, "Name of the city, in English."],
    year: Annotated[int, Field(ge=0, description="Year of the census.")] = 2020,
) -> int:
    """Tells how many people
    live in a city.

    What stands here is for readers of the code.
    """
    try:
        return POPULATIONS[city, year]
    except KeyError:
        raise CallError(f"There was no census of {city} in {year}.") from None


@dataclass
class Stay:
    city: str
    nights: int


async def book(day: date, stays: tuple[Stay, ...], note: str | None = None) -> dict[str, Any]:
    """Books a journey."""
    await asyncio.sleep(0)
    calls.append((day, stays, note))
    return {"on": day, "first": stays[0], "cities": {stay.city for stay in stays}, "note": "é"}


def says(text: str) -> str:
    """Says it."""
    return text


def shadows(schema: int, copy: int = 0, self: int = 1) -> int:
    """Has parameters that are called like the methods of a model."""
    return schema + copy + self


def nothing() -> None:
    pass


def breaks(how: str) -> Any:
    """Breaks."""
    if how == "stop":
        raise StopIteration
    if how == "exit":
        raise SystemExit(3)
    if how == "environment":
        raise ToolFailed("the disk is full", kind="disk")
    if how == "no json":
        return object()
    return {}["secret"]  # the line that is named


async def breaks_later() -> None:
    raise ValueError("secret")


def waits(seconds: float = 60) -> str:
    """Waits until it may end."""
    release.wait(seconds)
    return "done"


async def waits_in_the_loop() -> None:
    await asyncio.sleep(3600)


def decorated(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def inner(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return inner


@decorated
async def hidden(number: int) -> int:
    """Hides that it is asynchronous."""
    return 2 * number


def many(*words: str) -> str:
    return "".join(words)


def keyed(**words: str) -> str:
    return "".join(words)


def by_place(word: str, /) -> str:
    return word


def untyped(word) -> str:
    return word


def opaque(word: threading.Event) -> str:
    return str(word)


def called_back(word: Callable[[], int]) -> str:
    return str(word)


def forward(word: "Nowhere") -> str:  # type: ignore # noqa: F821
    return str(word)


def fielded(word: str = Field("x", description="A word.")) -> str:
    return word


unnamed = lambda word: word  # noqa: E731
