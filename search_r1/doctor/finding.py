"""What a check has found."""

from enum import StrEnum
from typing import NamedTuple


class Status(StrEnum):
    """How a check ended."""

    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"


class Finding(NamedTuple):
    """The outcome of one check."""

    name: str
    status: Status
    says: str
    """What was found; where something is wrong, the cause."""
    cure: str = ""
    """What to do about it; empty where nothing is wrong."""


def fine(name: str, says: str) -> Finding:
    """A check that found nothing wrong."""
    return Finding(name, Status.OK, says)


def warning(name: str, says: str, cure: str) -> Finding:
    """A check that found what may be meant, or may do harm later."""
    return Finding(name, Status.WARNING, says, cure)


def problem(name: str, says: str, cure: str) -> Finding:
    """A check that found why a run would fail."""
    return Finding(name, Status.PROBLEM, says, cure)
