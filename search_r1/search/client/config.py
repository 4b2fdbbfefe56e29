"""How a client talks to a retrieval server."""

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
    """The header that a server with a token asks for; none without a token."""
    token = os.environ.get(TOKEN)
    return {"Authorization": f"Bearer {token}"} if token else {}


class RetrieverConfig(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    url: str | list[str] = "http://127.0.0.1:8000/retrieve"
    """Address of the server's /retrieve, or a list of replicas: the least busy healthy one is
    asked."""
    topk: PositiveInt = 3
    """Passages per query."""
    timeout_s: PositiveFloat = 60.0
    """Seconds that a request may take, and that the failed attempts of a search may take
    together."""
    busy_timeout_s: PositiveFloat = 600.0
    """Seconds that a search may wait, on top of `timeout_s`, while servers answer 429; then it has
    failed."""
    max_retries: NonNegativeInt = 8
    """Further attempts after connection errors, time-outs, and answers 5xx."""
    backoff_s: NonNegativeFloat = 0.2
    """Wait before the first further attempt; doubled each time, with jitter."""
    max_batch_size: PositiveInt = 64
    """Queries per request: searches that begin together travel together."""
    batch_wait_s: NonNegativeFloat = 0.002
    """How long a search waits for company."""
    max_query_chars: PositiveInt = 4096
    """A longer query is cut: the policy may write any, and no server should refuse it."""
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
        """The replicas, one at least."""
        return [self.url] if isinstance(self.url, str) else list(self.url)
