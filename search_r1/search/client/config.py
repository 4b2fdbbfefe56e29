"""Configures how a client talks to a retrieval server."""

import os
from typing import Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from search_r1.search.noise import NO_NOISE, Noise
from search_r1.search.schema import TOKEN


def authorization() -> dict[str, str]:
    """The header with the token from the environment; empty without one."""
    token = os.environ.get(TOKEN)
    return {"Authorization": f"Bearer {token}"} if token else {}


class NoiseConfig(BaseModel):
    """The share of searches that get passages which do not help, over the training (ZeroSearch)."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    start: float = Field(default=0.0, ge=0, le=1)
    """Share of the searches of a training that get passages which do not help, before its first
    step. Above 0, here or in `end` or `validation`, the server must be a simulated one."""
    end: float = Field(default=0.0, ge=0, le=1)
    """The same at training step `steps`, and after it."""
    base: float = Field(default=4.0, gt=0, allow_inf_nan=False)
    """How the share goes from `start` to `end`: above 1 slowly at first, below 1 fast at first."""
    steps: PositiveInt | None = None
    """Training steps from `start` to `end`. Needed where these differ."""
    validation: float = Field(default=0.0, ge=0, le=1)
    """The share in validation and evaluation."""

    @field_validator("base")
    @classmethod
    def _not_one(cls, base: float) -> float:
        if base == 1:
            raise ValueError(
                "must not be 1, by which the schedule would divide 0 by 0; 1.001 is nearly a line"
            )
        return base

    @model_validator(mode="after")
    def _steps_where_it_changes(self) -> Self:
        if self.start != self.end and self.steps is None:
            raise ValueError(
                f"steps: name the number of training steps in which the share goes from start="
                f"{self.start:g} to end={self.end:g}"
            )
        return self

    @property
    def is_on(self) -> bool:
        """Whether any search gets noise."""
        return max(self.start, self.end, self.validation) > 0

    def share_at(self, step: int | None) -> float:
        """The share p_i at training step i; None: outside of training.

        p_i = p_s + (b^(i/m) - 1) / (b - 1) * (p_e - p_s), and p_e after the last step m
        (ZeroSearch, arXiv 2505.04588), with p_s = `start`, p_e = `end`, b = `base`, m = `steps`.

        >>> noise = NoiseConfig(end=0.6, steps=10)
        >>> [round(noise.share_at(step), 6) for step in (0, 5, 10, 11, None)]
        [0.0, 0.2, 0.6, 0.6, 0.0]
        """
        if step is None:
            return self.validation
        if self.steps is None or step >= self.steps:
            return self.end
        gone = (self.base ** (step / self.steps) - 1) / (self.base - 1)
        return self.start + gone * (self.end - self.start)

    def at(self, step: int | None) -> Noise:
        """What a search asks for at a training step; None: outside of training.

        The noise of each step falls on other queries.
        """
        share = self.share_at(step)
        return Noise(share, step or 0) if share > 0 else NO_NOISE


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
    noise: NoiseConfig = NoiseConfig()

    @field_validator("url")
    @classmethod
    def _some_url(cls, url: str | list[str]) -> str | list[str]:
        urls = [url] if isinstance(url, str) else url
        if not url or not all(u.startswith(("http://", "https://")) for u in urls):
            raise ValueError("must be http(s)://HOST:PORT/retrieve, or a list of such")
        return url

    @model_validator(mode="after")
    def _no_result_of_another_step(self) -> Self:
        if self.cache_size and self.noise.is_on:
            raise ValueError(
                f"cache_size={self.cache_size} would answer with the noise of an earlier step: set "
                "it to 0 beside noise; the server keeps results by itself"
            )
        return self

    @property
    def urls(self) -> list[str]:
        """The addresses of the replicas, at least one."""
        return [self.url] if isinstance(self.url, str) else list(self.url)
