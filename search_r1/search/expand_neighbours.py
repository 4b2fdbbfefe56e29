"""Finds words for each document of an index, in the documents most like it, for `--expansions`.

python -m search_r1.search.expand_neighbours --index_path INDEX/bm25 --corpus_path C.jsonl \\
    --out expansions.jsonl
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from search_r1.program import command_parser
from search_r1.search.engines.bm25.neighbours import Neighbourhood, Neighbours
from search_r1.search.engines.bm25.retriever import BM25Retriever
from search_r1.search.errors import RetrieverError
from search_r1.search.index.files import replacing
from search_r1.search.serve import positive, share


def add_index_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that every way of expanding documents has."""
    add = parser.add_argument
    add("--index_path", type=Path, required=True, help="BM25 index of the corpus, not expanded")
    add("--corpus_path", type=Path, help="the corpus, where the index holds no copy of it")
    add("--out", type=Path, required=True, help="JSONL to write, with id and terms")


def load_plain(args: argparse.Namespace) -> BM25Retriever:
    """The index that the flags name. Raises RetrieverError when its documents are expanded."""
    bm25 = BM25Retriever(args.index_path, args.corpus_path)
    if bm25.settings:
        raise RetrieverError(
            f"{args.index_path}: its documents are expanded already; name an index that was built "
            "without --expansions"
        )
    return bm25


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line, whose defaults are those of `Neighbourhood`."""
    parser = command_parser("search_r1.search.expand_neighbours", __doc__)
    defaults = Neighbourhood()
    add_index_flags(parser)
    add = parser.add_argument
    add(
        "--neighbours",
        type=positive,
        default=defaults.documents,
        help=f"documents whose words are taken (default: {defaults.documents})",
    )
    add(
        "--terms",
        type=positive,
        default=defaults.terms,
        help=f"most words that a document gets (default: {defaults.terms})",
    )
    add(
        "--max_df",
        type=share,
        default=defaults.max_df,
        help=(
            "words that a larger share of the documents has are not taken (default: "
            f"{defaults.max_df})"
        ),
    )
    add(
        "--query_words",
        type=positive,
        default=defaults.query_words,
        help=f"words of a document that are searched for (default: {defaults.query_words})",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the file, whole or not at all, and returns the exit status."""
    args = parse_arguments(argv)
    settings = Neighbourhood(
        documents=args.neighbours,
        terms=args.terms,
        max_df=args.max_df,
        query_words=args.query_words,
    )
    try:
        bm25 = load_plain(args)
    except RetrieverError as error:
        sys.exit(f"error: {error}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(args.out) as pending, pending.open("w", encoding="utf-8") as file:
        for id, terms in tqdm(Neighbours(bm25, settings), total=len(bm25), desc="documents"):
            file.write(json.dumps({"id": id, "terms": terms}, ensure_ascii=False) + "\n")
    sys.stdout.write(f"{args.out}: words for {len(bm25)} documents\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
