"""What a search engine must offer to be served."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

Hits = list[tuple[dict[str, Any], float]]
"""Documents with their scores, best first."""


class EngineError(Exception):
    """Reports a query that an engine failed on.

    The message names the cause; `kind` is a label for the metrics.
    """

    kind = "engine"


def settings_of(retriever: object) -> dict[str, Any]:
    """What an engine says of how it searches, for `/health`: its `settings`, if it has any."""
    return getattr(retriever, "settings", {})


class Retriever(Protocol):
    """A search engine. It is called from one thread at a time.

    It may have `settings`, a dictionary for `/health`.
    """

    name: str

    def __len__(self) -> int: ...

    def search(self, queries: Sequence[str], topk: int) -> Sequence[Hits | EngineError]:
        """Returns the hits of each query, or the error by which it failed.

        An exception fails every query of the call.
        """
        ...


@runtime_checkable
class Simulator(Retriever, Protocol):
    """An engine that can answer a query by passages that do not help, where it is asked to."""

    def simulate(
        self, queries: Sequence[str], noisy: Sequence[bool], topk: int
    ) -> Sequence[Hits | EngineError]:
        """Returns what `search` does, with passages that do not help for the noisy queries."""
        ...
