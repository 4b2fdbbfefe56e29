"""Configures how a client talks to a retrieval server."""

import os

from pydantic import (
    BaseModel,
    ConfigDict,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
)

from search_r1.search.schema import TOKEN


def authorization() -> dict[str, str]:
    """The header with the token from the environment; empty without one."""
    token = os.environ.get(TOKEN)
    return {"Authorization": f"Bearer {token}"} if token else {}


class RetrieverConfig(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    url: str | list[str] = "http://127.0.0.1:8000/retrieve"
    """Address of the server's /retrieve, or a list with those of its replicas, of which the least
    busy healthy one is asked."""
    topk: PositiveInt = 3
    """Passages per query."""
    timeout_s: PositiveFloat = 60.0
    """Seconds that one request may take, and that all failed attempts of a search may take
    together."""
    busy_timeout_s: PositiveFloat = 600.0
    """Seconds that a search may wait, in addition to `timeout_s`, while servers answer 429. After
    that it fails."""
    max_retries: NonNegativeInt = 8
    """Maximum number of further attempts after connection errors, time-outs and answers 5xx."""
    backoff_s: NonNegativeFloat = 0.2
    """Seconds before the first further attempt. They double with every attempt, with jitter."""
    max_batch_size: PositiveInt = 64
    """Maximum number of queries per request: searches that begin together share a request."""
    batch_wait_s: NonNegativeFloat = 0.002
    """Seconds that a search waits for others to share its request."""
    max_query_chars: PositiveInt = 4096
    """Length to which a query is cut, so that no server refuses what a policy writes."""
    show_documents: bool = False
    """Write the name of its document into the heading of each passage, as the tools open and find
    take it. Needs a server with --documents."""
    cache_size: NonNegativeInt = 0
    """Results that each agent worker keeps, by their query: a repeated search asks no server."""

    @field_validator("url")
    @classmethod
    def _some_url(cls, url: str | list[str]) -> str | list[str]:
        urls = [url] if isinstance(url, str) else url
        if not url or not all(u.startswith(("http://", "https://")) for u in urls):
            raise ValueError("must be http(s)://HOST:PORT/retrieve, or a list of such")
        return url

    @property
    def urls(self) -> list[str]:
        """The addresses of the replicas, at least one."""
        return [self.url] if isinstance(self.url, str) else list(self.url)
