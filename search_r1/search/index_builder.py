"""Builds an index of a corpus, whole or not at all, with a manifest that the server checks.

D/bm25:
    python -m search_r1.search.index_builder --retrieval_method bm25 \\
        --corpus_path C.jsonl --save_dir D [--expansions E.jsonl]
D/e5_Flat.index:
    python -m search_r1.search.index_builder --retrieval_method e5 --faiss_type Flat \\
        --corpus_path C.jsonl --save_dir D
"""

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from search_r1.program import command_parser
from search_r1.search.engines import bm25
from search_r1.search.engines.bm25.expansions import OWN_WEIGHT, Expansions
from search_r1.search.engines.encoder import DEFAULT_MODELS
from search_r1.search.engines.load import DENSE, INDEXED
from search_r1.search.errors import CorpusError, RetrieverError
from search_r1.search.extras import require
from search_r1.search.index.files import locked
from search_r1.search.index.manifest import MANIFEST, read_manifest
from search_r1.search.index.reader import CorpusReader
from search_r1.search.serve import positive, refuse_unread


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line, which has the original's flags."""
    parser = command_parser("search_r1.search.index_builder", __doc__)
    add = parser.add_argument
    add(
        "--retrieval_method",
        default="bm25",
        choices=INDEXED,
        help=f"one of {', '.join(INDEXED)} (default: bm25)",
        metavar="NAME",
    )
    add(
        "--corpus_path",
        required=True,
        help="a .jsonl or .json, also .gz, or a .parquet with id and contents, or hf:NAME[:SPLIT]",
    )
    add(
        "--save_dir",
        type=Path,
        default=Path("indexes"),
        help="the index lands in it (default: indexes)",
    )
    add("--overwrite", action="store_true", help="build again even if the index is there")
    add(
        "--skip-bad",
        action="store_true",
        help="leave bad lines out and count them, instead of stopping at the first",
    )
    add(
        "--threads",
        type=positive,
        default=os.cpu_count(),
        help="lucene: indexing threads (default: all cores)",
    )
    add_expansion_flags(parser)
    dense = parser.add_argument_group(f"dense engines ({', '.join(DENSE)})")
    add = dense.add_argument
    add(
        "--model_path",
        help="encoder: a name of the Hugging Face hub or a folder (e5 and bge have a default)",
    )
    add(
        "--faiss_type",
        default="Flat",
        help=(
            "Flat, Flat-F16, Flat-SQ8, HNSW, IVF-Flat, IVF-SQ8, IVF-PQ, or a FAISS factory string "
            "(default: Flat)"
        ),
    )
    add("--max_length", type=positive, default=180, help="longest passage in tokens (default: 180)")
    add("--batch_size", type=positive, default=512, help="passages per encoder call (default: 512)")
    add("--use_fp16", action="store_true", help="encoder in half precision")
    add("--device", help="where the encoder runs (default: a GPU, if any)")
    add(
        "--shard_size",
        type=positive,
        default=16384,
        help="passages per embedding file: what a kill can cost",
    )
    add(
        "--embedding_path",
        type=Path,
        help="folder of the embeddings (default: SAVE_DIR/emb_METHOD)",
    )
    add(
        "--save_embedding",
        action="store_true",
        help="keep the embeddings, for another --faiss_type",
    )
    args = parser.parse_args(argv)
    refuse_unread(parser, args, {"own_weight": (args.expansions is not None, "--expansions")})
    return args


