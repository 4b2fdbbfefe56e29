"""The frontier of a sweep: exact match against searches per question, of its finished runs.

    python scripts/bench/frontier.py docs/results/over_search.jsonl [--out FILE.png]

Reads the rows that scripts/sweep.sh wrote. Prints a table of the methods, means over their seeds
with the lowest and the highest, and draws a panel for each set: a small point for each seed, a
large one for their mean. Better is up and left.
"""

import argparse
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import study

COMMON = "common"
"""The last part of the name of the set that the base knows by heart."""


def by_method(rows: Sequence[study.Row]) -> dict[str, list[study.Row]]:
    """The rows of the seeds of each method, in the order of the file."""
    methods: dict[str, list[study.Row]] = defaultdict(list)
    for row in rows:
        methods[row["run"].rpartition("-seed")[0]].append(row)
    return dict(methods)


def sets_of(rows: Sequence[study.Row]) -> list[str]:
    """The sets of all rows, that of common facts first."""
    names = {name for row in rows for name in row["last"]}
    return sorted(names, key=lambda name: (not name.endswith(COMMON), name))


def figure_of(rows: Sequence[study.Row], read: Callable[[study.Row], float]) -> str:
    """The mean over seeds; with the lowest and the highest where there are several."""
    values = [read(row) for row in rows]
    mean = f"{statistics.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.3f}-{max(values):.3f})"


def table(rows: Sequence[study.Row]) -> str:
    """Markdown: seeds, EM and searches by set, and the share of common facts searched for."""
    sets = sets_of(rows)
    short = [name.rpartition("_")[2] for name in sets]
    head = ["method", "seeds", *(f"EM {s}" for s in short), *(f"searches {s}" for s in short)]
    common = [name for name in sets if name.endswith(COMMON)]
    head += ["over-search"] * len(common)
    lines = [head, ["---"] * len(head)]
    for method, seeds in by_method(rows).items():
        line = [method, str(len(seeds))]
        for figure in ("EM", "searches"):
            line += [figure_of(seeds, lambda r, s=s, f=figure: r["last"][s][f]) for s in sets]
        line += [figure_of(seeds, lambda r, s=s: r["searched"][s]) for s in common]
        lines.append(line)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def plot(rows: Sequence[study.Row], path: Path) -> None:
    """Draws EM against searches, a panel for each set and a colour for each method."""
    from matplotlib.figure import Figure

    sets = sets_of(rows)
    figure = Figure(figsize=(3.6 * len(sets), 3.8), layout="constrained")
    for place, (name, axis) in enumerate(
        zip(sets, figure.subplots(1, len(sets), squeeze=False)[0], strict=True)
    ):
        for index, (method, seeds) in enumerate(by_method(rows).items()):
            searches = [row["last"][name]["searches"] for row in seeds]
            scores = [row["last"][name]["EM"] for row in seeds]
            axis.scatter(searches, scores, s=12, color=f"C{index}", alpha=0.5)
            mean = statistics.mean(searches), statistics.mean(scores)
            axis.scatter(*mean, s=60, color=f"C{index}", label=method if place == 0 else None)
        axis.set(title=name, xlabel="searches per question", ylabel="EM" if place == 0 else "")
        axis.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", type=Path, metavar="ROWS.jsonl", help="rows of a sweep")
    parser.add_argument("--out", type=Path, help="the plot (default: ROWS_frontier.png beside it)")
    args = parser.parse_args()
    rows = study.read_rows(args.rows)
    if not rows:
        parser.error(f"{args.rows}: there are no rows; scripts/sweep.sh writes them")
    if lacking := [row["run"] for row in rows if "searched" not in row]:
        parser.error(f"{args.rows}: without `searched`, of an earlier version: {lacking[0]}")
    sys.stdout.write(table(rows))
    plot(rows, args.out or args.rows.with_name(f"{args.rows.stem}_frontier.png"))


if __name__ == "__main__":
    main()
