"""Opens documents of the retrieval server a page at a time, and looks for a text in one.

    agent.tools=[{_target_: search_r1.tools.documents.OpenTool, retriever: ${retriever}},
                 {_target_: search_r1.tools.documents.FindTool, retriever: ${retriever}}]

The server must be started with --documents (docs/retriever.md), and `retriever.show_documents=true`
tells the policy what the documents of the passages that it found are called (docs/tools.md).
"""

from collections.abc import Awaitable
from typing import Any, ClassVar, TypeVar

from pydantic import PositiveFloat, PositiveInt

from search_r1.search.client import RetrievalClient, SearchError, check_documents
from search_r1.search.client.config import RetrieverConfig
from search_r1.search.schema import FindResponse, OpenResponse
from search_r1.tools.base import (
    OPEN_TOOL,
    Arguments,
    Schema,
    Tool,
    ToolConfig,
    ToolFailed,
    ToolResponse,
)

T = TypeVar("T")
DOCUMENT: Schema = {
    "type": "string",
    "minLength": 1,
    "description": "The name of the document, as the heading of a passage has it.",
}


class DocumentsConfig(ToolConfig):
    """The section of `open` or `find`."""

    retriever: RetrieverConfig = RetrieverConfig()
    """The server, and how it is asked: `${retriever}` for that of the searches."""
    max_concurrency: PositiveInt | None = None
    """null: as many as the client has connections."""
    deadline_s: PositiveFloat | None = None
    """null: as long as `retriever` allows, which knows what a busy server is."""


class DocumentTool(Tool):
    """What asks the server about one document."""

    Config: ClassVar[type[ToolConfig]] = DocumentsConfig
    pure: ClassVar[bool] = True
    argument_key = "document"

    def __init__(self, config: DocumentsConfig) -> None:
        super().__init__(config)
        self.config = config
        self.client = RetrievalClient(config.retriever)

    def preflight(self) -> list[str]:
        """The servers that do not answer, or have no documents."""
        problems = [check_documents(url) for url in self.config.retriever.urls]
        return [f"agent.tools, {self.name}: {problem}" for problem in problems if problem]

    async def answer(self, asked: Awaitable[T]) -> T:
        """What the server answers. Raises ToolFailed when asking it fails for good."""
        try:
            return await asked
        except SearchError as error:
            raise ToolFailed(str(error), kind=error.kind) from error

    async def close(self) -> None:
        await self.client.close()


class OpenTool(DocumentTool):
    """Shows a page of a document."""

    name = OPEN_TOOL
    description = "Opens a document, of which it shows one page."
    instruction = (
        "You can open a document that a search found by <open> its name </open>, and its first "
        'page will stand between <result> and </result>. <open>{"document": "its name", "page": '
        "2}</open> opens the second page."
    )

    @property
    def parameters(self) -> Schema:
        page = {"type": "integer", "minimum": 1, "description": "Number of the page. Default: 1."}
        return {
            "type": "object",
            "properties": {"document": DOCUMENT, "page": page},
            "required": ["document"],
        }

    async def call(self, arguments: Arguments) -> ToolResponse:
        """Opens a page. Raises ToolFailed when asking the server fails for good."""
        page = int(arguments.get("page", 1))
        opened = await self.answer(self.client.open(arguments["document"], page))
        title = opened.title or opened.document
        facts = page_facts(opened)
        if opened.error == "unknown_document":
            return ToolResponse(unknown(opened.document), opened.error, facts)
        if opened.error == "unreadable":
            return ToolResponse(unreadable(opened.document), opened.error, facts)
        if opened.error is not None:
            pages = "1 page" if opened.pages == 1 else f"{opened.pages} pages"
            return ToolResponse(f"{title} has {pages}.", opened.error, facts)
        heading = f"{title}, page {opened.page} of {opened.pages}"
        return ToolResponse(f"{heading}\n{opened.text.strip()}", facts=facts)


class FindTool(DocumentTool):
    """Shows where a text stands in a document."""

    name = "find"
    description = "Finds a text in a document: shows the sentences that hold it, with their pages."
    instruction = (
        'You can find a text in a document by <find>{"document": "its name", "text": "the text"}'
        "</find>, and the sentences that hold it will stand between <result> and </result>."
    )

    @property
    def parameters(self) -> Schema:
        text = {
            "type": "string",
            "minLength": 1,
            "description": "The text to find, in upper or lower case.",
        }
        return {
            "type": "object",
            "properties": {"document": DOCUMENT, "text": text},
            "required": ["document", "text"],
        }

    async def call(self, arguments: Arguments) -> ToolResponse:
        """Finds a text. Raises ToolFailed when asking the server fails for good."""
        text = arguments["text"]
        found = await self.answer(self.client.find(arguments["document"], text))
        title = found.title or found.document
        facts = match_facts(found, text)
        if found.error == "unknown_document":
            return ToolResponse(unknown(found.document), found.error, facts)
        if found.error == "unreadable":
            return ToolResponse(unreadable(found.document), found.error, facts)
        if found.error is not None:
            return ToolResponse(f"{title} does not hold this text.", found.error, facts)
        lines = [f"Page {match.page} of {found.pages}: {match.text}" for match in found.matches]
        more = ["There are further matches."] if found.more else []
        return ToolResponse("\n".join([title, *lines, *more]), facts=facts)


def unknown(document: str) -> str:
    """What the policy is told of a name that no document has."""
    return f"There is no document {document!r}."


def unreadable(document: str) -> str:
    """What the policy is told of a page that cannot be fetched."""
    return f"{document!r} cannot be read."


def page_facts(opened: OpenResponse) -> dict[str, Any]:
    """The page for logs, metrics and rewards, its passages as a search has them."""
    passages = [
        {"id": p.id, "title": opened.title, "text": opened.text[p.start : p.end].strip()}
        for p in opened.passages
    ]
    facts: dict[str, Any] = {"document": opened.document, "page": opened.page}
    return facts | {"pages": opened.pages, "passages": passages}


def match_facts(found: FindResponse, text: str) -> dict[str, Any]:
    """The matches for logs and rewards. A sentence does not count as the passage that it is of."""
    matches = [{"id": m.id, "page": m.page, "text": m.text} for m in found.matches]
    return {"document": found.document, "text": text, "matches": matches}
