"""Search as a tool: the query goes to the retrieval server, passages come back."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any, ClassVar

from search_r1.prompts import format_passages, named_title
from search_r1.search.client import (
    RetrievalClient,
    SearchError,
    check_documents,
    check_noise,
    check_server,
)
from search_r1.search.client.answers import Passage
from search_r1.search.client.config import RetrieverConfig
from search_r1.tools.base import SEARCH_TOOL, Schema, Tool, ToolConfig, ToolFailed, ToolResponse
from search_r1.tools.formats import SEARCH_R1, ToolFormat
from verl.utils.images import PLACE

_step: ContextVar[int | None] = ContextVar("training_step", default=None)


@contextmanager
def searching_at(step: int | None) -> Iterator[None]:
    """Tells the searches of this block the training step; None: outside of training.

    The block holds for the present task and for those that it starts.
    """
    token = _step.set(step)
    try:
        yield
    finally:
        _step.reset(token)


class SearchTool(Tool):
    """Asks the retrieval server. The prompts' own words say how to call it in tags."""

    pure: ClassVar[bool] = True
    name = SEARCH_TOOL
    argument_key = "query"
    description = "Searches a corpus and returns the passages that match best."
    instruction = ""

    def __init__(self, config: RetrieverConfig, format: ToolFormat = SEARCH_R1) -> None:
        # The client has limits of its own, which know what a busy server is.
        limits = ToolConfig(max_concurrency=None, deadline_s=None, cache_size=config.cache_size)
        super().__init__(limits)
        self.config = config
        self.format = format
        self.client = RetrievalClient(config)

    @property
    def parameters(self) -> Schema:
        query = {"type": "string", "description": "What to search for."}
        return {"type": "object", "properties": {"query": query}, "required": ["query"]}

    def preflight(self) -> list[str]:
        """The servers that do not answer."""
        problems = [check_server(url) for url in self.config.urls]
        if self.config.show_documents:
            problems += [check_documents(url) for url in self.config.urls]
        if self.config.noise.is_on:
            problems += [check_noise(url) for url in self.config.urls]
        return [f"retriever.url: {problem}" for problem in problems if problem]

    async def execute(self, argument: str) -> ToolResponse:
        """Searches, with the noise of the training step.

        Raises ToolFailed when the search fails for good.
        """
        noise = self.config.noise.at(_step.get())
        try:
            passages = await self.client.search(argument, noise)
        except SearchError as error:
            raise ToolFailed(str(error), kind=error.kind) from error
        shown = list(map(illustrated, passages)) if self.shows_images else passages
        text = format_passages([(named_title(p.title, p.document), p.text) for p in shown])
        facts = [{"id": p.id, "title": p.title, "text": p.text, "score": p.score} for p in passages]
        images = tuple(p.image for p in passages if p.image) if self.shows_images else ()
        return ToolResponse(text, facts={"query": argument, "passages": facts}, images=images)

    def trajectory_facts(self) -> dict[str, Any]:
        """Failed attempts to search, by kind.

        They are those of all trajectories since the last one that ended: right in the sum.
        """
        return {"search_errors": self.client.take_errors()}

    async def close(self) -> None:
        await self.client.close()


def illustrated(passage: Passage) -> Passage:
    """A passage with the place of its image behind its text, and with no other such place."""
    text = passage.text.replace(PLACE, "")
    return replace(
        passage,
        title=passage.title.replace(PLACE, ""),
        document=passage.document.replace(PLACE, ""),
        text=f"{text} {PLACE}" if passage.image else text,
    )
