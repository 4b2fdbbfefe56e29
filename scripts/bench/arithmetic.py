"""Search and a program in turn: the study of docs/results/tools.md, three seeds and two controls.

    python scripts/bench/arithmetic.py [RUN ...]

A finished run appends its row to docs/results/tools.jsonl and is not run again; an interrupted one
resumes from its last checkpoint. Prints the table of all rows: by kind of question, the share of
right answers and how often each tool was called, before and after.
"""

import json
from pathlib import Path

import study

from search_r1.evaluation.behaviour import behaviour, read_history
from search_r1.evaluation.summary import by_set
from search_r1.report import summary
from verl.utils.tracking import STEP

ROWS = study.ROOT / "docs" / "results" / "tools.jsonl"
WORK = "runs/arithmetic"
KINDS = ("year", "interval", "age")
OVERRIDES = {
    **{f"seed{seed}": [f"trainer.seed={seed}"] for seed in range(3)},
    "no-python": ["agent.tools=[]"],
    "no-search": ["do_search=false"],
}


def command(name: str) -> list[str]:
    """The command of a run."""
    return [
        *("bash", "train_grpo.sh", "experiment=closed_world/arithmetic_grpo", *OVERRIDES[name]),
        f"trainer.default_local_dir={WORK}/{name}",
        f"trainer.experiment_name=arithmetic-{name}",
    ]


def validation(path: Path) -> study.Row:
    """The figures of a validation by the kind of question."""
    sets = by_set([json.loads(line) for line in path.open()])
    found: study.Row = {}
    for kind in KINDS:
        records = sets[f"closed_world_{kind}"]
        figures = behaviour([read_history(record) for record in records])
        found[kind] = {
            "n": len(records),
            "EM": summary(records)["EM"],
            "searches": figures["searches"],
            "programs": figures.get("calls/python", 0.0),
            "gold_retrieved": figures["gold_retrieved"],
        }
    return found


def figures(name: str) -> study.Row:
    """What a run folder holds: its first and its last validation, and the curve between them."""
    folder = study.ROOT / WORK / name
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    files = sorted((folder / "trajectories").glob("val_*.jsonl"))
    gaps = [m["rollout/logprob_diff_max"] for m in metrics if "rollout/logprob_diff_max" in m]
    seconds = sorted(m["timing_s/step"] for m in metrics if "timing_s/step" in m)
    return {
        "steps": metrics[-1][STEP],
        "step_s/median": seconds[len(seconds) // 2],
        "logprob_diff/max": max(gaps),
        "curve": {m[STEP]: m["val/test_score/all"] for m in metrics if "val/test_score/all" in m},
        "before": validation(files[0]),
        "after": validation(files[-1]),
    }


def table(rows: list[study.Row]) -> str:
    """Markdown: a row for each run and kind of question."""
    head = ("run", "kind", "n", "EM", "searches", "programs", "gold retrieved")
    lines = [head, tuple("-" * len(h) for h in head)]
    for row in rows:
        for kind in KINDS:
            before, after = row["before"][kind], row["after"][kind]
            cells = [
                f"{before[key]:{form}} -> {after[key]:{form}}"
                for key, form in (
                    ("EM", ".3f"),
                    ("searches", ".2f"),
                    ("programs", ".2f"),
                    ("gold_retrieved", ".3f"),
                )
            ]
            lines.append((row["run"], kind, str(after["n"]), *cells))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


if __name__ == "__main__":
    study.main(__doc__ or "", {name: [command(name)] for name in OVERRIDES}, ROWS, figures, table)
