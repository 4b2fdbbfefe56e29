"""The retrieval server: `/retrieve`, `/health` and `/metrics` over one engine.

With --documents also `/open` and `/find` over its corpus.

python -m search_r1.search.retrieval_server --index_path INDEX/bm25 --corpus_path C.jsonl \\
    --topk 3 --retriever_name bm25
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # run by its path, as the original's users do
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from search_r1.program import described, program_name, short_help
from search_r1.search.engines.bm25.feedback import RM3, Feedback
from search_r1.search.engines.load import DENSE, ENGINES, INDEXED, load
from search_r1.search.engines.simulated import PLACES, SimulatorSettings
from search_r1.search.serve import (
    add_document_flags,
    add_flags,
    add_serving_flags,
    positive,
    refuse_unread,
    serve,
    share,
)
from search_r1.search.store import load_documents

EXPANSION_FLAGS: tuple[str, ...] = ("feedback_docs", "feedback_terms", "original_weight", "max_df")
__all__ = ["load", "load_documents", "main", "parse_arguments"]


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line, which has the original's flags."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog=program_name("search_r1.search.retrieval_server"),
        usage="%(prog)s --retriever_name NAME --index_path PATH --corpus_path FILE [flag ...]",
        description=described("search_r1.search.retrieval_server", __doc__),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="docs/retriever.md has examples of every engine.",
    )
    add_engine_flags(parser)
    if short_help(parser, argv):
        add_serving_flags(parser)
    else:
        add_expansion_flags(parser)
        add_dense_flags(parser)
        add_combination_flags(parser)
        add_simulated_flags(parser)
        add_experiment_flags(parser)
        add_document_flags(parser)
        add_flags(parser)
    args = parser.parse_args(argv)
    refuse_unread(parser, args, readers_of_flags(args))
    if args.faiss_gpu and args.workers > 1:
        parser.error(
            "--faiss_gpu: an index on the GPU belongs to one process; leave --workers at 1"
        )
    if args.simulated_temperature < 0:
        parser.error("--simulated_temperature must be at least 0")
    if args.simulated_max_retries < 0:
        parser.error("--simulated_max_retries must be at least 0")
    if args.shuffled < 1:
        parser.error("--shuffled must be at least 1")
    if args.simulated_timeout_s <= 0:
        parser.error("--simulated_timeout_s must be positive")
    return args


def readers_of_flags(args: argparse.Namespace) -> dict[str, tuple[bool, str]]:
    """For flags that one engine or one choice reads: whether it is served, and its flag."""
    name = args.retriever_name
    expansion: tuple[bool, str] = (args.query_expansion is not None, f"--query_expansion {RM3}")
    of_engine = {
        "hybrid": ("hybrid_of",),
        "noisy": ("noisy_of", "noise", "shuffled"),
        "oracle": ("questions",),
        "simulated": tuple(flag for flag in vars(args) if flag.startswith("simulated_")),
    }
    readers: dict[str, tuple[bool, str]] = dict.fromkeys(EXPANSION_FLAGS, expansion)
    for engine, flags in of_engine.items():
        readers |= dict.fromkeys(flags, (name == engine, f"--retriever_name {engine}"))
    return readers


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that name the engine, its index and its corpus."""
    engine = parser.add_argument_group("engine")
    add = engine.add_argument
    add(
        "--retriever_name",
        default="bm25",
        choices=ENGINES,
        metavar="NAME",
        help=f"{', '.join(ENGINES)} (default: bm25)",
    )
    add(
        "--index_path",
        type=Path,
        nargs="+",
        default=[],
        help="index folder or FAISS file; two for hybrid; a recording for replay",
    )
    add(
        "--corpus_path",
        type=Path,
        help="JSONL with id and contents, the one the index was built from",
    )
    add("--threads", type=positive, help="bm25, lucene: search threads (default: all cores)")


