"""The contract of the server's endpoints, shared by client and server.

That of `/retrieve` is compatible with the original's.
"""

from typing import Any, Literal

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

    name_documents: bool = Field(default=False, strict=True)
    """Whether each passage comes with the name of its document, `document_id`. Only with
    `return_scores`, and only a server with --documents knows them."""
    noise: float | None = Field(default=None, ge=0, le=1)
    """Share of the queries that are to get passages that do not help; null and 0: none. Which
    queries these are is drawn from query and `noise_seed`. A server whose engine does not simulate
    a search engine refuses a share above 0 by 409."""
    noise_seed: int = 0
    """With another number the noise falls on other queries."""

    @field_validator("topk", "noise_seed", mode="before")
    @classmethod
    def _no_bool_no_text(cls, value: object) -> object:
        return no_bool_no_text(value)

    @field_validator("noise", mode="before")
    @classmethod
    def _a_number(cls, value: object) -> object:
        return no_bool_no_text(value, "a number")


def no_bool_no_text(value: object, expected: str = "an integer") -> object:
    """The same value. Raises ValueError for what would only be read as a number."""
    if isinstance(value, bool | str):
        raise ValueError(f"must be {expected}")
    return value


class Document(BaseModel):
    """A line of the corpus: `contents` is the quoted title, a line break, and the text."""

    model_config = ConfigDict(extra="allow")

    id: str | int | None = None
    contents: str

    @property
    def image(self) -> str:
        """The file of its image, in base64, if its `image` is a text; else empty."""
        image = (self.model_extra or {}).get("image")
        return image if isinstance(image, str) else ""


class ScoredDocument(BaseModel):
    """A document with its score, as returned with `return_scores`."""

    document: Document
    score: float = 0.0
    document_id: str | None = None
    """With `name_documents`: the name by which `/open` and `/find` know its document."""


class RetrieveResponse(BaseModel):
    """The results, one list for each query, in the order of the queries.

    The items are scored documents, or the documents themselves without `return_scores`.
    """

    result: list[list[dict[str, Any]]]
    errors: dict[int, str] | None = None
    """Only with `allow_partial`: why a query failed, by its number. Its result is empty."""


MAX_PAGE = (1 << 31) - 1
"""No document has so many pages."""


class OpenRequest(BaseModel):
    """A page of a document."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    document: str = Field(examples=["7"])
    """Its name, as `document_id` has it."""
    page: PositiveInt = Field(default=1, le=MAX_PAGE)
    """The first one is 1."""

    @field_validator("page", mode="before")
    @classmethod
    def _no_bool_no_text(cls, value: object) -> object:
        return no_bool_no_text(value)


class ShownPassage(BaseModel):
    """A passage of the corpus, or the part of it that stands on a page."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    id: str
    start: int
    """Where it begins in the page's text, in characters."""
    end: int
    """Where it ends."""


class OpenResponse(BaseModel):
    """The page, or in `error` what was wrong with the question."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    error: Literal["unknown_document", "unreadable", "no_such_page"] | None = None
    document: str
    title: str = ""
    """As the corpus has it, with its quotes."""
    page: int
    pages: int = 0
    """How many the document has."""
    text: str = ""
    passages: list[ShownPassage] = []
    """What of the corpus stands on the page, in its order."""
    cut: bool = False
    """Whether the document is longer than what the server reads of one."""


class FindRequest(BaseModel):
    """A text to look for in a document."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    document: str = Field(examples=["7"])
    """Its name, as `document_id` has it."""
    text: str = Field(examples=["was born"])
    """In upper or lower case; words, with a space between them."""


class Match(BaseModel):
    """A sentence that holds the text."""

    page: int
    id: str
    """Of the passage."""
    text: str


class FindResponse(BaseModel):
    """The matches, or in `error` what was wrong with the question."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    error: Literal["unknown_document", "unreadable", "no_match"] | None = None
    document: str
    title: str = ""
    """As the corpus has it, with its quotes."""
    pages: int = 0
    """How many the document has."""
    matches: list[Match] = []
    """The first ones, in their order."""
    more: bool = False
    """Whether there are further ones."""
    cut: bool = False
    """Whether the document is longer than what the server reads of one."""


class Problem(BaseModel):
    """The body of an answer whose status is not 200."""

    detail: str | list[Any]
