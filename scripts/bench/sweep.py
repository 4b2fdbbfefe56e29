"""A sweep: trainings that differ in overrides and seeds, one after the other, with a table and a
plot at the end.

    python scripts/bench/sweep.py scripts/sweeps/algorithms.yaml [RUN ...] [--rows FILE] [--commit]

SWEEP.yaml has `overrides` of all runs, and `runs`: {NAME: {config: grpo | ppo, seeds: [0],
overrides: [], status: 0}}, where `status` is what a run is to end with. A finished run appends its
row to --rows and is not run again; an interrupted one resumes from its last checkpoint.
"""

import argparse
import json
import statistics
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import study
import yaml
from scipy.stats import rankdata

from search_r1.evaluation.behaviour import behaviour, num_tokens, read_history
from search_r1.evaluation.summary import by_hops
from search_r1.report import summary
from search_r1.trajectory import Record, read_searches
from verl.utils.tracking import STEP

DEFAULTS: dict[str, Any] = {"config": "grpo", "seeds": [0], "overrides": [], "status": 0}
REACHED = 0.8
EM = "val/em/"
"""The metrics that are the exact match of a validation, one for each set of questions."""
TRAINING_CURVES = [
    "critic/score/mean",
    "reward/em",
    "env/number_of_valid_search",
    "env/finish_ratio",
    "env/gold_retrieved",
    "response_length/mean",
    "response_length_model/mean",
    "critic/advantages/std",
    "critic/vf_explained_var",
]
"""Metrics whose value in each training step belongs to the row, where a run has them."""
COLLAPSED = 0.5
"""A collapse: a validation score that falls below this share of the best one before it."""


def read_sweep(path: Path) -> dict[str, tuple[list[str], int]]:
    """Command and exit status by run, a run for each seed. Exits naming an unknown key."""
    sweep = yaml.safe_load(path.read_text(encoding="utf-8"))
    runs: dict[str, tuple[list[str], int]] = {}
    for name, given in sweep["runs"].items():
        if unknown := (given or {}).keys() - DEFAULTS.keys():
            sys.exit(
                f"error: {path}, {name}: unknown {', '.join(sorted(unknown))}; expected "
                f"{', '.join(DEFAULTS)}"
            )
        settings = {**DEFAULTS, **(given or {})}
        for seed in settings["seeds"]:
            run = f"{name}-seed{seed}"
            command = [
                "bash",
                f"train_{settings['config']}.sh",
                *sweep.get("overrides", []),
                *settings["overrides"],
                f"trainer.seed={seed}",
                f"trainer.experiment_name={path.stem}-{run}",
                f"trainer.default_local_dir={folder_of(path, run)}",
            ]
            runs[run] = command, settings["status"]
    return runs


def folder_of(path: Path, run: str) -> str:
    return f"runs/{path.stem}/{run}"


def figures(folder: Path) -> study.Row:
    """Curve of the validations over sampled trajectories, when it reached REACHED, and the last
    validation by set: figures, how trajectories ended, their contexts."""
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    sampled = 0.0
    curve = []
    em: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for line in metrics:
        sampled += line.get("training/num_trajectories", 0)
        if "val/test_score/all" in line:
            curve.append((int(sampled), line["val/test_score/all"]))
        for name in sorted(key for key in line if key.startswith(EM)):
            em[name.removeprefix(EM)].append((int(sampled), line[name]))
    best = 0.0
    collapses = 0
    for _, score in curve:
        collapses += score < COLLAPSED * best
        best = max(best, score)
    trained = [line for line in metrics if "perf/time_per_step" in line]
    validations = sorted((folder / "trajectories").glob("val_*.jsonl"))
    last = read_records(validations[-1])
    by_source: dict[str, list[Record]] = defaultdict(list)
    for record in last:
        by_source[record["data_source"]].append(record)
    return {
        "steps": metrics[-1][STEP],
        "curve": curve,
        "em": em,
        "collapses": collapses,
        "samples_to_reach": next((n for n, score in curve if score >= REACHED), None),
        "timer_coverage": statistics.median(line["perf/timer_coverage"] for line in trained),
        "seconds": [round(line["perf/time_per_step"], 2) for line in trained],
        "staleness": mean_of(trained, "training/staleness/share_"),
        "mismatch": mean_of(trained, "rollout_corr/"),
        "training": {
            name: [line.get(name) for line in trained]
            for name in TRAINING_CURVES
            if any(name in line for line in trained)
        },
        "behaviour": [behaviour_of(read_records(path)) for path in validations],
        "em_by_length": em_by_length(last),
        "searches_by_hops": searches_by_hops(last),
        "alarms": [
            p.read_text()
            for p in sorted(folder.glob("alarms/*/alarm.txt"), key=lambda p: p.stat().st_mtime)
        ],
        "optimizer_steps": sum(line.get("actor/optimizer_steps", 0) for line in metrics),
        "last": {source: summary(records) for source, records in sorted(by_source.items())},
        "searched": {source: searched(records) for source, records in sorted(by_source.items())},
        "ended": {source: ended(records) for source, records in sorted(by_source.items())},
        "contexts": {source: contexts(records) for source, records in sorted(by_source.items())},
        "logprob_diff": max(line.get("rollout/logprob_diff_max", 0.0) for line in trained),
    }


