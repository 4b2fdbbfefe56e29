"""Text encoders: any sentence-transformers model, with the prefixes of its family."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from search_r1.search.errors import RetrieverError

FAMILIES = {
    "e5": ("query: ", "passage: "),
    "bge": ("Represent this sentence for searching relevant passages: ", ""),
}
"""Prefixes of queries and of passages, for models whose files name no prompts (Wang et al.
2212.03533, Xiao et al. 2309.07597)."""
QUERY_PROMPTS = ("query", "s2p_query", "web_search_query")
PASSAGE_PROMPTS = ("passage", "document", "corpus")
DEFAULT_MODELS = {"e5": "intfloat/e5-base-v2", "bge": "BAAI/bge-base-en-v1.5"}


class Encoder:
    """Encodes queries and passages as vectors, float32 [n, dimension].

    The vectors have unit length, except those of dpr models.
    """

    def __init__(
        self,
        family: str,
        model: str | None,
        device: str | None = None,
        fp16: bool = False,
        max_length: int | None = None,
    ) -> None:
        """Loads the model, on a GPU if there is one and no `device` is named.

        Raises RetrieverError when no model is named or it cannot be loaded.
        """
        from sentence_transformers import SentenceTransformer

        path = model or DEFAULT_MODELS.get(family)
        if path is None:
            raise RetrieverError(
                f"--retriever_name {family} needs --retriever_model, a sentence-transformers "
                "encoder"
            )
        try:
            self.model: Any = SentenceTransformer(path, device=device)
        except (OSError, ValueError) as error:
            raise RetrieverError(f"--retriever_model {path}: {error}") from error
        if fp16:
            self.model.half()
        if max_length:
            self.model.max_seq_length = max_length
        self.name = path
        self.normalize = "dpr" not in path.lower()
        self.prefixes = prefixes(self.model.prompts, family, path)

    @property
    def dimension(self) -> int:
        return int(self.model.get_embedding_dimension())

    def encode_queries(self, texts: Sequence[str], batch_size: int = 64) -> np.ndarray:
        return self._encode(texts, self.prefixes[0], batch_size)

    def encode_passages(self, texts: Sequence[str], batch_size: int = 64) -> np.ndarray:
        return self._encode(texts, self.prefixes[1], batch_size)

    def _encode(self, texts: Sequence[str], prefix: str, batch_size: int) -> np.ndarray:
        vectors = self.model.encode(
            list(texts),
            prompt=prefix or None,
            batch_size=batch_size,
            normalize_embeddings=self.normalize,
            convert_to_numpy=True,
            show_progress_bar=False,
        )
        return np.ascontiguousarray(vectors, dtype=np.float32)


def prefixes(prompts: dict[str, str], family: str, path: str) -> tuple[str, str]:
    """The prefixes of queries and of passages: the model's own prompts, or else its family's."""
    query = first_prompt(prompts, QUERY_PROMPTS)
    passage = first_prompt(prompts, PASSAGE_PROMPTS)
    if query or passage:
        return query, passage
    for name, of_family in FAMILIES.items():
        if name == family or f"{name}-" in path.lower():
            return of_family
    return "", ""


def first_prompt(prompts: dict[str, str], names: Sequence[str]) -> str:
    """The first of the named prompts that the model has; empty if it has none."""
    return next((prompts[name] for name in names if prompts.get(name)), "")
