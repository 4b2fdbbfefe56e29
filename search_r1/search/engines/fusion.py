"""Engines that combine others: reciprocal-rank fusion, and a cross-encoder on top of an engine."""

from collections.abc import Sequence
from itertools import islice
from typing import Any

from search_r1.search.engine import EngineError, Hits, Retriever, settings_of
from search_r1.search.errors import RetrieverError

RRF_K = 60
"""The constant of reciprocal-rank fusion (Cormack, Clarke and Büttcher, SIGIR 2009)."""
FUSION_DEPTH = 100
"""Number of passages of each engine that are fused."""


class Hybrid:
    """Fuses the rankings of engines: the score of a document is the sum of 1 / (60 + rank)."""

    name = "hybrid"

    def __init__(self, retrievers: Sequence[Retriever]) -> None:
        self.retrievers = retrievers
        self.settings = {
            key: value for retriever in retrievers for key, value in settings_of(retriever).items()
        }

    def __len__(self) -> int:
        return max(len(retriever) for retriever in self.retrievers)

    def search(self, queries: Sequence[str], topk: int) -> list[Hits | EngineError]:
        found = [
            retriever.search(queries, max(topk, FUSION_DEPTH)) for retriever in self.retrievers
        ]
        return [fuse(rankings, topk) for rankings in zip(*found, strict=True)]


def fuse(rankings: Sequence[Hits | EngineError], topk: int) -> Hits | EngineError:
    """Fuses several rankings into one.

    Documents with equal scores stay in the order of the engines and their rankings. If an engine
    failed, the query fails.
    """
    documents: dict[str, dict[str, Any]] = {}
    scores: dict[str, float] = {}
    for hits in rankings:
        if isinstance(hits, EngineError):
            return hits
        for rank, (document, _) in enumerate(hits, 1):
            id = str(document["id"])
            documents.setdefault(id, document)
            scores[id] = scores.get(id, 0.0) + 1 / (RRF_K + rank)
    best = sorted(scores, key=lambda id: -scores[id])[:topk]
    return [(documents[id], scores[id]) for id in best]


class Reranker:
    """A cross-encoder that orders the first `depth` passages of another engine."""

    def __init__(
        self,
        retriever: Retriever,
        model: str,
        depth: int = 20,
        batch_size: int = 32,
        device: str | None = None,
    ) -> None:
        """Raises RetrieverError when the model cannot be loaded."""
        from sentence_transformers import CrossEncoder

        try:
            self.model: Any = CrossEncoder(model, device=device)
        except (OSError, ValueError) as error:
            raise RetrieverError(f"--reranker {model}: {error}") from error
        self.retriever = retriever
        self.depth = depth
        self.batch_size = batch_size
        self.name = f"{retriever.name}+reranker"
        self.settings = settings_of(retriever)

    def __len__(self) -> int:
        return len(self.retriever)

    def search(self, queries: Sequence[str], topk: int) -> list[Hits | EngineError]:
        """Searches, and ranks by the cross-encoder, which scores pairs of all queries together."""
        found = self.retriever.search(queries, max(topk, self.depth))
        pairs: list[tuple[str, str]] = []
        for query, hits in zip(queries, found, strict=True):
            if not isinstance(hits, EngineError):
                pairs += [(query, document["contents"]) for document, _ in hits]
        scores = iter(self.scores_of(pairs))
        ranked = list[Hits | EngineError]()
        for hits in found:
            if isinstance(hits, EngineError):
                ranked.append(hits)
            else:
                ranked.append(rerank(hits, list(islice(scores, len(hits))), topk))
        return ranked

    def scores_of(self, pairs: list[tuple[str, str]]) -> list[float]:
        """The cross-encoder's scores of pairs of a query and a passage."""
        if not pairs:
            return []
        scores = self.model.predict(pairs, batch_size=self.batch_size, show_progress_bar=False)
        return [float(score) for score in scores]


def rerank(hits: Hits, scores: Sequence[float], topk: int) -> Hits:
    """The best `topk` hits by their new scores; hits with equal scores stay in order."""
    order = sorted(range(len(hits)), key=lambda i: -scores[i])[:topk]
    return [(hits[i][0], scores[i]) for i in order]
