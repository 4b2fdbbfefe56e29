"""Engines for experiments and tests: gold, random, replaced or no passages, and recordings."""

import json
import random
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from search_r1.search.engine import EngineError, Hits, Retriever, settings_of
from search_r1.search.engines.bm25 import BM25Retriever
from search_r1.search.errors import CorpusError
from search_r1.search.index.corpus import Corpus
from search_r1.search.noise import rng_of


class Empty:
    """An engine that finds nothing."""

    name = "empty"

    def __len__(self) -> int:
        return 0

    def search(self, queries: Sequence[str], topk: int) -> list[Hits]:
        return [[] for _ in queries]


class Random:
    """An engine that finds random passages, the same ones for the same query."""

    name = "random"

    def __init__(self, corpus: Corpus, seed: int = 0) -> None:
        self.corpus = corpus
        self.seed = seed

    def __len__(self) -> int:
        return len(self.corpus)

    def search(self, queries: Sequence[str], topk: int) -> list[Hits]:
        return [self.draw(rng_of(query, self.seed), topk) for query in queries]

    def draw(self, rng: random.Random, count: int) -> Hits:
        """Draws `count` different passages, with scores of 0."""
        positions = rng.sample(range(len(self.corpus)), min(count, len(self.corpus)))
        return [(self.corpus[i], 0.0) for i in positions]


class Noisy:
    """Searches with another engine, and spoils what it finds.

    The first `shuffled` passages are put into a random order, as an engine might that ranks badly,
    before the list is cut to the number that was asked for. Then each passage is replaced with
    probability `noise` by a random one. All of it is the same whenever the query is the same.
    """

    name = "noisy"

    def __init__(
        self, retriever: Retriever, corpus: Corpus, noise: float, seed: int = 0, shuffled: int = 1
    ) -> None:
        self.retriever = retriever
        self.settings = settings_of(retriever)
        self.random = Random(corpus, seed)
        self.noise = noise
        self.seed = seed
        self.shuffled = shuffled

    def __len__(self) -> int:
        return len(self.retriever)

    def search(self, queries: Sequence[str], topk: int) -> list[Hits | EngineError]:
        found = self.retriever.search(queries, max(topk, self.shuffled))
        return [
            hits
            if isinstance(hits, EngineError)
            else self.spoil(query, self.shuffle(query, hits)[:topk])
            for query, hits in zip(queries, found, strict=True)
        ]

    def shuffle(self, query: str, hits: Hits) -> Hits:
        """Puts the first `shuffled` passages into a random order; each keeps its score."""
        first = hits[: self.shuffled]
        rng_of(f"order of {query}", self.seed).shuffle(first)
        return first + hits[self.shuffled :]

    def spoil(self, query: str, hits: Hits) -> Hits:
        """Replaces the passages of some hits, which keep their scores."""
        rng = rng_of(query, self.seed)
        spoilt: Hits = []
        for document, score in hits:
            if rng.random() < self.noise:
                ((document, _),) = self.random.draw(rng, 1)
            spoilt.append((document, score))
        return spoilt


class Oracle:
    """An engine that finds only gold passages.

    A query that is one of the questions finds the gold passages of that question. Any other query
    finds the best ones by BM25 among the gold passages of all questions. The questions are in
    parquet files with `extra_info.gold_ids`.
    """

    name = "oracle"
    DEPTH = 1000
    """Number of passages that BM25 ranks; only the gold ones among them are kept."""

    def __init__(self, bm25: BM25Retriever, questions: Sequence[Path]) -> None:
        """Raises CorpusError when a file has no gold ids, or the corpus lacks one of them."""
        self.bm25 = bm25
        positions = {str(bm25.corpus[i]["id"]): i for i in range(len(bm25))}
        self.gold: dict[str, list[int]] = {}
        for path in questions:
            for question, ids in read_gold(path):
                if missing := [i for i in ids if i not in positions]:
                    raise CorpusError(
                        f"{path}: gold passage {missing[0]!r} is not in {bm25.corpus.path}"
                    )
                self.gold[question] = [positions[i] for i in ids]
        self.all = set(chain.from_iterable(self.gold.values()))

    def __len__(self) -> int:
        return len(self.all)

    def search(self, queries: Sequence[str], topk: int) -> list[Hits]:
        return [self.find(query, topk) for query in queries]

    def find(self, query: str, topk: int) -> Hits:
        """The gold passages for a query, best first."""
        corpus = self.bm25.corpus
        if query in self.gold:
            return [(corpus[i], 1.0) for i in self.gold[query][:topk]]
        ranked = self.bm25.rank(query, self.DEPTH)
        return [(corpus[i], score) for i, score in ranked if i in self.all][:topk]


def read_gold(path: Path) -> list[tuple[str, list[str]]]:
    """Reads (question, ids of its gold passages) from each row that has both.

    Raises CorpusError when there are none.
    """
    import pyarrow.parquet as pq

    found = list[tuple[str, list[str]]]()
    for row in pq.read_table(path).to_pylist():
        info = row.get("extra_info") or {}
        if info.get("gold_ids") and info.get("question"):
            found.append((info["question"], [str(id) for id in info["gold_ids"]]))
    if not found:
        raise CorpusError(f"{path}: no row has extra_info.question and extra_info.gold_ids")
    return found


class Record:
    """Searches with another engine, and appends what it finds to a file for `Replay`."""

    def __init__(self, retriever: Retriever, path: Path) -> None:
        self.retriever = retriever
        self.name = retriever.name
        self.settings = settings_of(retriever)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("a", encoding="utf-8")

    def __len__(self) -> int:
        return len(self.retriever)

    def search(self, queries: Sequence[str], topk: int) -> Sequence[Hits | EngineError]:
        found = self.retriever.search(queries, topk)
        for query, hits in zip(queries, found, strict=True):
            if not isinstance(hits, EngineError):
                self.file.write(json.dumps({"query": query, "topk": topk, "hits": hits}) + "\n")
        self.file.flush()
        return found


class Replay:
    """An engine that finds what `Record` wrote. A query that was not recorded fails."""

    name = "replay"

    def __init__(self, path: Path) -> None:
        """Reads a recording. Raises CorpusError when the file is missing or is not a recording."""
        self.found: dict[tuple[str, int], Hits] = {}
        if not path.is_file():
            raise CorpusError(f"{path}: no such recording")
        for number, line in enumerate(path.open(encoding="utf-8"), 1):
            try:
                row = json.loads(line)
                self.found[row["query"], row["topk"]] = [
                    (document, score) for document, score in row["hits"]
                ]
            except (ValueError, KeyError, TypeError) as error:
                raise CorpusError(
                    f"{path}, line {number}: not a recorded search ({error!r})"
                ) from error

    def __len__(self) -> int:
        return len(self.found)

    def search(self, queries: Sequence[str], topk: int) -> list[Hits | EngineError]:
        return [
            self.found.get((q, topk), EngineError(f"not recorded for topk {topk}: {q[:80]!r}"))
            for q in queries
        ]