def add_expansion_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of document expansion."""
    add = parser.add_argument
    add("--expansions", type=Path, metavar="FILE", help="bm25: words to add to documents")
    add(
        "--own_weight",
        type=positive,
        default=OWN_WEIGHT,
        metavar="M",
        help=f"bm25: added words worth one of its own (default: {OWN_WEIGHT})",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Builds the index, unless one of this corpus is there; returns the exit status."""
    args = parse_arguments(argv)
    name = args.retrieval_method
    if name in DENSE:
        name = f"{name}_{args.faiss_type}.index"
    index = args.save_dir / name
    try:
        reader = CorpusReader(args.corpus_path, args.skip_bad)
        expansions = expansions_of(args)
        if not args.overwrite and is_built(
            args.retrieval_method, reader, index, args.model_path, expansions
        ):
            sys.stdout.write(f"{index}: already built for {args.corpus_path}\n")
            return 0
        if not args.overwrite:
            check_target(index)
        count = build(args, reader, index, expansions)
    except RetrieverError as error:
        sys.exit(f"error: {error}")
    bad = f", {reader.bad} bad lines left out" if reader.bad else ""
    sys.stdout.write(f"{index}: {count} documents{bad}\n")
    return 0


def expansions_of(args: argparse.Namespace) -> Expansions | None:
    """The file of expansions that the flags name, None without one.

    Raises CorpusError for a bad file, RetrieverError when the engine cannot expand documents.
    """
    if args.expansions is None:
        return None
    if args.retrieval_method != bm25.NAME:
        raise RetrieverError(
            f"--expansions is for --retrieval_method {bm25.NAME}, not {args.retrieval_method}"
        )
    return Expansions(args.expansions, args.own_weight)


def is_built(
    method: str,
    reader: CorpusReader,
    index: Path,
    model: str | None,
    expansions: Expansions | None = None,
) -> bool:
    """Whether `index` is a complete index of exactly this corpus, in the current format.

    A dense index must also be made with the encoder `model`, or else the default encoder of the
    method, and a BM25 index with these expansions, or with none.
    """
    try:
        manifest = read_manifest(index)
    except CorpusError:
        return False
    if method == bm25.NAME and manifest.get("parameters") != bm25.PARAMETERS:
        return False
    if bm25.document_expansion(manifest) != bm25.described(expansions):
        return False
    encoder = model or DEFAULT_MODELS.get(method)
    if method in DENSE and manifest["parameters"].get("model") != encoder:
        return False
    return manifest["corpus"] == reader.fingerprint()


def check_target(index: Path) -> None:
    """Raises CorpusError when `index` exists but was not written by this command.

    Building the index would delete it, and it may hold something of value.
    """
    is_empty_folder = index.is_dir() and not any(index.iterdir())
    is_ours = (index / MANIFEST).is_file()
    if index.exists() and not is_empty_folder and not is_ours:
        raise CorpusError(
            f"{index} is there already and was not built by this command (it has no {MANIFEST}): "
            "choose another --save_dir, or say --overwrite to replace it"
        )


def build(
    args: argparse.Namespace, reader: CorpusReader, index: Path, expansions: Expansions | None
) -> int:
    """Builds the index and returns the number of documents in it.

    Raises CorpusError when the corpus is bad or the disk is full, RetrieverError when a package is
    missing.
    """
    if args.retrieval_method == "bm25":
        return bm25.build(reader, index, expansions)
    if args.retrieval_method == "lucene":
        from search_r1.search.engines import lucene

        return lucene.build(reader, index, args.threads)
    return build_dense(args, reader, index)


def build_dense(args: argparse.Namespace, reader: CorpusReader, index: Path) -> int:
    """Embeds the corpus, builds a FAISS index, and returns the number of documents in it."""
    require("dense", f"--retrieval_method {args.retrieval_method}")
    from search_r1.search.engines import dense
    from search_r1.search.engines.encoder import Encoder

    encoder = Encoder(
        args.retrieval_method, args.model_path, args.device, args.use_fp16, args.max_length
    )
    folder = args.embedding_path or args.save_dir / f"emb_{args.retrieval_method}"
    shards = dense.EmbeddingShards(folder, args.shard_size)
    with locked(folder):  # builds of several types share it
        count = dense.build(reader, index, encoder, shards, args.faiss_type, args.batch_size)
        if not (args.save_embedding or args.embedding_path):
            shutil.rmtree(folder)
    return count


if __name__ == "__main__":
    sys.exit(main())
