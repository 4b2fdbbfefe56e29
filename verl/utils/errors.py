"""Errors that a user can act on."""

from collections.abc import Sequence
from typing import Any


class ConfigError(ValueError):
    """The configuration cannot work.

    The message lists every problem, one per line, with its key.
    """

    def __init__(self, problems: list[str]) -> None:
        super().__init__(
            "\n".join(["the configuration cannot work:", *(f"  - {p}" for p in problems)])
        )
        self.problems = problems

    def __reduce__(self) -> tuple[Any, ...]:
        """Lets the exception be pickled, so that it can be sent to other processes.

        By default that is done with `args`, which here is the message and not the list of problems.
        """
        return type(self), (self.problems,)


class DataError(ValueError):
    """A data file is wrong: the message names the file, the row and what was expected."""


class RewardError(RuntimeError):
    """A reward does not work: it raised, or it lacks an entry that the configuration needs.

    The message names the reward.
    """


class ModelError(ValueError):
    """A name does not stand for a model that can be loaded.

    The message says what was found there and what was expected.
    """


MAX_LISTED = 20


def listed(problems: Sequence[str]) -> str:
    """The first problems, one per line, and how many more there are."""
    more = [f"... and {len(problems) - MAX_LISTED} more"] if len(problems) > MAX_LISTED else []
    return "\n".join([*problems[:MAX_LISTED], *more])
