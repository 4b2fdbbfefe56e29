"""Text encoders: any sentence-transformers model, with the prefixes its family was trained with."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from search_r1.search.manifest import CorpusError

# (query, passage), used where the model's own files name no prompts: Wang et al. 2212.03533, Xiao
# et al. 2309.07597
FAMILIES = {
    "e5": ("query: ", "passage: "),
    "bge": ("Represent this sentence for searching relevant passages: ", ""),
}
QUERY_PROMPTS = ("query", "s2p_query", "web_search_query")
PASSAGE_PROMPTS = ("passage", "document", "corpus")
DEFAULT_MODELS = {"e5": "intfloat/e5-base-v2", "bge": "BAAI/bge-base-en-v1.5"}


class Encoder:
    """`encode_queries` and `encode_passages`: unit vectors, float32 [n, dimension] (dpr models: not
    normalised)."""

    def __init__(
        self,
        family: str,
        model: str | None,
        device: str | None = None,
        fp16: bool = False,
        max_length: int | None = None,
    ) -> None:
        """`device` None: a GPU where there is one. Raises CorpusError when no model is named or it
        cannot be loaded."""
        from sentence_transformers import SentenceTransformer

        path = model or DEFAULT_MODELS.get(family)
        if path is None:
            raise CorpusError(
                f"--retriever_name {family} needs --retriever_model, a sentence-transformers "
                "encoder"
            )
        try:
            self.model: Any = SentenceTransformer(path, device=device)
        except (OSError, ValueError) as error:
            raise CorpusError(f"--retriever_model {path}: {error}") from error
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
    """What goes before queries and passages: the model's own prompts where it has some, else its
    family's."""
    of_model = [
        next((prompts[n] for n in names if prompts.get(n)), "")
        for names in (QUERY_PROMPTS, PASSAGE_PROMPTS)
    ]
    if any(of_model):
        return of_model[0], of_model[1]
    named = next((f for f in FAMILIES if f == family or f"{f}-" in path.lower()), None)
    return FAMILIES[named] if named else ("", "")
