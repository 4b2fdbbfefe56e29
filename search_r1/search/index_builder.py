"""`python -m search_r1.search.index_builder --retrieval_method bm25 --corpus_path C --save_dir D`: builds D/bm25."""

import argparse
import sys
from pathlib import Path

from search_r1.search import bm25
from search_r1.search.corpus import CorpusError

METHODS = ("bm25",)


def main() -> None:
    """Command line, with the original's flags."""
    parser = argparse.ArgumentParser(prog="python -m search_r1.search.index_builder", description=__doc__)
    parser.add_argument("--retrieval_method", default="bm25", help=f"one of {', '.join(METHODS)} (default: bm25)")
    parser.add_argument("--corpus_path", type=Path, required=True, help="JSONL with id and contents")
    parser.add_argument("--save_dir", type=Path, default=Path("indexes"), help="the index lands in SAVE_DIR/METHOD")
    parser.add_argument("--overwrite", action="store_true", help="build again even if the index is there")
    args = parser.parse_args()
    if args.retrieval_method not in METHODS:
        parser.error(f"--retrieval_method {args.retrieval_method}: available are {', '.join(METHODS)}")
    index = args.save_dir / args.retrieval_method
    if bm25.is_built(args.corpus_path, index) and not args.overwrite:
        sys.stdout.write(f"{index}: already built for {args.corpus_path}\n")
        return
    args.save_dir.mkdir(parents=True, exist_ok=True)
    try:
        count = bm25.build(args.corpus_path, index)
    except CorpusError as error:
        sys.exit(f"error: {error}")
    sys.stdout.write(f"{index}: {count} documents\n")


if __name__ == "__main__":
    main()
