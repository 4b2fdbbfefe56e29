"""BM25 without a JVM, as Lucene and Anserini compute it, on a memory-mapped bm25s index.

Anserini's English analysis (Unicode words, possessives, 33 stop words, Porter's stemmer), k1 = 0.9, b = 0.4, and the
one-byte document lengths of Lucene, so that scores and ranking agree (docs/results/retrieval.md has how closely).
"""

import os
import re
import shutil
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import bm25s
import numpy as np
import regex
import Stemmer
from bm25s.stopwords import STOPWORDS_EN

from search_r1.search.corpus import Corpus, CorpusReader
from search_r1.search.engine import Hits
from search_r1.search.manifest import CorpusError, building, read_manifest, write_manifest

K1, B = 0.9, 0.4
NAME = "bm25"
BLOCK = 20_000_000
"""Postings that are sorted at a time: bounds the memory of a build."""
MAX_KEPT_STEMS = 1 << 21

# Word boundaries of Unicode's annex 29, as far as they matter: letters are joined by . : ' and figures by . , ; '
ASCII_WORD = re.compile(r"(?:\w|(?<=[A-Za-z])[.:'](?=[A-Za-z])|(?<=\d)[.,;'](?=\d))+", re.ASCII)
WORD = regex.compile(
    r"[\p{Han}\p{Hiragana}]"
    r"|(?:[\p{L}\p{Nd}\p{M}\p{Cf}_--[\p{Han}\p{Hiragana}]]"
    r"|(?<=[\p{L}\p{M}])[.:'·’‘](?=\p{L})|(?<=\p{Nd})[.,;'’‘](?=\p{Nd}))+",
    regex.VERSION1,
)
POSSESSIVE = re.compile(r"['’＇][sS]$")
STOP_WORDS = frozenset(STOPWORDS_EN)
HAS_SYLLABLE = re.compile(r"[aeiou][^aeiou]|[^aeiou]y[^aeiou]")  # Porter's m > 0


class Analyzer(dict[str, str | None]):
    """`analyzer(text)`: the stems of its words. Every word is stemmed once."""

    def __init__(self) -> None:
        self.stemmer = Stemmer.Stemmer("porter")

    def __call__(self, text: str) -> list[str]:
        words = (ASCII_WORD if text.isascii() else WORD).findall(text)
        return [stem for word in words if (stem := self[word]) is not None]

    def __missing__(self, word: str) -> str | None:
        """The stem of a word, None for a stop word."""
        plain = POSSESSIVE.sub("", word).replace("İ", "I").lower()
        stem = None if plain in STOP_WORDS else self.stem(plain)
        if len(self) < MAX_KEPT_STEMS:
            self[word] = stem
        return stem

    def stem(self, word: str) -> str:
        """Porter's stem with the two endings that Lucene, following Porter's own programs, treats otherwise."""
        if len(word) < 3:
            return word
        stem = self.stemmer.stemWord(word)
        if stem.endswith("logi") and HAS_SYLLABLE.search(stem[:-4]):
            return stem[:-1]
        if stem.endswith("bli") and HAS_SYLLABLE.search(stem[:-3]):
            long = stem.endswith("ibli") and len(HAS_SYLLABLE.findall(stem[:-4])) > 1
            return stem[:-4] if long else stem[:-1]
        return stem


class Postings:
    """Occurrences of terms, gathered document by document, spilt to disk in sorted blocks."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.vocabulary, self.lengths = folder, dict[str, int](), array("i")
        self.terms, self.documents, self.counts = array("i"), array("i"), array("H")
        self.blocks = 0

    def add(self, stems: list[str]) -> None:
        """The next document."""
        number = len(self.lengths)
        self.lengths.append(len(stems))
        counts: dict[int, int] = {}
        for stem in stems:
            term = self.vocabulary.setdefault(stem, len(self.vocabulary))
            counts[term] = counts.get(term, 0) + 1
        self.terms.extend(counts)
        self.documents.extend([number] * len(counts))
        self.counts.extend(min(n, 65535) for n in counts.values())
        if len(self.terms) >= BLOCK:
            self.spill()

    def spill(self) -> None:
        """Writes what was gathered, sorted by term; documents stay in order within a term."""
        terms = np.frombuffer(self.terms, dtype=np.int32)
        order = np.argsort(terms, kind="stable")
        for name, values in {"terms": terms, "documents": self.documents, "counts": self.counts}.items():
            np.save(self._path(name, self.blocks), np.asarray(values)[order])
        self.terms, self.documents, self.counts = array("i"), array("i"), array("H")
        self.blocks += 1

    def _path(self, name: str, block: int) -> Path:
        return self.folder / f"{name}.{block}.npy"

    def _allocate(self, name: str, kind: str, count: int) -> np.ndarray:
        """An array in a mapped file whose disk space is taken now: a full disk would kill the process later."""
        path = self.folder / f"{name}.npy"
        array = np.lib.format.open_memmap(path, "w+", np.dtype(kind), (count,))
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        return array

    def columns(self, score: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]) -> dict[str, Any]:
        """The sparse matrix, a column a term; `score` gets count, document frequency and document of each posting."""
        if self.terms:
            self.spill()
        frequency = np.zeros(len(self.vocabulary), dtype=np.int64)
        for block in range(self.blocks):
            frequency += np.bincount(np.load(self._path("terms", block)), minlength=len(frequency))
        starts = np.concatenate([[0], np.cumsum(frequency)])
        total, filled = int(starts[-1]), starts[:-1].copy()
        data, indices = (self._allocate(name, kind, total) for name, kind in (("data", "f4"), ("indices", "i4")))
        for block in range(self.blocks):
            terms, documents, counts = (np.load(self._path(n, block)) for n in ("terms", "documents", "counts"))
            first = np.flatnonzero(np.diff(terms, prepend=-1))
            rank = np.arange(len(terms)) - np.repeat(first, np.diff(first, append=len(terms)))
            place = filled[terms] + rank
            data[place] = score(counts, frequency[terms], documents)
            indices[place] = documents
            filled += np.bincount(terms, minlength=len(frequency))
        return {"data": data, "indices": indices, "indptr": starts, "num_docs": len(self.lengths)}


def lucene_lengths(lengths: np.ndarray) -> np.ndarray:
    """Document lengths as Lucene's one-byte norms keep them: exact below 40, then four significant bits."""
    excess = np.maximum(lengths - 24, 0).astype(np.int64)
    shift = np.maximum(np.frexp(excess.astype(np.float64))[1] - 4, 0)
    return np.where(lengths < 24, lengths, 24 + (excess >> shift << shift)).astype(np.float32)


