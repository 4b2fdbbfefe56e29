"""Rejection sampling on the questions of scripts/sweeps/credit.yaml, beside GRPO and a teacher.

    python scripts/bench/rejection.py [RUN ...] [--commit]
    python scripts/bench/arms.py docs/results/rejection.jsonl --base outcome \
           --with docs/results/credit.jsonl

Each of three rounds samples 3,600 trajectories, five of each of 720 training questions, and trains
on those that are right; the model of each round is validated on the same questions as the sweep's.
So its rows compare with the sweep's at equal trajectories. A finished run appends its row to
docs/results/rejection.jsonl and is not run again; an interrupted one goes on.
"""

import json
import sys

import study

ROWS = study.ROOT / "docs" / "results" / "rejection.jsonl"
WORK = "runs/rejection"
RECIPE = "experiment=closed_world/credit_grpo"
BASE = "data/closed_world/base"
ROUNDS = 3
QUESTIONS = 720
SAMPLES = 5
STEPS = 60
"""Optimizer steps of a round, on 64 rows each. GRPO takes 15 for as many trajectories."""


def train(seed: int) -> list[str]:
    """The command that samples and trains all rounds."""
    return [
        "bash",
        "train_grpo.sh",
        "method=rejection",
        RECIPE,
        f"finetune.rounds={ROUNDS}",
        f"finetune.samples={SAMPLES}",
        f"finetune.steps={STEPS}",
        f"data.train_data_num={QUESTIONS}",
        f"data.train_sample_seed={seed}",
        f"trainer.seed={seed}",
        f"trainer.experiment_name=rejection-seed{seed}",
        f"trainer.default_local_dir={WORK}/seed{seed}",
    ]


def evaluate(seed: int, number: int) -> list[str]:
    """The command that validates the model of a round; round 0 is the base."""
    folder = f"{WORK}/seed{seed}"
    where = f"trainer.default_local_dir={folder}/evaluation_{number}"
    model = f"{folder}/round_{number}/hf" if number else BASE
    return [sys.executable, "-m", "search_r1.evaluate", model, RECIPE, where]


def commands(seed: int) -> list[list[str]]:
    return [train(seed), *(evaluate(seed, number) for number in range(ROUNDS + 1))]


RUNS = {f"rejection-seed{seed}": commands(seed) for seed in range(3)}


def figures(name: str) -> study.Row:
    """Exact match of each set after each round, in the form of a sweep's rows."""
    folder = study.ROOT / WORK / name.removeprefix("rejection-")
    em: dict[str, list[tuple[int, float]]] = {}
    for number in range(ROUNDS + 1):
        text = (folder / f"evaluation_{number}" / "summary.json").read_text()
        for source, found in json.loads(text).items():
            if source not in ("all", "average"):
                em.setdefault(source, []).append((number * QUESTIONS * SAMPLES, found["em"]))
    kept = [
        sum(1 for _ in (folder / f"round_{number}" / "rows.jsonl").open())
        for number in range(1, ROUNDS + 1)
    ]
    return {"em": em, "kept": kept}


def table(rows: list[study.Row]) -> str:
    """Markdown: exact match by set after each round, and how many trajectories were trained on."""
    text = "| run | round | trained on | exact match |\n|---|---|---|---|\n"
    for row in rows:
        for place, kept in enumerate(row["kept"], 1):
            scores = ", ".join(f"{name} {curve[place][1]:.2f}" for name, curve in row["em"].items())
            text += f"| {row['run']} | {place} | {kept:,} | {scores} |\n"
    return text


if __name__ == "__main__":
    study.main(__doc__ or "", RUNS, ROWS, figures, table)
