"""The BM25 engine: builds an index of a corpus and searches it.

It uses Anserini's English analysis, k1 = 0.9, b = 0.4, and Lucene's one-byte document lengths and
32-bit arithmetic, so that scores and ranking agree with Lucene's (docs/results/retrieval.md has how
closely). Postings are mapped into memory, and most of them are skipped.
"""

import os
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from search_r1.search.engine import Hits
from search_r1.search.engines.bm25.analysis import Analyzer
from search_r1.search.engines.bm25.arrays import Query, new_query
from search_r1.search.engines.bm25.expansions import Expansions
from search_r1.search.engines.bm25.postings import K1, B, Gatherer
from search_r1.search.errors import CorpusError
from search_r1.search.index.corpus import Corpus
from search_r1.search.index.files import building
from search_r1.search.index.manifest import read_manifest, write_manifest
from search_r1.search.index.reader import CorpusReader

NAME = "bm25"
PARAMETERS = {"k1": K1, "b": B, "format": 3}
"""The version of the files, in the manifest. An index of another format cannot be read."""
DOCUMENT_EXPANSION = "document_expansion"
"""Entry of the manifest of an index whose documents were expanded."""
QUERIES_PER_THREAD = 8
"""The least queries per thread; fewer are searched faster without a further thread."""

Ranking = list[tuple[int, float]]
"""(position in the corpus, score), best first; ties in the order of the corpus."""


def build(reader: CorpusReader | Path, index: Path, expansions: Expansions | None = None) -> int:
    """Writes the index of a corpus, whole or not at all; returns the number of documents.

    With `expansions` their words are added to the documents. Raises CorpusError when they name a
    document that the corpus lacks.
    """
    # numba takes half a second to import
    from search_r1.search.engines.bm25.index import write_index

    reader = reader if isinstance(reader, CorpusReader) else CorpusReader(reader)
    with building(index) as folder:
        scratch = folder / "scratch"
        scratch.mkdir()
        own_weight = expansions.own_weight if expansions else 1
        gathered = Gatherer(scratch, own_weight, expands=expansions is not None)
        analyze = Analyzer()
        for document in reader.store(folder):
            added = analyze(expansions.take(document["id"])) if expansions else []
            gathered.add(analyze(document["contents"]), added)
        if expansions:
            expansions.check_all_taken(reader.source)
        write_index(gathered, folder)
        shutil.rmtree(scratch)
        count = len(gathered.lengths)
        Scorer(folder, count, threads=1)  # compiles on a new machine, so that servers start fast
        write_manifest(
            folder,
            engine=NAME,
            parameters=PARAMETERS,
            corpus=reader.fingerprint(),
            documents=count,
            **described(expansions),
        )
    return count


def described(expansions: Expansions | None) -> dict[str, Any]:
    """What the manifest of an index says of its expansions: nothing where there are none."""
    return {DOCUMENT_EXPANSION: expansions.description} if expansions else {}


def document_expansion(manifest: dict[str, Any]) -> dict[str, Any]:
    """The part of a manifest that `described` wrote."""
    return {key: manifest[key] for key in (DOCUMENT_EXPANSION,) if key in manifest}


class BM25Retriever:
    """An index and its corpus, both mapped into memory."""

    name = NAME

    def __init__(self, index: Path, corpus: Path | None, threads: int | None = None) -> None:
        """Loads an index. `threads` share a batch of queries, by default one thread for each core.

        Raises CorpusError when there is no index, it is damaged, of another format, or not of this
        corpus.
        """
        cure = (
            "python -m search_r1.search.index_builder --retrieval_method bm25 --corpus_path "
            f"{corpus} --save_dir"
        )
        try:
            manifest = read_manifest(index)
        except CorpusError as error:
            raise CorpusError(f"{error}; build it: {cure} {index.parent}") from error
        if manifest.get("parameters") != PARAMETERS:
            raise CorpusError(
                f"{index}: an index of an older format; build it again: {cure} {index.parent}"
            )
        self.corpus = Corpus.of_index(index, manifest, corpus)
        self.fingerprint = manifest["corpus"]
        self.settings = document_expansion(manifest)
        self.analyze = Analyzer()
        self.scorer = Scorer(index, len(self.corpus), threads or os.cpu_count() or 1)

    def __len__(self) -> int:
        return len(self.corpus)

    def search(self, queries: Sequence[str], topk: int) -> list[Hits]:
        """The best `topk` documents of each query with their scores.

        There are fewer if fewer documents share a word with the query.
        """
        rankings = self.scorer.rank([self.analyze(query) for query in queries], topk)
        return [self.to_hits(ranking) for ranking in rankings]

    def is_rare(self, word: int, max_df: float) -> bool:
        """Whether no more than the share `max_df` of the documents has a word, by its number."""
        return self.scorer.frequency(word) <= max_df * len(self)

    def words_at(self, position: int) -> list[int]:
        """The numbers of the words of a document's own text, in their order."""
        stems = self.analyze(self.corpus[position]["contents"])
        return [self.scorer.vocabulary[stem] for stem in stems]

    def to_hits(self, ranking: Ranking) -> Hits:
        """The documents of a ranking with their scores."""
        return [(self.corpus[position], score) for position, score in ranking]

    def rank(self, query: str, topk: int) -> Ranking:
        """The positions and scores of the best `topk` documents of one query."""
        return self.scorer.rank([self.analyze(query)], topk)[0]


