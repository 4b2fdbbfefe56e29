"""The flags of commands that draw training questions from a corpus."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from search_r1.prompts import TEMPLATES, WITH_CONTEXT
from search_r1.search.serve import positive


def add_drawing_flags(parser: argparse.ArgumentParser, drawn: str) -> None:
    """Adds the flags of what is made. `drawn`: what `--seed` draws, for its help."""
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder for train.parquet and test.parquet")
    add("--count", type=positive, default=1000, help="questions in all (default: 1000)")
    add("--test-size", type=positive, default=100, help="rows held out (default: 100)")
    add(
        "--template",
        choices=sorted(set(TEMPLATES) - WITH_CONTEXT),
        default="search",
        help="prompt (default: search, the paper's)",
    )
    add("--seed", type=int, default=0, help=f"draws {drawn} (default: 0)")
    add("--overwrite", action="store_true", help="make the files even where others stand")


def parse_drawing(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None
) -> argparse.Namespace:
    """Parses the command line. Ends the command where no question is left to train on."""
    args = parser.parse_args(argv)
    if args.test_size >= args.count:
        parser.error(f"--test-size {args.test_size}: expected less than --count {args.count}")
    return args