def build(reader: CorpusReader | Path, index: Path) -> int:
    """Writes the index of a corpus to `index`, whole or not at all; returns the number of documents."""
    reader = reader if isinstance(reader, CorpusReader) else CorpusReader(reader)
    with building(index) as folder:
        scratch = folder / "scratch"
        scratch.mkdir()
        postings, analyze = Postings(scratch), Analyzer()
        for document in reader.store(folder):
            postings.add(analyze(document["contents"]))
        engine = bm25s.BM25(method="lucene", k1=K1, b=B)
        engine.scores = postings.columns(scorer(np.frombuffer(postings.lengths, dtype=np.int32)))
        engine.vocab_dict = postings.vocabulary
        engine.nonoccurrence_array = None  # which only BM25L and BM25+ have
        engine.save(folder, show_progress=False)
        shutil.rmtree(scratch)
        count = len(postings.lengths)
        write_manifest(folder, engine=NAME, parameters={"k1": K1, "b": B}, corpus=reader.fingerprint(), documents=count)
    return count


def scorer(lengths: np.ndarray) -> Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]:
    """Lucene's BM25: log(1 + (N - n + .5) / (n + .5)) * tf / (tf + k1 (1 - b + b length / average))."""
    average = lengths.mean(dtype=np.float64)
    norms = (K1 * (1 - B + B * lucene_lengths(lengths) / average)).astype(np.float32)

    def score(counts: np.ndarray, frequency: np.ndarray, documents: np.ndarray) -> np.ndarray:
        idf = np.log1p((len(lengths) - frequency + 0.5) / (frequency + 0.5)).astype(np.float32)
        return idf - idf / (1 + counts.astype(np.float32) / norms[documents])

    return score


class BM25Retriever:
    """An index and its corpus, both mapped into memory."""

    name = NAME

    def __init__(self, index: Path, corpus: Path | None) -> None:
        """Raises CorpusError when there is no index, it is damaged, or it is not of this corpus."""
        try:
            manifest = read_manifest(index)
        except CorpusError as error:
            cure = f"python -m search_r1.search.index_builder --retrieval_method bm25 --corpus_path {corpus} --save_dir"
            raise CorpusError(f"{error}; build it: {cure} {index.parent}") from error
        self.corpus = Corpus.of_index(index, manifest, corpus)
        self.engine = bm25s.BM25.load(index, mmap=True)
        self.analyze = Analyzer()

    def __len__(self) -> int:
        return len(self.corpus)

    def search(self, queries: Sequence[str], topk: int) -> list[Hits]:
        """The best `topk` documents of each query with their scores; fewer where fewer share a word with it."""
        return [[(self.corpus[i], score) for i, score in self.rank(query, topk)] for query in queries]

    def rank(self, query: str, topk: int) -> list[tuple[int, float]]:
        """(place in the corpus, score), best first; ties in the order of the corpus."""
        ids = self.engine.get_tokens_ids(self.analyze(query))
        if not ids:  # stop words, marks, words that no document has
            return []
        scores: Any = self.engine.get_scores_from_ids(ids)
        candidates = np.flatnonzero(scores >= max(bound_of_best(scores, topk), np.finfo(np.float32).tiny))
        best = candidates[np.argsort(-scores[candidates], kind="stable")][:topk]
        return [(int(i), float(scores[i])) for i in best]


def bound_of_best(scores: np.ndarray, topk: int, groups: int = 64) -> float:
    """A score that at least `topk` documents reach: the topk-th among the best of each slice.

    Partitioning the scores themselves takes ten times as long: nearly all of them are zero.
    """
    width = len(scores) // groups
    if width <= topk:
        return 0.0
    best = scores[: groups * width].reshape(groups, width).max(axis=0)
    return float(np.partition(best, -topk)[-topk])
