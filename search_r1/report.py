"""What a run has learned: a table of its validations by question type, and the curves of its
training."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from search_r1.evaluation.behaviour import behaviour, read_history

HEADER = ("questions", "n", "EM", "searches", "answered", "right entity", "EM if gold retrieved")
STEP = "training/global_step"


def write_report(run_dir: Path) -> str:
    """Writes report.md and curves.png to `run_dir`; returns the text to show."""
    files = sorted((run_dir / "trajectories").glob("val_*.jsonl"))
    sections = [
        (f"step {int(path.stem.removeprefix('val_'))}", [json.loads(line) for line in path.open()])
        for path in ([files[0], files[-1]] if len(files) > 1 else files)
    ]
    text = "\n".join(f"\n{name}\n{table(records)}" for name, records in sections)
    (run_dir / "report.md").write_text(text.strip() + "\n")
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").open()]
    plot(rows, run_dir / "curves.png")
    return f"{text}\n\ncurves: {run_dir / 'curves.png'}\nrun folder: {run_dir}\n"


def table(records: list[dict[str, Any]]) -> str:
    """Markdown: one row per data source, one for all."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        groups[record["data_source"]].append(record)
    groups["all"] = records
    lines = [HEADER, tuple("-" * len(h) for h in HEADER)]
    for name, group in groups.items():
        values = (
            "-" if v is None else f"{v:.2f}" if k == "searches" else f"{v:.3f}"
            for k, v in summary(group).items()
        )
        lines.append((name, str(len(group)), *values))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def summary(records: list[dict[str, Any]]) -> dict[str, float | None]:
    """EM, executed searches, share answered; search policy and reading apart, where gold passages
    are known."""
    found = behaviour([read_history(record) for record in records])
    return {
        "EM": sum(r["reward"].get("em", 0.0) for r in records) / len(records),
        "searches": found["searches"],
        "answered": found["answered"],
        "right entity": found.get("gold_retrieved"),
        "EM if gold retrieved": found.get("right_if_gold_retrieved"),
    }


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Reward, executed searches, lengths and validation score over training steps (the paper's
    figures 2 and 3)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6), constrained_layout=True)
    panels = [
        ("reward", ["critic/score/mean", "val/test_score/all"]),
        ("searches per question", ["env/number_of_valid_search"]),
        ("tokens per response", ["response_length/mean", "response_length_model/mean"]),
    ]
    for axis, (title, keys) in zip(axes, panels, strict=True):
        for key in keys:
            points = [(r[STEP], r[key]) for r in rows if r.get(key) is not None]
            if points:
                axis.plot(
                    *zip(*points, strict=True),
                    label=key,
                    marker="o" if key.startswith("val/") else None,
                )
        axis.set(title=title, xlabel="training step")
        if axis.lines:
            axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)
