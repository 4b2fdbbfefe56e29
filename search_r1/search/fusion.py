"""Engines made of engines: reciprocal-rank fusion of two, and a cross-encoder on top of any."""

from collections.abc import Sequence
from typing import Any

from search_r1.search.engine import EngineError, Hits, Retriever
from search_r1.search.manifest import CorpusError

RRF_K = 60  # Cormack, Clarke and Büttcher, SIGIR 2009
FUSION_DEPTH = 100


class Hybrid:
    """Fuses the rankings of engines: the score of a document is the sum of 1 / (60 + rank)."""

    name = "hybrid"

    def __init__(self, retrievers: Sequence[Retriever]) -> None:
        self.retrievers = retrievers

    def __len__(self) -> int:
        return max(len(retriever) for retriever in self.retrievers)

    def search(self, queries: Sequence[str], topk: int) -> list[Hits | EngineError]:
        found = [
            retriever.search(queries, max(topk, FUSION_DEPTH)) for retriever in self.retrievers
        ]
        return [fuse(rankings, topk) for rankings in zip(*found, strict=True)]


def fuse(rankings: Sequence[Hits | EngineError], topk: int) -> Hits | EngineError:
    """One ranking of several; ties go to the earlier engine. A failed one fails the query."""
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
    """Lets a cross-encoder order the first `depth` passages of another engine."""

    def __init__(
        self,
        retriever: Retriever,
        model: str,
        depth: int = 20,
        batch_size: int = 32,
        device: str | None = None,
    ) -> None:
        """Raises CorpusError when the model cannot be loaded."""
        from sentence_transformers import CrossEncoder

        try:
            self.model: Any = CrossEncoder(model, device=device)
        except (OSError, ValueError) as error:
            raise CorpusError(f"--reranker {model}: {error}") from error
        self.retriever = retriever
        self.depth = depth
        self.batch_size = batch_size
        self.name = f"{retriever.name}+reranker"

    def __len__(self) -> int:
        return len(self.retriever)

    def search(self, queries: Sequence[str], topk: int) -> list[Hits | EngineError]:
        """Scores are the cross-encoder's; the pairs of all queries go through it together."""
        found = self.retriever.search(queries, max(topk, self.depth))
        pairs = [
            (query, document["contents"])
            for query, hits in zip(queries, found, strict=True)
            if not isinstance(hits, EngineError)
            for document, _ in hits
        ]
        scores = iter(
            self.model.predict(pairs, batch_size=self.batch_size, show_progress_bar=False)
            if pairs
            else []
        )
        return [
            hits
            if isinstance(hits, EngineError)
            else rerank(hits, [float(next(scores)) for _ in hits], topk)
            for hits in found
        ]


def rerank(hits: Hits, scores: Sequence[float], topk: int) -> Hits:
    """The hits by their new scores; equal ones stay in order."""
    order = sorted(range(len(hits)), key=lambda i: -scores[i])[:topk]
    return [(hits[i][0], scores[i]) for i in order]
