"""Computes how long to wait before a request is repeated, for the client and for web search."""

import random


def backoff(base_s: float, failures: int) -> float:
    """Draws the seconds to wait after so many failures in a row (at least one).

    `base_s` is doubled with every failure after the first. The wait is random between half of that
    and all of it, so that callers that failed together do not come back together.
    """
    return base_s * 2 ** (failures - 1) * random.uniform(0.5, 1.0)


def seconds_to_wait(header: str) -> float | None:
    """The seconds that a header such as Retry-After asks for; None unless it is a whole number.

    >>> seconds_to_wait("3"), seconds_to_wait(""), seconds_to_wait("Wed, 21 Oct 2026 07:28:00 GMT")
    (3.0, None, None)
    """
    text = header.strip()
    return float(text) if text.isdecimal() else None
