"""How a client talks to a retrieval server. Imports nothing but pydantic: the retrieval side runs alone."""

from pydantic import BaseModel, ConfigDict, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt


class RetrieverConfig(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    url: str = "http://127.0.0.1:8000/retrieve"
    """Address of the server's /retrieve."""
    topk: PositiveInt = 3
    """Passages per query."""
    timeout_s: PositiveFloat = 60.0
    """Seconds that a search may take with all its attempts; then it has failed."""
    max_retries: NonNegativeInt = 8
    """Further attempts after connection errors, time-outs, and answers 429 and 5xx."""
    backoff_s: NonNegativeFloat = 0.2
    """Wait before the first further attempt; doubled each time, with jitter."""
    max_batch_size: PositiveInt = 64
    """Queries per request: searches that begin together travel together."""
    batch_wait_s: NonNegativeFloat = 0.002
    """How long a search waits for company."""