class Scorer:
    """Ranks documents by the postings of an index. It is called from one thread at a time."""

    def __init__(self, index: Path, documents: int, threads: int) -> None:
        from search_r1.search.engines.bm25.index import Vocabulary, new_room, read_postings
        from search_r1.search.engines.bm25.score import rank_batch

        self.rank_batch = rank_batch
        self.documents = documents
        self.threads = threads
        self.vocabulary = Vocabulary(index)
        self.idf = np.load(index / "idf.npy")
        self.postings = read_postings(index)
        self.rooms = [new_room(self.postings) for _ in range(threads)]
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix="bm25")
        self.rank([], 1)  # compiles, or loads what was compiled

    def rank(self, queries: Sequence[list[str]], topk: int) -> list[Ranking]:
        """Ranks the best documents of each query, which is a list of index terms."""
        return self.rank_words([self.words_of(query) for query in queries], topk)

    def rank_words(self, words: Sequence[Mapping[int, float]], topk: int) -> list[Ranking]:
        """Ranks the best documents of each query, which has a weight for each word's number."""
        parts = max(1, min(self.threads, len(words) // QUERIES_PER_THREAD))
        if parts == 1:
            return self.rank_part(words, topk, 0)
        bounds = [len(words) * i // parts for i in range(parts + 1)]
        shares = [words[low:high] for low, high in pairwise(bounds)]
        rankings = self.pool.map(self.rank_part, shares, [topk] * parts, range(parts))
        return [ranking for share in rankings for ranking in share]

    def words_of(self, query: list[str]) -> dict[int, int]:
        """The occurrences of each known word in a query, by the number of the word."""
        counts: dict[int, int] = {}
        for stem in query:
            number = self.vocabulary[stem]
            if number >= 0:
                counts[number] = counts.get(number, 0) + 1
        return counts

    def frequency(self, word: int) -> int:
        """The number of documents that have a word."""
        starts = self.postings.starts
        return int(starts[word + 1] - starts[word])

    def rank_part(
        self, queries: Sequence[Mapping[int, float]], topk: int, room: int
    ) -> list[Ranking]:
        """Ranks some queries in the calling thread, with the working memory number `room`."""
        words, starts = self.weighted(queries)
        kept = min(topk, self.documents)
        scores = np.zeros((len(queries), kept), dtype=np.float32)
        documents = np.zeros((len(queries), kept), dtype=np.int32)
        counts = np.zeros(len(queries), dtype=np.int64)
        self.rank_batch(self.postings, words, starts, self.rooms[room], scores, documents, counts)
        return [
            list(zip(documents[i, :n].tolist(), scores[i, :n].tolist(), strict=True))
            for i, n in enumerate(counts.tolist())
        ]

    def weighted(self, queries: Sequence[Mapping[int, float]]) -> tuple[Query, np.ndarray]:
        """The words of the queries, those of each query ordered by what they can add to a score.

        Returns them with the position of each query's first word, int64 [queries + 1].
        """
        lengths = [len(query) for query in queries]
        starts = np.zeros(len(queries) + 1, dtype=np.int64)
        np.cumsum(lengths, out=starts[1:])
        terms = np.array([term for query in queries for term in query], dtype=np.int32)
        occurrences = np.array(
            [count for query in queries for count in query.values()], dtype=np.float32
        )
        weights = self.idf[terms] * occurrences
        most = weights * self.postings.best_levels[terms]
        query_numbers = np.repeat(np.arange(len(queries)), lengths)
        order = np.lexsort((-most, query_numbers))
        return new_query(terms[order], weights[order]), starts
