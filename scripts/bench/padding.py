"""Share of a training step's token slots that hold nothing, on the lengths of real trajectories.

    python scripts/bench/padding.py TRAJECTORIES [--text KEY.KEY] [--ranks 8] [--budget 16384]

TRAJECTORIES is a file of ours (JSONL), or with --text any JSON array, whose entry's characters are
divided by 4. Ranks meet at every micro-batch, so that all wait for the one with most tokens: those
slots count as well as padding.
"""

import argparse
import json
import random
import sys
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any

from verl.utils.seqlen_balancing import balance
from verl.workers.update import Budget, micro_batches

Ranks = list[list[list[int]]]
"""Lengths of the rows of each micro-batch of each rank."""


def lengths_of(path: Path, text: str | None) -> list[int]:
    """Tokens of every record."""
    if text is None:
        records = [json.loads(line) for line in path.open(encoding="utf-8")]
        return [
            len(r["prompt_ids"]) + sum(len(s["token_ids"]) for s in r["segments"]) for r in records
        ]
    return [
        max(2, len(reduce(lambda r, key: r[key], text.split("."), record)) // 4)
        for record in json.loads(path.read_text(encoding="utf-8"))
    ]


def fixed(lengths: list[int], ranks: int, budget: int, ordered: bool) -> Ranks:
    """So many rows in every micro-batch that the longest fit the budget, in the order given or by
    length."""
    rows = max(1, budget // max(lengths))
    shares = [lengths[rank::ranks] for rank in range(ranks)]
    shares = [sorted(share) if ordered else share for share in shares]
    return [[share[i : i + rows] for i in range(0, len(share), rows)] for share in shares]


def ours(lengths: list[int], ranks: int, budget: int) -> Ranks:
    """As in training: ranks with nearly equal tokens, as many micro-batches on each, nearly equal
    too."""
    shares = [[lengths[row] for row in part] for part in balance(lengths, ranks)]
    number = max(len(micro_batches(share, Budget(budget))) for share in shares)
    return [
        [[share[i] for i in part] for part in micro_batches(share, Budget(budget), number)]
        for share in shares
    ]


def wasted(parts: Ranks, slots: Callable[[list[int]], int]) -> float:
    """1 - tokens / slots, where at each micro-batch every rank takes as many slots as the
    largest."""
    tokens = sum(sum(map(sum, rank)) for rank in parts)
    steps = max(map(len, parts))
    taken = sum(max(slots(rank[i]) if i < len(rank) else 0 for rank in parts) for i in range(steps))
    return 1 - tokens / (len(parts) * taken)


def padded(rows: list[int]) -> int:
    return len(rows) * max(rows, default=0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("trajectories", type=Path)
    parser.add_argument("--text", metavar="KEY.KEY", help="entry whose characters are counted")
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--budget", type=int, default=16384, help="tokens per micro-batch")
    parser.add_argument(
        "--mini-batch", type=int, default=256, help="trajectories per optimizer step"
    )
    args = parser.parse_args()
    lengths = lengths_of(args.trajectories, args.text)
    random.Random(0).shuffle(lengths)
    steps = [lengths[i : i + args.mini_batch] for i in range(0, len(lengths), args.mini_batch)]
    ways: dict[str, tuple[Callable[[list[int]], Ranks], Callable[[list[int]], Any]]] = {
        "padded, in the order given": (
            lambda step: fixed(step, args.ranks, args.budget, False),
            padded,
        ),
        "padded, by length": (lambda step: fixed(step, args.ranks, args.budget, True), padded),
        "packed, fixed rows": (lambda step: fixed(step, args.ranks, args.budget, False), sum),
        "packed, balanced (ours)": (lambda step: ours(step, args.ranks, args.budget), sum),
    }
    mean = sum(lengths) / len(lengths)
    lines = [
        f"{len(lengths)} trajectories of {min(lengths)} to {max(lengths)} tokens, mean {mean:.0f}"
    ]
    for name, (divide, slots) in ways.items():
        share = sum(wasted(divide(step), slots) for step in steps) / len(steps)
        lines.append(f"{name:28} {share:6.1%} wasted")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