def read_records(path: Path) -> list[Record]:
    """The trajectories of a validation."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def behaviour_of(records: list[Record]) -> dict[str, float]:
    """The figures of behaviour of a validation, latencies left out."""
    figures = behaviour([read_history(record) for record in records])
    return {name: value for name, value in figures.items() if "latency" not in name}


def em_by_length(records: list[Record]) -> list[float]:
    """Exact match of the trajectories by quarter of their number of own tokens, shortest first."""
    shortest_first = sorted(records, key=lambda record: num_tokens(record, "model"))
    quarters = np.array_split(np.array([em_of(r) for r in shortest_first]), 4)
    return [float(quarter.mean()) for quarter in quarters if len(quarter)]


def em_of(record: Record) -> float:
    return record["reward"].get("em", 0.0)


def searches_by_hops(records: list[Record]) -> dict[str, float]:
    """Mean searches of questions by their number of hops, and Spearman's rank correlation of both;
    empty where not all questions have a known number, or all the same."""
    groups = by_hops(records)
    if len(groups) < 2 or sum(map(len, groups.values())) < len(records):
        return {}
    pairs = [(hops, len(read_searches(r))) for hops, group in groups.items() for r in group]
    hops, searches = zip(*pairs, strict=True)
    means = {
        str(count): statistics.mean(len(read_searches(r)) for r in group)
        for count, group in sorted(groups.items())
    }
    # without a difference in searches there is no rank to correlate
    if len(set(searches)) == 1:
        return means
    ranks = np.corrcoef(rankdata(hops), rankdata(searches))
    return {**means, "spearman": float(ranks[0, 1])}


def searched(records: list[Record]) -> float:
    """Share of the records with a search: of questions that the base knows, the over-search share.

    Asking the trained policy what it knows would beg the question (docs/results/evaluation.md).
    """
    return sum(bool(read_searches(record)) for record in records) / len(records)


def ended(records: list[Record]) -> dict[str, float]:
    """Share of the records that ended for each reason."""
    counts = Counter(record["stop_reason"] for record in records)
    return {reason: count / len(records) for reason, count in sorted(counts.items())}


def contexts(records: list[Record]) -> dict[str, float]:
    """Per record: how often its context was folded, and how many contexts it had in all."""
    return {
        "folds": statistics.mean(record["info"].get("folds", 0) for record in records),
        "contexts": statistics.mean(1 + len(record.get("rewrites", ())) for record in records),
    }


def mean_of(metrics: list[dict[str, Any]], prefix: str) -> dict[str, float]:
    """Mean over the training steps of every metric under `prefix`; where a step lacks one it counts
    0."""
    names = sorted({key for line in metrics for key in line if key.startswith(prefix)})
    return {
        n.removeprefix(prefix): sum(line.get(n) or 0.0 for line in metrics) / len(metrics)
        for n in names
    }


def table(rows: list[study.Row]) -> str:
    """Markdown: final score, EM and searches by set, trajectories until REACHED, collapses."""
    sets = sorted({source for row in rows for source in row["last"]})
    head = [
        "run",
        "score",
        *(f"EM {s}" for s in sets),
        *(f"searches {s}" for s in sets),
        f"samples to a score of {REACHED}",
        "optimizer steps",
        "collapses",
        "minutes",
    ]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        em = [f"{row['last'][s]['EM']:.3f}" if s in row["last"] else "-" for s in sets]
        searches = [f"{row['last'][s]['searches']:.2f}" if s in row["last"] else "-" for s in sets]
        reached = "-" if row["samples_to_reach"] is None else f"{row['samples_to_reach']:,}"
        end = [
            reached,
            f"{row['optimizer_steps']:.0f}",
            str(row["collapses"]),
            f"{row['wall_s'] / 60:.1f}",
        ]
        lines.append([row["run"], f"{row['curve'][-1][1]:.3f}", *em, *searches, *end])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def curve_of(row: study.Row) -> list[tuple[int, float]]:
    """The exact match after each validation, the mean of the sets; the score in older rows.

    A score may hold more than the exact match, and then it cannot be compared with another one.
    """
    if not row.get("em"):
        return row["curve"]
    sets = [dict(curve) for curve in row["em"].values()]
    return [(n, statistics.mean(curve[n] for curve in sets)) for n in sets[0]]


def plot(rows: list[study.Row], path: Path) -> None:
    """Exact match of the validations over sampled trajectories, a line per run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axis = figure.subplots()
    by_name: dict[str, list[study.Row]] = defaultdict(list)
    for row in rows:
        by_name[row["run"].rpartition("-seed")[0]].append(row)
    for index, (name, seeds) in enumerate(by_name.items()):
        for place, row in enumerate(seeds):
            label = None if place else name
            axis.plot(*zip(*curve_of(row), strict=True), color=f"C{index}", label=label, alpha=0.8)
    axis.set(xlabel="trajectories sampled", ylabel="exact match")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sweep", type=Path, metavar="SWEEP.yaml", help="what to run")
    parser.add_argument(
        "runs", nargs="*", metavar="RUN", help="some of its runs, as NAME-seedN (default: all)"
    )
    parser.add_argument(
        "--rows", type=Path, help="file of rows (default: docs/results/SWEEP.jsonl)"
    )
    parser.add_argument(
        "--commit", action="store_true", help="commit the file of rows after every run"
    )
    args = parser.parse_args()
    rows = (args.rows or study.ROOT / "docs" / "results" / f"{args.sweep.stem}.jsonl").resolve()
    runs = read_sweep(args.sweep)
    if unknown := sorted(set(args.runs) - set(runs)):
        parser.error(f"unknown runs: {', '.join(unknown)}; there are {', '.join(runs)}")
    for name in args.runs or runs:
        command, status = runs[name]
        folder = study.ROOT / folder_of(args.sweep, name)
        study.run_missing(
            name, [command], rows, lambda _, folder=folder: figures(folder), args.commit, status
        )
    found = study.read_rows(rows)
    sys.stdout.write(table(found))
    if found:
        plot(found, rows.with_suffix(".png"))


if __name__ == "__main__":
    main()
