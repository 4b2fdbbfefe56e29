"""BM25 without a JVM: bm25s with Lucene's formula, k1 = 0.9 and b = 0.4, English stop words and stemming."""

import json
import shutil
from pathlib import Path
from typing import Any

import bm25s
import numpy as np
import Stemmer

from search_r1.search.corpus import FINGERPRINT, OFFSETS, Corpus, CorpusError, fingerprint, read_documents
from search_r1.search.engine import Hits

K1, B = 0.9, 0.4


def tokenize(texts: list[str], show_progress: bool = False) -> list[list[str]]:
    """Stemmed words of each text."""
    tokens = bm25s.tokenize(
        texts, stopwords="en", stemmer=Stemmer.Stemmer("english"), return_ids=False, show_progress=show_progress
    )
    return tokens  # pyright: ignore[reportReturnType]


def build(corpus_path: Path, index: Path) -> int:
    """Writes the index of a corpus to `index`, whole or not at all; returns the number of documents."""
    offsets, texts = [], []
    for offset, document in read_documents(corpus_path):
        offsets.append(offset)
        texts.append(document["contents"])
    engine = bm25s.BM25(method="lucene", k1=K1, b=B)
    engine.index(tokenize(texts, show_progress=True), show_progress=True)
    pending = index.with_name(index.name + ".tmp")
    shutil.rmtree(pending, ignore_errors=True)
    engine.save(pending)
    np.save(pending / OFFSETS, np.array(offsets, dtype=np.int64))
    (pending / FINGERPRINT).write_text(json.dumps(fingerprint(corpus_path)))
    shutil.rmtree(index, ignore_errors=True)
    pending.rename(index)
    return len(offsets)


def is_built(corpus_path: Path, index: Path) -> bool:
    """Whether `index` is a complete index of this very corpus."""
    mark = index / FINGERPRINT
    return mark.exists() and corpus_path.is_file() and json.loads(mark.read_text()) == fingerprint(corpus_path)


class BM25Retriever:
    """An index and its corpus, both mapped into memory."""

    name = "bm25"

    def __init__(self, index: Path, corpus_path: Path) -> None:
        """Raises CorpusError when there is no index, or it is not of this corpus."""
        if not (index / FINGERPRINT).exists():
            raise CorpusError(
                f"{index}: no BM25 index; build it: python -m search_r1.search.index_builder --retrieval_method bm25 "
                f"--corpus_path {corpus_path} --save_dir {index.parent}"
            )
        self.corpus = Corpus(corpus_path, index)
        self.engine = bm25s.BM25.load(index, mmap=True)

    def __len__(self) -> int:
        return len(self.corpus)

    def search(self, queries: list[str], topk: int) -> list[Hits]:
        """The best `topk` documents of each query with their scores; fewer where fewer share a word with it."""
        return [self._search(tokens, min(topk, len(self.corpus))) for tokens in tokenize(queries)]

    def _search(self, tokens: list[str], topk: int) -> Hits:
        if not tokens:  # a query of stop words or marks alone
            return []
        scores: Any = self.engine.get_scores(tokens)
        if topk < len(scores):
            threshold = np.partition(scores, -topk)[-topk]
            candidates = np.flatnonzero(scores >= max(threshold, np.finfo(np.float32).tiny))
        else:
            candidates = np.flatnonzero(scores > 0)
        best = candidates[np.argsort(-scores[candidates], kind="stable")][:topk]  # ties in the order of the corpus
        return [(self.corpus[int(i)], float(scores[i])) for i in best]
