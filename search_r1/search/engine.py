"""What a search engine must offer to be served."""

from typing import Any, Protocol

Hits = list[tuple[dict[str, Any], float]]
"""Documents with their scores, best first."""


class Retriever(Protocol):
    """Called from one thread at a time."""

    name: str

    def __len__(self) -> int: ...

    def search(self, queries: list[str], topk: int) -> list[Hits]: ...
