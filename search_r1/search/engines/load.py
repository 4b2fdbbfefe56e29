"""Loads an engine from the flags of the server. For your own engine see docs/retriever.md."""

import argparse
from collections.abc import Callable
from pathlib import Path

from search_r1.search.engine import Retriever
from search_r1.search.engines.bm25 import BM25Retriever
from search_r1.search.engines.bm25.feedback import Feedback, Rm3Retriever
from search_r1.search.engines.experiments import Empty, Noisy, Oracle, Random, Record, Replay
from search_r1.search.engines.lucene import LuceneRetriever, is_lucene_index
from search_r1.search.engines.simulated import (
    NOISY_PROMPT,
    USEFUL_PROMPT,
    Prompts,
    SimulatedRetriever,
    SimulatorSettings,
    prompt_of,
)
from search_r1.search.errors import RetrieverError
from search_r1.search.extras import require
from search_r1.search.index.corpus import Corpus

DENSE = ("e5", "bge", "dense")
INDEXED = ("bm25", "lucene", *DENSE)
EXPERIMENTS = ("oracle", "random", "empty", "noisy", "replay")
ENGINES = (*INDEXED, "hybrid", "simulated", *EXPERIMENTS)


def load(args: argparse.Namespace) -> Retriever:
    """Loads the engine that the flags describe.

    Raises RetrieverError that names what is missing, damaged or unsuitable.
    """
    name = args.retriever_name
    check_query_expansion(args)
    if name in INDEXED:
        retriever = indexed(name, one_index(args), args)
    elif name == "hybrid":
        retriever = hybrid(args)
    elif name == "simulated":
        return simulated(args)
    else:
        retriever = EXPERIMENT_LOADERS[name](args)
    if args.reranker:
        require("dense", "--reranker")
        from search_r1.search.engines.fusion import Reranker

        retriever = Reranker(
            retriever, args.reranker, args.rerank_depth, args.batch_size, args.device
        )
    return Record(retriever, args.record) if args.record else retriever


def indexed(name: str, index: Path, args: argparse.Namespace) -> Retriever:
    """Loads an engine with an index. A Lucene index is served by Lucene, also for the name bm25."""
    if name == "lucene" or (name == "bm25" and is_lucene_index(index)):
        if name == "bm25" and args.query_expansion:
            raise RetrieverError(
                f"--query_expansion {args.query_expansion}: {index} is an index of Lucene, whose "
                "queries are not expanded here; build one with --retrieval_method bm25"
            )
        return LuceneRetriever(index, args.corpus_path, args.threads)
    if name == "bm25":
        retriever = BM25Retriever(index, args.corpus_path, args.threads)
        return expanding(retriever, args) if args.query_expansion else retriever
    require("dense", f"--retriever_name {name}")
    from search_r1.search.engines.dense import DenseRetriever
    from search_r1.search.engines.encoder import Encoder

    encoder = Encoder(name, args.retriever_model, args.device, args.use_fp16, args.max_length)
    return DenseRetriever(
        index, args.corpus_path, encoder, name, args.faiss_gpu, args.nprobe, args.ef_search
    )


def check_query_expansion(args: argparse.Namespace) -> None:
    """Raises RetrieverError when queries shall be expanded for engines none of which is `bm25`."""
    searched = {"hybrid": args.hybrid_of, "noisy": [args.noisy_of]}
    engines = searched.get(args.retriever_name, [args.retriever_name])
    if args.query_expansion and "bm25" not in engines:
        raise RetrieverError(
            f"--query_expansion {args.query_expansion} is for the engine bm25, not for "
            f"{' and '.join(engines)}: leave it out, or serve bm25"
        )


def expanding(bm25: BM25Retriever, args: argparse.Namespace) -> Rm3Retriever:
    """Expands the queries of an engine as the flags say."""
    feedback = Feedback(
        documents=args.feedback_docs,
        terms=args.feedback_terms,
        original_weight=args.original_weight,
        max_df=args.max_df,
    )
    return Rm3Retriever(bm25, feedback)


