"""What a search engine must offer to be served."""

from collections.abc import Sequence
from typing import Any, Protocol

Hits = list[tuple[dict[str, Any], float]]
"""Documents with their scores, best first."""


class EngineError(Exception):
    """A search that an engine could not do; the message names the cause. `kind` is a label for the
    metrics."""

    kind = "engine"


class Retriever(Protocol):
    """Called from one thread at a time."""

    name: str

    def __len__(self) -> int: ...

    def search(self, queries: Sequence[str], topk: int) -> Sequence[Hits | EngineError]:
        """The hits of each query, or why there are none for it. Raising fails every query of the
        call."""
        ...
