"""`python -m search_r1.world --out DIR`: writes a closed world."""

import argparse
import sys
from pathlib import Path

from search_r1.world.generate import write_world


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m search_r1.world", description="Writes a closed world.")
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder for corpus.jsonl and the parquet files")
    add("--seed", type=int, default=0, help="another seed, another world (default: 0)")
    add("--train-size", type=int, default=3000, help="entities of training questions (default: 3000)")
    add("--test-size", type=int, default=800, help="entities of held-out questions (default: 800)")
    add("--train-questions", type=int, nargs="+", default=[3000, 3000], help="of 1, 2, ... hops (default: 3000 3000)")
    add("--test-questions", type=int, nargs="+", default=[250, 250], help="of 1, 2, ... hops (default: 250 250)")
    add("--filler", type=int, default=0, help="sentences without content per passage (default: 0)")
    args = vars(parser.parse_args())
    out = args.pop("out")
    write_world(out, **args)
    sys.stdout.write(f"closed world written to {out}\n")


if __name__ == "__main__":
    main()
