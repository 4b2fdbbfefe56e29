"""The `/retrieve` contract, shared by client and server and compatible with the original's."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, field_validator

TOKEN = "SEARCH_R1_RETRIEVER_TOKEN"
"""Environment variable of the bearer token, which client and server share; no configuration holds
it."""


class RetrieveRequest(BaseModel):
    """A batch of queries."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    queries: list[str] = Field(examples=[["who wrote Hamlet"]])
    """Any number of queries, none included."""
    topk: PositiveInt | None = Field(default=None, le=1000)
    """Passages per query; null: the server's default."""
    return_scores: bool = Field(default=False, strict=True)
    """Whether each passage comes as `{"document": …, "score": …}` or as the document itself."""
    allow_partial: bool = Field(default=False, strict=True)
    """Whether a query that failed is reported under `errors` beside the others' results, or fails
    the request."""

    @field_validator("topk", mode="before")
    @classmethod
    def _no_bool_no_text(cls, value: object) -> object:
        if isinstance(value, bool | str):
            raise ValueError("must be an integer")
        return value


class Document(BaseModel):
    """A line of the corpus: `contents` is the quoted title, a line break, and the text."""

    model_config = ConfigDict(extra="allow")

    id: str | int | None = None
    contents: str


class ScoredDocument(BaseModel):
    """A hit, as it comes with `return_scores`."""

    document: Document
    score: float = 0.0


class RetrieveResponse(BaseModel):
    """One list per query, in their order.

    Its items are scored documents, or without `return_scores` the documents themselves.
    """

    result: list[list[dict[str, Any]]]
    errors: dict[int, str] | None = None
    """Only with `allow_partial`: why the query of that number, whose result is empty, failed."""


class Problem(BaseModel):
    """The body of an answer with another status than 200."""

    detail: str | list[Any]
