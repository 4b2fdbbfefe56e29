"""The `/retrieve` contract, shared by client and server and compatible with the original's."""

from typing import Any

from pydantic import BaseModel, ConfigDict, PositiveInt


class RetrieveRequest(BaseModel):
    """`topk` null: the server's default."""

    queries: list[str]
    topk: PositiveInt | None = None
    return_scores: bool = False


class Document(BaseModel):
    """A line of the corpus: `contents` is the quoted title, a line break, and the text."""

    model_config = ConfigDict(extra="allow")

    id: str | int | None = None
    contents: str


class ScoredDocument(BaseModel):
    document: Document
    score: float = 0.0


class RetrieveResponse(BaseModel):
    """One list per query, in their order; without `return_scores` its items are the documents themselves."""

    result: list[list[dict[str, Any]]]
