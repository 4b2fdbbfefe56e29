"""Reads the answer of a server: the passages of each query, or why the query failed."""

from dataclasses import dataclass
from typing import TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from search_r1.search.client.errors import BadAnswer, EngineFailed, SearchError
from search_r1.search.schema import RetrieveResponse, ScoredDocument

M = TypeVar("M", bound=BaseModel)


@dataclass(frozen=True)
class Passage:
    """A retrieved passage. Its title is in quotes, as in the corpus."""

    id: str
    title: str
    text: str
    score: float
    document: str = ""
    """The name of its document, where the server was asked for it."""
    image: str = ""
    """The file of its image, in base64; empty where it has none."""

    @classmethod
    def from_contents(
        cls, id: object, contents: str, score: float, document: str = "", image: str = ""
    ) -> "Passage":
        """Splits `contents` at its first line break into title and text."""
        title, _, text = contents.partition("\n")
        return cls(str(id), title, text, score, document, image)


Found = list[Passage] | SearchError
"""The outcome of a query: its passages, or the error that it failed with."""


def parse_response(answer: httpx.Response, num_queries: int, url: str) -> list[Found]:
    """Reads the outcome of each query. Raises BadAnswer when the answer breaks the contract."""
    try:
        response = RetrieveResponse.model_validate(answer.json())
        scored = [list(map(ScoredDocument.model_validate, items)) for items in response.result]
    except (ValidationError, ValueError) as error:
        raise BadAnswer(f"{url}: the answer is not of the /retrieve contract: {error}") from error
    if len(scored) != num_queries:
        raise BadAnswer(f"{url}: {len(scored)} results for {num_queries} queries")
    found: list[Found] = [list(map(to_passage, documents)) for documents in scored]
    for i, cause in (response.errors or {}).items():
        if i in range(num_queries):
            found[i] = EngineFailed(f"{url}: {cause}")
    return found


def to_passage(item: ScoredDocument) -> Passage:
    """The passage of a document with its score."""
    document = item.document
    name = item.document_id or ""
    return Passage.from_contents(document.id, document.contents, item.score, name, document.image)


def parse_document(answer: httpx.Response, model: type[M], url: str) -> M:
    """What `/open` or `/find` answered. Raises BadAnswer when it breaks the contract."""
    try:
        return model.model_validate(answer.json())
    except (ValidationError, ValueError) as error:
        raise BadAnswer(f"{url}: the answer is no {model.__name__}: {error}") from error
