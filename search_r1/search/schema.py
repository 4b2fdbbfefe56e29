"""The `/retrieve` contract, shared by client and server and compatible with the original's."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, field_validator

TOKEN = "SEARCH_R1_RETRIEVER_TOKEN"
"""Environment variable with the bearer token that client and server share. It is a secret, so that
no configuration holds it."""


class RetrieveRequest(BaseModel):
    """A batch of queries."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    queries: list[str] = Field(examples=[["who wrote Hamlet"]])
    """Any number of queries, also none."""
    topk: PositiveInt | None = Field(default=None, le=1000)
    """Passages per query. Null stands for the default of the server."""
    return_scores: bool = Field(default=False, strict=True)
    """Whether a passage is returned as `{"document": …, "score": …}` or as the document itself."""
    allow_partial: bool = Field(default=False, strict=True)
    """Whether a failed query is reported under `errors` beside the results of the others, or fails
    the whole request."""

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
    """A document with its score, as returned with `return_scores`."""

    document: Document
    score: float = 0.0


class RetrieveResponse(BaseModel):
    """The results, one list for each query, in the order of the queries.

    The items are scored documents, or the documents themselves without `return_scores`.
    """

    result: list[list[dict[str, Any]]]
    errors: dict[int, str] | None = None
    """Only with `allow_partial`: why a query failed, by its number. Its result is empty."""


class Problem(BaseModel):
    """The body of an answer whose status is not 200."""

    detail: str | list[Any]
