"""Compares the arms of a sweep seed by seed: exact match of each validation, by set of questions.

    python scripts/bench/arms.py docs/results/credit.jsonl --base outcome [--with FILE]

Reads the rows that scripts/sweep.sh wrote. The first table has the mean over the seeds of an arm
after every validation, with the trajectories that its first seed had sampled by then. The second
has the difference of each arm to the base in the runs of the same seed, after as many
trajectories, with the 95 % interval of its mean (Student's t over the seeds); an arm that shares
fewer than two seeds with the base has none.
"""

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import study
from frontier import by_method

T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""The .975 quantiles of Student's t for 1, 2, ... degrees of freedom: two to ten seeds."""
SAME = 0.02
"""Numbers of trajectories that differ by no more than this share count as one: a few fail."""
Curves = Mapping[str, list[tuple[int, float]]]
"""For each set of questions the exact match after a number of trajectories."""


def curves_by_seed(rows: Sequence[study.Row]) -> dict[str, Curves]:
    """The curves of an arm by its seeds."""
    return {row["run"].rpartition("-seed")[2]: row["em"] for row in rows}


def at(curves: Curves, place: int) -> dict[str, float]:
    """The exact match of each set, and their mean as `all`, in the validation at `place`."""
    found = {name: curve[place][1] for name, curve in curves.items()}
    return {**found, "all": statistics.mean(found.values())}


def validated_at(curves: Curves, trajectories: int) -> int | None:
    """The place of the validation after about as many trajectories; None if there is none.

    >>> curve = {"a": [(0, 0.1), (1198, 0.5), (2400, 0.6)]}
    >>> validated_at(curve, 1200), validated_at(curve, 3600)
    (1, None)
    """
    counts = [count for count, _ in next(iter(curves.values()))]
    place = min(range(len(counts)), key=lambda each: abs(counts[each] - trajectories))
    is_close = abs(counts[place] - trajectories) <= SAME * trajectories
    return place if is_close else None


def interval(differences: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the mean of two to ten differences, by Student's t.

    >>> low, high = interval([0.1, 0.2, 0.3])
    >>> round(low, 3), round(high, 3)
    (-0.048, 0.448)
    """
    mean = statistics.mean(differences)
    error = statistics.stdev(differences) / len(differences) ** 0.5
    reach = T_QUANTILES[len(differences) - 2] * error
    return mean - reach, mean + reach


def line(cells: Sequence[object]) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |\n"


def means(arms: Mapping[str, dict[str, Curves]], sets: Sequence[str]) -> str:
    """Markdown: the means of every arm after every validation."""
    text = line(["arm", "seeds", "trajectories", *sets]) + line(["---"] * (3 + len(sets)))
    for arm, seeds in arms.items():
        any_curve = next(iter(next(iter(seeds.values())).values()))
        for place, (trajectories, _) in enumerate(any_curve):
            found = [at(curves, place) for curves in seeds.values()]
            scores = [f"{statistics.mean(f[name] for f in found):.3f}" for name in sets]
            text += line([f"`{arm}`", len(seeds), f"{trajectories:,}", *scores])
    return text


def differences(arms: Mapping[str, dict[str, Curves]], base: str, sets: Sequence[str]) -> str:
    """Markdown: every arm less the base, in the runs of the same seed."""
    text = line(["arm", "trajectories", *sets]) + line(["---"] * (2 + len(sets)))
    for arm, seeds in arms.items():
        shared = sorted(seeds.keys() & arms[base].keys())
        if arm == base or len(shared) < 2:
            continue
        any_curve = next(iter(seeds[shared[0]].values()))
        for place, (trajectories, _) in enumerate(any_curve[1:], 1):
            place_of_base = validated_at(arms[base][shared[0]], trajectories)
            if place_of_base is None:
                continue
            own = [at(seeds[seed], place) for seed in shared]
            other = [at(arms[base][seed], place_of_base) for seed in shared]
            cells: list[object] = [f"`{arm}`", f"{trajectories:,}"]
            for name in sets:
                gaps = [a[name] - b[name] for a, b in zip(own, other, strict=True)]
                low, high = interval(gaps)
                cells.append(f"{statistics.mean(gaps):+.3f} [{low:+.2f}, {high:+.2f}]")
            text += line(cells)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", type=Path, help="rows of a sweep")
    parser.add_argument("--base", required=True, help="the arm that the others are compared with")
    parser.add_argument(
        "--with", dest="further", type=Path, help="rows of another sweep with the same questions"
    )
    args = parser.parse_args()
    rows = study.read_rows(args.rows)
    if args.further is not None:
        rows += study.read_rows(args.further)
    arms = {name: curves_by_seed(own) for name, own in by_method(rows).items()}
    if args.base not in arms:
        parser.error(f"--base {args.base}: {args.rows} has {', '.join(arms)}")
    if max(len(seeds) for seeds in arms.values()) > len(T_QUANTILES) + 1:
        parser.error(f"{args.rows}: an arm has more than {len(T_QUANTILES) + 1} seeds")
    sets = [*sorted(rows[0]["em"]), "all"]
    sys.stdout.write(means(arms, sets) + "\n" + differences(arms, args.base, sets))


if __name__ == "__main__":
    main()
