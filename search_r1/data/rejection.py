"""Makes the rows for rejection-sampling fine-tuning.

    python -m search_r1.data.rejection --trajectories FILE --out FILE

Keeps the trajectories of a run (`<run folder>/trajectories/*.jsonl`) that scored high enough. They
become rows for `verl.trainer.sft` with the ids that were sampled, and loss only on the policy's own
tokens (the baseline of that name in arXiv 2503.09516, table 2).
"""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from verl.agent import Source
from verl.utils.errors import DataError


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """Reads the records of a trajectory file.

    Raises DataError, with file and line, for a line that is not a trajectory record.
    """
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                ids = [
                    *record["prompt_ids"],
                    *(t for s in record["segments"] for t in s["token_ids"]),
                ]
                _ = (
                    [segment["source"] for segment in record["segments"]],
                    float(record["reward"]["score"]),
                )
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(
                    f"{path}, line {number}: not a trajectory record ({error!r})"
                ) from error
            if not all(isinstance(token, int) for token in ids):
                raise DataError(
                    f"{path}, line {number}: expected integers in prompt_ids and token_ids"
                )
            yield record


def keep(records: Iterable[dict[str, Any]], min_score: float) -> Iterator[dict[str, list[int]]]:
    """`input_ids` and `loss_mask` of every record with a score of at least `min_score`.

    A trajectory whose context was written anew gives an example for each of its rows.
    """
    for record in records:
        if record["reward"]["score"] >= min_score:  # so that NaN is left out too
            yield from examples_of(record)


def examples_of(record: dict[str, Any]) -> Iterator[dict[str, list[int]]]:
    """An example for each context of a record in which the policy has said something."""
    first = {"at": 0, "prompt_ids": record["prompt_ids"]}
    begins = [first, *record.get("rewrites", [])]
    ends = [rewrite["at"] for rewrite in begins[1:]] + [len(record["segments"])]
    for begin, end in zip(begins, ends, strict=True):
        input_ids = list(begin["prompt_ids"])
        loss_mask = [0] * len(input_ids)
        for segment in record["segments"][begin["at"] : end]:
            token_ids = segment["token_ids"]
            is_own = segment["source"] == Source.MODEL
            input_ids += token_ids
            loss_mask += [int(is_own)] * len(token_ids)
        if any(loss_mask) or len(begins) == 1:
            yield {"input_ids": input_ids, "loss_mask": loss_mask}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m search_r1.data.rejection", description="Rows for rejection-sampling SFT."
    )
    parser.add_argument(
        "--trajectories", type=Path, nargs="+", required=True, help="trajectory files of a run"
    )
    parser.add_argument("--out", type=Path, required=True, help="JSONL file of rows to write")
    parser.add_argument(
        "--min_score", type=float, default=1.0, help="reward to keep a trajectory (default: 1.0)"
    )
    args = parser.parse_args(argv)
    try:
        records = [record for path in args.trajectories for record in read_records(path)]
    except (DataError, OSError) as error:
        sys.exit(f"error: {error}")
    rows = list(keep(records, args.min_score))
    if not rows:
        sys.exit(f"error: none of {len(records)} trajectories scored {args.min_score} or more")
    args.out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    sys.stdout.write(f"{args.out}: {len(rows)} of {len(records)} trajectories\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
