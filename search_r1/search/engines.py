"""From flags to an engine. An engine of your own: docs/retriever.md."""

import argparse
from collections.abc import Callable
from pathlib import Path

from search_r1.search.bm25 import BM25Retriever
from search_r1.search.corpus import Corpus
from search_r1.search.engine import Retriever
from search_r1.search.experiments import Empty, Noisy, Oracle, Random, Record, Replay
from search_r1.search.extras import require
from search_r1.search.lucene import LuceneRetriever, is_lucene_index
from search_r1.search.manifest import CorpusError

DENSE = ("e5", "bge", "dense")
INDEXED = ("bm25", "lucene", *DENSE)
EXPERIMENTS = ("oracle", "random", "empty", "noisy", "replay")
ENGINES = (*INDEXED, "hybrid", *EXPERIMENTS)


def load(args: argparse.Namespace) -> Retriever:
    """The engine that the flags describe, loaded. Raises CorpusError naming what is missing,
    damaged or of no use."""
    name = args.retriever_name
    if name in INDEXED:
        retriever = indexed(name, one_index(args), args)
    elif name == "hybrid":
        retriever = hybrid(args)
    else:
        retriever = EXPERIMENT_LOADERS[name](args)
    if args.reranker:
        require("dense", "--reranker")
        from search_r1.search.fusion import Reranker

        retriever = Reranker(
            retriever, args.reranker, args.rerank_depth, args.batch_size, args.device
        )
    return Record(retriever, args.record) if args.record else retriever


def indexed(name: str, index: Path, args: argparse.Namespace) -> Retriever:
    """An engine with an index. A Lucene index is served by Lucene, whichever BM25 was named."""
    if name == "lucene" or (name == "bm25" and is_lucene_index(index)):
        return LuceneRetriever(index, args.corpus_path, args.threads)
    if name == "bm25":
        return BM25Retriever(index, args.corpus_path, args.threads)
    require("dense", f"--retriever_name {name}")
    from search_r1.search.dense import DenseRetriever
    from search_r1.search.encoder import Encoder

    encoder = Encoder(name, args.retriever_model, args.device, args.use_fp16, args.max_length)
    return DenseRetriever(
        index, args.corpus_path, encoder, name, args.faiss_gpu, args.nprobe, args.ef_search
    )


def hybrid(args: argparse.Namespace) -> Retriever:
    """Two engines, each with its index."""
    from search_r1.search.fusion import Hybrid

    if len(args.hybrid_of) != len(args.index_path):
        raise CorpusError(
            f"--hybrid_of names {len(args.hybrid_of)} engines, --index_path {len(args.index_path)} "
            "indexes"
        )
    return Hybrid(
        [indexed(n, i, args) for n, i in zip(args.hybrid_of, args.index_path, strict=True)]
    )


def one_index(args: argparse.Namespace) -> Path:
    if len(args.index_path) != 1:
        raise CorpusError(f"--retriever_name {args.retriever_name} needs one --index_path")
    return args.index_path[0]


def corpus_of(args: argparse.Namespace) -> Corpus:
    if args.corpus_path is None:
        raise CorpusError(f"--retriever_name {args.retriever_name} needs --corpus_path")
    return Corpus.of_lines(args.corpus_path)


def oracle(args: argparse.Namespace) -> Retriever:
    if args.questions is None:
        raise CorpusError(
            "--retriever_name oracle needs --questions, a parquet file with extra_info.gold_ids"
        )
    return Oracle(BM25Retriever(one_index(args), args.corpus_path), args.questions)


def noisy(args: argparse.Namespace) -> Retriever:
    return Noisy(
        indexed(args.noisy_of, one_index(args), args), corpus_of(args), args.noise, args.seed
    )


EXPERIMENT_LOADERS: dict[str, Callable[[argparse.Namespace], Retriever]] = {
    "oracle": oracle,
    "random": lambda args: Random(corpus_of(args), args.seed),
    "empty": lambda args: Empty(),
    "noisy": noisy,
    "replay": lambda args: Replay(one_index(args)),
}
