"""What a server's answer says: the passages of each query, or why it failed."""

from dataclasses import dataclass
from typing import TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from search_r1.search.client.errors import BadAnswer, EngineFailed, SearchError
from search_r1.search.schema import RetrieveResponse, ScoredDocument

M = TypeVar("M", bound=BaseModel)


@dataclass(frozen=True)
class Passage:
    """A retrieved passage; the title keeps its literal quotes."""

    id: str
    title: str
    text: str
    score: float
    document: str = ""
    """The name of its document, where the server was asked for it."""

    @classmethod
    def from_contents(
        cls, id: object, contents: str, score: float, document: str = ""
    ) -> "Passage":
        """Splits `contents` at its first line break into title and text."""
        title, _, text = contents.partition("\n")
        return cls(str(id), title, text, score, document)


Found = list[Passage] | SearchError
"""The outcome of a query."""


def parse_response(answer: httpx.Response, num_queries: int, url: str) -> list[Found]:
    """The outcome of each query. Raises BadAnswer when the answer breaks the contract."""
    try:
        response = RetrieveResponse.model_validate(answer.json())
        scored = [
            [ScoredDocument.model_validate(item) for item in items] for items in response.result
        ]
    except (ValidationError, ValueError) as error:
        raise BadAnswer(f"{url}: the answer is not of the /retrieve contract: {error}") from error
    if len(scored) != num_queries:
        raise BadAnswer(f"{url}: {len(scored)} results for {num_queries} queries")
    found: list[Found] = [[to_passage(item) for item in items] for items in scored]
    for i, cause in (response.errors or {}).items():
        if i in range(num_queries):
            found[i] = EngineFailed(f"{url}: {cause}")
    return found


def to_passage(item: ScoredDocument) -> Passage:
    """The passage of a document with its score."""
    document = item.document
    return Passage.from_contents(document.id, document.contents, item.score, item.document_id or "")


def parse_document(answer: httpx.Response, model: type[M], url: str) -> M:
    """What `/open` or `/find` answered. Raises BadAnswer when it breaks the contract."""
    try:
        return model.model_validate(answer.json())
    except (ValidationError, ValueError) as error:
        raise BadAnswer(f"{url}: the answer is no {model.__name__}: {error}") from error
