"""The client of a retrieval server, for the agent that searches."""

from search_r1.search.client.answers import Passage
from search_r1.search.client.client import (
    RetrievalClient,
    check_documents,
    check_noise,
    check_server,
)
from search_r1.search.client.config import RetrieverConfig
from search_r1.search.client.errors import SearchError

__all__ = [
    "Passage",
    "RetrievalClient",
    "RetrieverConfig",
    "SearchError",
    "check_documents",
    "check_noise",
    "check_server",
]
