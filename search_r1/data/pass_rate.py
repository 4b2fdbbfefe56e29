"""Keeps the training questions that a policy solves sometimes.

    python -m search_r1.data.pass_rate --questions train.parquet --trajectories FILE... --out FILE

The trajectories are those of an evaluation over the questions, with several for each
(evaluation.jsonl), of search-r1 data sample, or of training steps. The pass rate of a question is
the share of its trajectories that score enough. A group of trajectories that all score the same
teaches nothing: questions whose pass rate is near 0 or 1 are left out.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pyarrow.parquet as pq

from search_r1.data.rejection import read_records
from search_r1.program import command_parser
from search_r1.search.index.files import replacing
from search_r1.search.serve import share
from verl.agent import Row
from verl.utils.dataset import read_questions
from verl.utils.errors import DataError
from verl.utils.wording import counted

UNKNOWN = "without a trajectory"
TOO_HARD = "solved too seldom"
TOO_EASY = "solved too often"
KEPT = "kept"


def identity(source: object, truth: object, extra: object) -> str:
    """What the row of a question and its trajectories have in common."""
    return json.dumps([source, truth, extra], sort_keys=True, default=str)


def identities(path: Path) -> list[str]:
    """The identity of each question of a training file.

    Raises DataError where the file cannot be read, or two questions have the same identity.
    """
    places, rows = read_questions([str(path)])
    prompts: dict[str, tuple[str, Row]] = {}
    found: list[str] = []
    for place, row in zip(places, rows, strict=True):
        truth = row["reward_model"]["ground_truth"]
        key = identity(row["data_source"], truth, row.get("extra_info"))
        other, same = prompts.setdefault(key, (place, row))
        if same["prompt"] != row["prompt"]:
            raise DataError(
                f"{place}: its data_source, answers and extra_info are those of {other}, so that "
                "trajectories do not say which question they answer; give each row an "
                "extra_info.index"
            )
        found.append(key)
    return found


def solved_by_question(
    paths: Iterable[Path], metric: str, solved_at: float
) -> dict[str, list[bool]]:
    """For the identity of each question, which of its trajectories have solved it.

    Raises DataError for a file that holds anything but trajectories, or whose rewards lack
    `metric`.
    """
    solved: dict[str, list[bool]] = {}
    for path in paths:
        for record in read_records(path):
            reward = record["reward"]
            if metric not in reward:
                raise DataError(
                    f"--metric {metric}: a trajectory of {path} has no such number, only "
                    f"{', '.join(sorted(reward))}"
                )
            key = identity(
                record.get("data_source"), record.get("ground_truth"), record.get("extra_info")
            )
            solved.setdefault(key, []).append(reward[metric] >= solved_at)
    return solved


def verdict(solved: Sequence[bool], low: float, high: float) -> str:
    """Whether a question is kept; if not, why.

    >>> [verdict([True] * n + [False] * (4 - n), 0.25, 0.5) for n in range(4)]
    ['solved too seldom', 'kept', 'kept', 'solved too often']
    """
    if not solved:
        return UNKNOWN
    rate = sum(solved) / len(solved)
    if rate < low:
        return TOO_HARD
    return TOO_EASY if rate > high else KEPT


def verdicts_of(
    questions: Sequence[str], solved: Mapping[str, Sequence[bool]], low: float, high: float
) -> list[str]:
    """The verdict on each question. Raises DataError when there is nothing to keep."""
    verdicts = [verdict(solved.get(question, []), low, high) for question in questions]
    if UNKNOWN in verdicts and len(set(verdicts)) == 1:
        raise DataError(
            "no trajectory answers a question of --questions: they must be of the same file, with "
            "the same answers and extra_info"
        )
    if KEPT not in verdicts:
        raise DataError(
            f"no question has a pass rate from {low:g} to {high:g} ({listed(verdicts)})"
        )
    return verdicts


def listed(verdicts: Sequence[str]) -> str:
    """How many questions have each verdict."""
    counts = Counter(verdicts)
    return ", ".join(
        f"{counts[name]:,} {name}" for name in (KEPT, TOO_EASY, TOO_HARD, UNKNOWN) if counts[name]
    )


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = command_parser("search_r1.data.pass_rate", __doc__)
    add = parser.add_argument
    add("--questions", type=Path, required=True, help="parquet file of training questions")
    add(
        "--trajectories",
        type=Path,
        nargs="+",
        required=True,
        metavar="FILE",
        help="their trajectories: evaluation.jsonl, or files of a run's trajectories/",
    )
    add("--out", type=Path, required=True, help="parquet file to write")
    add("--low", type=share, default=0.1, help="least pass rate to keep (default: 0.1)")
    add("--high", type=share, default=0.9, help="largest pass rate to keep (default: 0.9)")
    add("--metric", default="score", help="number of the reward that is compared (default: score)")
    add("--solved_at", type=float, default=1.0, help="value that counts as solved (default: 1.0)")
    args = parser.parse_args(argv)
    if args.low > args.high:
        parser.error(f"--low {args.low:g}: expected no more than --high {args.high:g}")
    if args.out.exists() and args.out.samefile(args.questions):
        parser.error(f"--out {args.out}: the questions are read from this file; name another one")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the file and returns the exit status."""
    args = parse_arguments(argv)
    try:
        questions = identities(args.questions)
        solved = solved_by_question(args.trajectories, args.metric, args.solved_at)
        verdicts = verdicts_of(questions, solved, args.low, args.high)
    except (DataError, OSError) as error:
        sys.exit(f"error: {error}")
    kept = [number for number, word in enumerate(verdicts) if word == KEPT]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(args.out) as pending:
        pq.write_table(pq.read_table(args.questions).take(kept), pending)
    groups = [len(solved[question]) for question in questions if question in solved]
    sys.stdout.write(
        f"{args.out}: {counted(len(questions), 'question')}, {listed(verdicts)}; "
        f"{min(groups)} to {max(groups)} trajectories a question\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