def add_expansion_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of query expansion, whose defaults are those of `Feedback`."""
    defaults = Feedback()
    add = parser.add_argument_group("bm25: query expansion").add_argument
    add(
        "--query_expansion",
        choices=(RM3,),
        help=(
            "rm3: search twice, the second time with words of the passages found first (default: "
            "none). The flags that follow are its parameters"
        ),
    )
    add(
        "--feedback_docs",
        type=positive,
        default=defaults.documents,
        help=f"passages whose words are taken (default: {defaults.documents})",
    )
    add(
        "--feedback_terms",
        type=positive,
        default=defaults.terms,
        help=f"words that are taken (default: {defaults.terms})",
    )
    add(
        "--original_weight",
        type=share,
        default=defaults.original_weight,
        help=f"share of the query's own words, 0 to 1 (default: {defaults.original_weight})",
    )
    add(
        "--max_df",
        type=share,
        default=defaults.max_df,
        help=(
            "words that a larger share of the passages has are not taken, 0 to 1 (default: "
            f"{defaults.max_df})"
        ),
    )


def add_dense_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of dense engines."""
    dense = parser.add_argument_group(f"dense engines ({', '.join(DENSE)})")
    add = dense.add_argument
    add(
        "--retriever_model",
        help="encoder: a name of the Hugging Face hub or a folder (e5 and bge have a default)",
    )
    add(
        "--faiss_gpu",
        action="store_true",
        help="keep the index on the GPUs, divided over all of them",
    )
    add(
        "--device",
        help="where encoder and reranker run: cpu, cuda, cuda:1 (default: a GPU, if any)",
    )
    add("--use_fp16", action="store_true", help="encoder in half precision")
    add("--max_length", type=positive, help="longest query in tokens (default: the model's)")
    add("--nprobe", type=positive, default=64, help="IVF: lists looked at (default: 64)")
    add("--ef_search", type=positive, default=128, help="HNSW: candidates kept (default: 128)")


def add_combination_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of engines that combine other engines."""
    combine = parser.add_argument_group("combinations")
    add = combine.add_argument
    add(
        "--hybrid_of",
        nargs=2,
        choices=INDEXED,
        default=["bm25", "e5"],
        metavar="NAME",
        help="engines to fuse (default: bm25 e5)",
    )
    add(
        "--reranker",
        help="cross-encoder that orders the passages of any engine: a name or a folder",
    )
    add("--rerank_depth", type=positive, default=20, help="passages it looks at (default: 20)")
    add("--batch_size", type=positive, default=32, help="pairs it looks at at a time (default: 32)")


def add_simulated_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the engine whose passages a model writes."""
    defaults = SimulatorSettings("", "")
    places = " and ".join(PLACES)
    simulated = parser.add_argument_group("simulated: a language model writes the passages")
    add = simulated.add_argument
    add(
        "--simulated_url",
        metavar="URL",
        help="OpenAI-compatible endpoint, such as http://127.0.0.1:8001/v1 of a local vLLM",
    )
    add("--simulated_model", metavar="MODEL", help="the model to ask, as the endpoint names it")
    add(
        "--simulated_key_env",
        metavar="NAME",
        default=defaults.key_env,
        help=f"environment variable with the key, if one is needed (default: {defaults.key_env})",
    )
    add(
        "--simulated_useful_prompt",
        metavar="FILE",
        type=Path,
        help=f"prompt for useful passages, with {places} (default: one of its own)",
    )
    add(
        "--simulated_noisy_prompt",
        metavar="FILE",
        type=Path,
        help=f"prompt for passages that do not help, with {places} (default: one of its own)",
    )
    add(
        "--simulated_temperature",
        type=float,
        default=defaults.temperature,
        help=f"temperature of the model (default: {defaults.temperature})",
    )
    add(
        "--simulated_passage_tokens",
        type=positive,
        default=defaults.passage_tokens,
        help=f"most tokens of an answer per passage (default: {defaults.passage_tokens})",
    )
    add(
        "--simulated_max_retries",
        type=int,
        default=defaults.max_retries,
        help=(
            "further attempts after errors, rate limits and answers that are no passages (default: "
            f"{defaults.max_retries})"
        ),
    )
    add(
        "--simulated_timeout_s",
        type=float,
        default=defaults.timeout_s,
        help=f"seconds a request to the model may take (default: {defaults.timeout_s:g})",
    )
    add(
        "--simulated_concurrency",
        type=positive,
        default=defaults.concurrency,
        help=f"queries that are written for at the same time (default: {defaults.concurrency})",
    )
    add(
        "--simulated_cache",
        metavar="FILE",
        type=Path,
        help="SQLite file that keeps what was written (default: none)",
    )


def add_experiment_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the engines for experiments."""
    experiments = parser.add_argument_group("experiments")
    add = experiments.add_argument
    add("--record", type=Path, help="append every search to this file, for --retriever_name replay")
    add(
        "--questions",
        type=Path,
        nargs="+",
        help="oracle: parquet files with extra_info.question and extra_info.gold_ids",
    )
    add(
        "--noisy_of",
        choices=INDEXED,
        default="bm25",
        metavar="NAME",
        help="noisy: the engine to spoil (default: bm25)",
    )
    add(
        "--noise",
        type=share,
        default=0.3,
        help="noisy: share of passages replaced by random ones (default: 0.3)",
    )
    add(
        "--shuffled",
        type=int,
        default=1,
        help="noisy: number of first passages that are put into a random order (default: 1)",
    )
    add("--seed", type=int, default=0, help="noisy, random: seed (default: 0)")


def main() -> int:
    """Serves until told to stop."""
    return serve("search_r1.search.retrieval_server")


if __name__ == "__main__":
    sys.exit(main())
