"""Draws the curves of the gallery that no study draws itself, from the rows in docs/results.

python scripts/bench/gallery.py
"""

import json
from pathlib import Path

from sweep import plot

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"
STUDIES = {"collapse": 1, "tools": 240}
"""The rows to draw, and how many trajectories a unit of their curves is."""

if __name__ == "__main__":
    for name, unit in STUDIES.items():
        lines = (RESULTS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        for row in rows:
            points = row["curve"].items() if isinstance(row["curve"], dict) else row["curve"]
            row["curve"] = [(int(place) * unit, score) for place, score in points]
            if row["run"].startswith("seed"):
                row["run"] = f"search and a program-{row['run']}"
        plot(rows, RESULTS / f"{name}.png")
