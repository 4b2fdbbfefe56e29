"""The first-light study: every run of docs/results/first_light.md, one after the other, each on the
whole machine.

    python scripts/bench/first_light.py [RUN ...]

A finished run appends its row to docs/results/first_light.jsonl and is not run again; an
interrupted one resumes from its last checkpoint. Prints the table of all rows.
"""

import json
import sys

import study

from search_r1.report import summary
from verl.utils.tracking import STEP

ROWS = study.ROOT / "docs" / "results" / "first_light.jsonl"
WORK = "runs/first_light"
SAMPLES = f"{WORK}/rejection-samples"
SFT_ROWS = f"{WORK}/rejection.jsonl"
SFT_MODEL = f"{WORK}/rejection-model"
VAL_ONLY = ["bash", "train_grpo.sh", "trainer.val_only=true"]
SAMPLE_OFTEN = [
    "actor_rollout_ref.rollout.val_kwargs.temperature=1",
    "actor_rollout_ref.rollout.val_kwargs.n",
]


def grpo(*overrides: str) -> list[list[str]]:
    return [["bash", "train_grpo.sh", *overrides]]


RUNS: dict[str, list[list[str]]] = {
    **{f"grpo-seed{s}": grpo(f"trainer.seed={s}") for s in range(3)},
    **{f"ppo-seed{s}": [["bash", "train_ppo.sh", f"trainer.seed={s}"]] for s in range(3)},
    "base-pass16": [[*VAL_ONLY, SAMPLE_OFTEN[0], f"{SAMPLE_OFTEN[1]}=16"]],
    "random-reward": grpo("reward.em=0", "reward.random=1"),
    "no-search": grpo("do_search=false"),
    "rejection-sft": [
        [
            *VAL_ONLY,
            "data.val_files=data/closed_world/train.parquet",
            *SAMPLE_OFTEN[:1],
            f"{SAMPLE_OFTEN[1]}=5",
            f"trainer.default_local_dir={SAMPLES}",
        ],
        [
            sys.executable,
            "-m",
            "search_r1.data.rejection",
            "--out",
            SFT_ROWS,
            "--trajectories",
            f"{SAMPLES}/trajectories/val_000000.jsonl",
        ],
        [
            sys.executable,
            "-m",
            "verl.trainer.sft",
            "model.path=data/closed_world/base",
            f"train_files=[{SFT_ROWS}]",
            f"output={SFT_MODEL}",
            "optim.lr=1e-4",
            "fsdp.dtype=float32",
            "total_training_steps=300",
        ],
        [*VAL_ONLY, f"actor_rollout_ref.model.path={SFT_MODEL}"],
    ],
}


def commands(name: str) -> list[list[str]]:
    """The commands of a run, the last of which writes the folder that its row is made of."""
    *before, last = RUNS[name]
    return [
        *before,
        [
            *last,
            f"trainer.default_local_dir={WORK}/{name}",
            f"trainer.experiment_name=first_light-{name}",
        ],
    ]


def figures(name: str) -> study.Row:
    """What a run folder holds: validations by hops, and the extremes of what must stay small."""
    folder = study.ROOT / WORK / name
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    row: study.Row = {"steps": metrics[-1][STEP]}
    seconds = sorted(m["timing_s/step"] for m in metrics if "timing_s/step" in m)
    gaps = [m["rollout/logprob_diff_max"] for m in metrics if "rollout/logprob_diff_max" in m]
    row |= (
        {"step_s/median": seconds[len(seconds) // 2], "logprob_diff/max": max(gaps)}
        if seconds
        else {}
    )
    for key in ("rollout/context_violations", "rollout/failed"):
        row[key] = sum(m.get(key, 0) for m in metrics)
    row |= {k: v for k, v in metrics[-1].items() if k.startswith("val/pass@")}
    row["curve"] = {m[STEP]: m["val/test_score/all"] for m in metrics if "val/test_score/all" in m}
    files = sorted((folder / "trajectories").glob("val_*.jsonl"))
    for label, path in {"before": files[0], "after": files[-1]}.items():
        records = [json.loads(line) for line in path.open()]
        for hops in (1, 2):
            some = summary([r for r in records if r["extra_info"]["hops"] == hops])
            row[f"{label}/{hops}-hop"] = {
                k: v if v is None else round(v, 4) for k, v in some.items()
            }
        row[f"{label}/EM"] = round(sum(r["reward"]["em"] for r in records) / len(records), 4)
    return row


def table(rows: list[study.Row]) -> str:
    """Markdown: EM before and after, by hops, with searches, policy and reading of the last
    validation."""
    head = (
        "run",
        "steps",
        "minutes",
        "EM before",
        "EM after",
        "1-hop",
        "2-hop",
        "searches 1-hop",
        "searches 2-hop",
        "gold retrieved",
        "EM if gold retrieved",
        "max log-prob diff",
    )
    lines = [head, tuple("-" * len(h) for h in head)]
    for row in rows:
        hops = row["after/1-hop"], row["after/2-hop"]
        lines.append(
            (
                row["run"],
                str(row["steps"]),
                f"{row['wall_s'] / 60:.1f}",
                f"{row['before/EM']:.3f}",
                f"{row['after/EM']:.3f}",
                *(f"{hop['EM']:.3f}" for hop in hops),
                *(f"{hop['searches']:.2f}" for hop in hops),
                *(
                    " / ".join("-" if hop[k] is None else f"{hop[k]:.3f}" for hop in hops)
                    for k in head[9:11]
                ),
                f"{row['logprob_diff/max']:.1e}" if "logprob_diff/max" in row else "-",
            )
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


if __name__ == "__main__":
    study.main(__doc__ or "", {name: commands(name) for name in RUNS}, ROWS, figures, table)
