"""The paper's table in the closed world: every method that its small model can follow, trained and
evaluated.

    python scripts/bench/closed_world_table.py [RUN ...] [--commit]

A finished run appends its row to docs/results/evaluation.jsonl and is not run again; an interrupted
one goes on. Prints the table of all rows. Questions: 500 held-out of one and two hops, 250 of
three, 33 about common facts.
"""

import json
import sys
from typing import Any

import study

ROWS = study.ROOT / "docs" / "results" / "evaluation.jsonl"
WORK = "runs/closed_world_table"
BASE = "data/closed_world/base"
SETS = ("common", "1hop", "2hop", "3hop")
FILES = (
    "data.val_files=["
    + ",".join(f"data/closed_world/test{f}.parquet" for f in ("", "_common", "_3hop"))
    + "]"
)


def evaluate(model: str, folder: str, *overrides: str) -> list[str]:
    where = f"trainer.default_local_dir={WORK}/{folder}"
    return [sys.executable, "-m", "search_r1.evaluate", model, FILES, where, *overrides]


def train(name: str, script: str, *overrides: str) -> list[str]:
    return [
        "bash",
        script,
        f"trainer.default_local_dir={WORK}/{name}",
        f"trainer.experiment_name={name}",
        *overrides,
    ]


def hf(name: str) -> str:
    return f"{WORK}/{name}/hf"


def searching(name: str, model: str) -> list[str]:
    """The evaluation of a model that may search. What counts as known is what the base answers
    without: asked of the trained model itself it would be begging the question, for its first turn
    is the same with and without search."""
    return [
        *evaluate(model, f"{name}/evaluation"),
        "--closed-book",
        f"{WORK}/direct/evaluation/evaluation.jsonl",
    ]


RUNS: dict[str, list[list[str]]] = {
    "direct": [evaluate(BASE, "direct/evaluation", "method=direct", "template=short")],
    "rag": [evaluate(BASE, "rag/evaluation", "method=rag", "template=short_rag")],
    "base": [searching("base", BASE)],
    "sft": [
        train("sft", "train_grpo.sh", "method=sft", "template=short"),
        evaluate(hf("sft"), "sft/evaluation", "method=sft", "template=short"),
    ],
    "r1": [
        train("r1", "train_grpo.sh", "method=r1", "template=short"),
        evaluate(hf("r1"), "r1/evaluation", "method=r1", "template=short"),
    ],
    "rejection": [
        train("rejection", "train_grpo.sh", "method=rejection"),
        searching("rejection", hf("rejection")),
    ],
    "ppo": [train("ppo", "train_ppo.sh"), searching("ppo", hf("ppo"))],
    "grpo": [train("grpo", "train_grpo.sh"), searching("grpo", hf("grpo"))],
}


def figures(name: str) -> study.Row:
    """Scores and behaviour by set, as summary.json of the run's evaluation has them."""
    summary: dict[str, Any] = json.loads(
        (study.ROOT / WORK / name / "evaluation" / "summary.json").read_text()
    )
    kept = ("questions", "em", "em_interval", "f1", "f1_interval", "behaviour", "search_counts")
    return {key: {k: summary[f"closed_world_{key}"][k] for k in kept} for key in SETS}


def table(rows: list[study.Row]) -> str:
    """Markdown: EM with intervals, then searches, over- and under-search, by set."""
    head = [
        "method",
        *SETS,
        *(f"searches {s}" for s in SETS),
        "over-search common",
        "under-search 1-3 hop",
        "minutes",
    ]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        cells = [
            f"{row[s]['em']:.3f} ({row[s]['em_interval'][0]:.3f}-{row[s]['em_interval'][1]:.3f})"
            for s in SETS
        ]
        searches = [f"{row[s]['behaviour']['searches']:.2f}" for s in SETS]
        over = row["common"]["behaviour"].get("over_search")
        under = None
        if over is not None:
            hops = [row[s] for s in SETS[1:]]
            unknown = [hop["questions"] * (1 - hop["behaviour"]["known"]) for hop in hops]
            shares = [hop["behaviour"]["under_search"] for hop in hops]
            under = sum(n * share for n, share in zip(unknown, shares, strict=True)) / sum(unknown)
        rates = ["-" if rate is None else f"{rate:.3f}" for rate in (over, under)]
        lines.append([row["run"], *cells, *searches, *rates, f"{row['wall_s'] / 60:.1f}"])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


if __name__ == "__main__":
    study.main(__doc__ or "", RUNS, ROWS, figures, table)
