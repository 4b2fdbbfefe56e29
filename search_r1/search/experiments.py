"""Engines for experiments and tests: gold passages, random ones, none, spoilt ones; recorded and
replayed searches."""

import json
import random
from collections.abc import Sequence
from hashlib import blake2b
from math import exp, log
from pathlib import Path

from search_r1.search.bm25 import BM25Retriever
from search_r1.search.corpus import Corpus
from search_r1.search.engine import EngineError, Hits, Retriever
from search_r1.search.manifest import CorpusError

P99 = 2.3263  # 99 % quantile of the standard normal distribution


class Latency:
    """Log-normal delays: `median_ms` and 99 % quantile `p99_ms`."""

    def __init__(self, median_ms: float, p99_ms: float, seed: int = 0) -> None:
        self.mu = log(median_ms / 1000)
        self.sigma = log(p99_ms / median_ms) / P99
        self.rng = random.Random(seed)

    def draw(self) -> float:
        """Seconds."""
        return exp(self.rng.gauss(self.mu, self.sigma))


def rng_of(query: str, seed: int) -> random.Random:
    """The same for the same query, whatever was asked before it."""
    return random.Random(
        blake2b(f"{seed}\n{query}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    )


class Empty:
    """Finds nothing."""

    name = "empty"

    def __len__(self) -> int:
        return 0

    def search(self, queries: Sequence[str], topk: int) -> list[Hits]:
        return [[] for _ in queries]


class Random:
    """Any passages, the same ones for the same query."""

    name = "random"

    def __init__(self, corpus: Corpus, seed: int = 0) -> None:
        self.corpus = corpus
        self.seed = seed

    def __len__(self) -> int:
        return len(self.corpus)

    def search(self, queries: Sequence[str], topk: int) -> list[Hits]:
        return [self.draw(rng_of(query, self.seed), topk) for query in queries]

    def draw(self, rng: random.Random, count: int) -> Hits:
        places = rng.sample(range(len(self.corpus)), min(count, len(self.corpus)))
        return [(self.corpus[i], 0.0) for i in places]


class Noisy:
    """Another engine, each of whose passages is replaced by a random one with probability
    `noise`."""

    name = "noisy"

    def __init__(self, retriever: Retriever, corpus: Corpus, noise: float, seed: int = 0) -> None:
        self.retriever = retriever
        self.random = Random(corpus, seed)
        self.noise = noise
        self.seed = seed

    def __len__(self) -> int:
        return len(self.retriever)

    def search(self, queries: Sequence[str], topk: int) -> list[Hits | EngineError]:
        found = self.retriever.search(queries, topk)
        return [
            hits if isinstance(hits, EngineError) else self.spoil(query, hits)
            for query, hits in zip(queries, found, strict=True)
        ]

    def spoil(self, query: str, hits: Hits) -> Hits:
        rng = rng_of(query, self.seed)
        return [
            (self.random.draw(rng, 1)[0][0], score) if rng.random() < self.noise else (d, score)
            for d, score in hits
        ]


class Oracle:
    """Searches gold passages alone.

    A query that is one of the questions gets that question's gold passages; any other the best gold
    passages of all questions, by BM25. Training questions are a parquet file with
    `extra_info.gold_ids`.
    """

    name = "oracle"
    DEPTH = 1000

    def __init__(self, bm25: BM25Retriever, questions: Path) -> None:
        """Raises CorpusError when the file has no gold ids, or names passages that the corpus does
        not have."""
        self.bm25 = bm25
        places = {str(bm25.corpus[i]["id"]): i for i in range(len(bm25))}
        self.gold: dict[str, list[int]] = {}
        for question, ids in read_gold(questions):
            if missing := [i for i in ids if i not in places]:
                raise CorpusError(
                    f"{questions}: gold passage {missing[0]!r} is not in {bm25.corpus.path}"
                )
            self.gold[question] = [places[i] for i in ids]
        self.all = {place for ids in self.gold.values() for place in ids}

    def __len__(self) -> int:
        return len(self.all)

    def search(self, queries: Sequence[str], topk: int) -> list[Hits]:
        return [self.find(query, topk) for query in queries]

    def find(self, query: str, topk: int) -> Hits:
        corpus = self.bm25.corpus
        if query in self.gold:
            return [(corpus[i], 1.0) for i in self.gold[query][:topk]]
        ranked = self.bm25.rank(query, self.DEPTH)
        return [(corpus[i], score) for i, score in ranked if i in self.all][:topk]


def read_gold(path: Path) -> list[tuple[str, list[str]]]:
    """(question, ids of its gold passages). Raises CorpusError when there are none."""
    import pyarrow.parquet as pq

    rows = pq.read_table(path).to_pylist()
    infos = [row.get("extra_info") or {} for row in rows]
    found = [
        (i["question"], [str(g) for g in i["gold_ids"]])
        for i in infos
        if i.get("gold_ids") and i.get("question")
    ]
    if not found:
        raise CorpusError(f"{path}: no row has extra_info.question and extra_info.gold_ids")
    return found


class Record:
    """Another engine; what it found is appended to a file that `Replay` serves."""

    def __init__(self, retriever: Retriever, path: Path) -> None:
        self.retriever = retriever
        self.name = retriever.name
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
    """What `Record` wrote, and nothing else: a query that was not recorded fails."""

    name = "replay"

    def __init__(self, path: Path) -> None:
        """Raises CorpusError when the file is missing or no recording."""
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