def hybrid(args: argparse.Namespace) -> Retriever:
    """Loads two engines, each with its index."""
    from search_r1.search.engines.fusion import Hybrid

    if len(args.hybrid_of) != len(args.index_path):
        raise RetrieverError(
            f"--hybrid_of names {len(args.hybrid_of)} engines, --index_path {len(args.index_path)} "
            "indexes"
        )
    pairs = zip(args.hybrid_of, args.index_path, strict=True)
    return Hybrid([indexed(name, index, args) for name, index in pairs])


def simulated(args: argparse.Namespace) -> Retriever:
    """Makes the engine whose passages a model writes.

    Raises RetrieverError for flags of engines that search, without an endpoint and its model, and
    when the endpoint does not answer or lacks the model.
    """
    of_others = ("index_path", "corpus_path", "documents", "reranker", "record")
    if given := [f"--{name}" for name in of_others if getattr(args, name)]:
        raise RetrieverError(
            f"--retriever_name simulated searches nothing: remove {' and '.join(given)}"
        )
    needed = ("simulated_url", "simulated_model")
    if missing := [f"--{name}" for name in needed if not getattr(args, name)]:
        raise RetrieverError(f"--retriever_name simulated needs {' and '.join(missing)}")
    if not args.simulated_url.startswith(("http://", "https://")):
        raise RetrieverError(
            f"--simulated_url {args.simulated_url}: expected an address such as "
            "http://127.0.0.1:8001/v1"
        )
    prompts = Prompts(
        prompt_of(args.simulated_useful_prompt, USEFUL_PROMPT, "--simulated_useful_prompt"),
        prompt_of(args.simulated_noisy_prompt, NOISY_PROMPT, "--simulated_noisy_prompt"),
    )
    settings = SimulatorSettings(
        url=args.simulated_url,
        model=args.simulated_model,
        key_env=args.simulated_key_env,
        temperature=args.simulated_temperature,
        passage_tokens=args.simulated_passage_tokens,
        max_retries=args.simulated_max_retries,
        timeout_s=args.simulated_timeout_s,
        concurrency=args.simulated_concurrency,
    )
    return SimulatedRetriever(settings, prompts, args.simulated_cache)


def one_index(args: argparse.Namespace) -> Path:
    """The path of the index. Raises RetrieverError unless exactly one is given."""
    if len(args.index_path) != 1:
        raise RetrieverError(f"--retriever_name {args.retriever_name} needs one --index_path")
    return args.index_path[0]


def corpus_of(args: argparse.Namespace) -> Corpus:
    """The corpus without an index. Raises RetrieverError when none is named."""
    if args.corpus_path is None:
        raise RetrieverError(f"--retriever_name {args.retriever_name} needs --corpus_path")
    return Corpus.of_lines(args.corpus_path)


def oracle(args: argparse.Namespace) -> Retriever:
    """Loads the engine that finds gold passages. Raises RetrieverError without questions."""
    if args.questions is None:
        raise RetrieverError(
            "--retriever_name oracle needs --questions, parquet files with extra_info.gold_ids"
        )
    return Oracle(BM25Retriever(one_index(args), args.corpus_path), args.questions)


def noisy(args: argparse.Namespace) -> Retriever:
    """Loads an engine some of whose passages are replaced by random ones."""
    retriever = indexed(args.noisy_of, one_index(args), args)
    return Noisy(retriever, corpus_of(args), args.noise, args.seed, args.shuffled)


EXPERIMENT_LOADERS: dict[str, Callable[[argparse.Namespace], Retriever]] = {
    "oracle": oracle,
    "random": lambda args: Random(corpus_of(args), args.seed),
    "empty": lambda args: Empty(),
    "noisy": noisy,
    "replay": lambda args: Replay(one_index(args)),
}
