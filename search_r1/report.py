"""Reports what a run has learned: a table of its validations, and the curves of its training."""

import json
from pathlib import Path
from typing import Any

from search_r1.evaluation.behaviour import behaviour, read_history
from search_r1.evaluation.summary import ALL, by_set
from search_r1.trajectory import Record
from verl.utils.tracking import STEP

HEADER = ("questions", "n", "EM", "searches", "answered", "gold retrieved", "EM if gold retrieved")


def write_report(run_dir: Path) -> str:
    """Writes report.md and curves.png to `run_dir`; returns the text to show."""
    files = sorted((run_dir / "trajectories").glob("val_*.jsonl"))
    first_and_last = [files[0], files[-1]] if len(files) > 1 else files
    text = "\n".join(section(path) for path in first_and_last)
    (run_dir / "report.md").write_text(text.strip() + "\n")
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").open()]
    plot(rows, run_dir / "curves.png")
    return f"{text}\n\ncurves: {run_dir / 'curves.png'}\nrun folder: {run_dir}\n"


def section(path: Path) -> str:
    """The step of a validation, and its table."""
    step = int(path.stem.removeprefix("val_"))
    return f"\nstep {step}\n{table([json.loads(line) for line in path.open()])}"


def table(records: list[Record]) -> str:
    """A Markdown table with a row for each data source and one for all."""
    groups = {**by_set(records), ALL: records}
    lines = [HEADER, tuple("-" * len(h) for h in HEADER)]
    for name, group in groups.items():
        cells = [cell(figure, value) for figure, value in summary(group).items()]
        lines.append((name, str(len(group)), *cells))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cell(figure: str, value: float | None) -> str:
    """A figure as text, a dash where it is unknown."""
    if value is None:
        return "-"
    return f"{value:.2f}" if figure == "searches" else f"{value:.3f}"


def summary(records: list[Record]) -> dict[str, float | None]:
    """The figures of a row of the table. Without known gold passages the last two are None."""
    found = behaviour([read_history(record) for record in records])
    return {
        "EM": sum(r["reward"].get("em", 0.0) for r in records) / len(records),
        "searches": found["searches"],
        "answered": found["answered"],
        "gold retrieved": found.get("gold_retrieved"),
        "EM if gold retrieved": found.get("right_if_gold_retrieved"),
    }


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draws rewards, searches and lengths over training steps (the paper's figures 2 and 3)."""
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
            points = [(row[STEP], row[key]) for row in rows if row.get(key) is not None]
            marker = "o" if key.startswith("val/") else None
            if points:
                axis.plot(*zip(*points, strict=True), label=key, marker=marker)
        axis.set(title=title, xlabel="training step")
        if axis.lines:
            axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)
