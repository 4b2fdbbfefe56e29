"""200 unattended steps on the closed world with a fault every 25, beside as many undisturbed ones.

    python scripts/bench/faults.py [RUN ...] [--commit]

Replica, training rank, retriever and driver are killed in turn (SIGKILL), each in the middle of a
rollout. A row per run: curve of the validations, restarts, and memory of every kind of process, as
it was after a quarter of the run and at its end; docs/results/faults.png shows all of it. An
interrupted run resumes, its faults so far not repeated.
"""

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import psutil
import study
import sweep

STEPS = 200
EVERY = 25
ROWS = study.ROOT / "docs" / "results" / "faults.jsonl"
FAULTS = ("replica", "rank", "retriever", "driver")
TITLES = {
    "replica": "ray::VLLMServer",
    "rank": "ray::WorkerHost",
    "retriever": "search_r1.search.retrieval_server",
    "driver": "verl.trainer.main_ppo",
    "engine": "VLLM::EngineCore",
    "agent worker": "ray::AgentLoopWorker",
    "raylet": "raylet/raylet",
    "gcs": "gcs/gcs_server",
}
SAMPLE_S = 10.0


def folder_of(run: str) -> Path:
    return study.ROOT / "runs" / "faults" / run


def processes(root: psutil.Process) -> dict[str, list[psutil.Process]]:
    """The processes under `root` by kind; of supervisor and driver, which have one title, the
    driver is the younger."""
    found: dict[str, list[psutil.Process]] = defaultdict(list)
    for process in root.children(recursive=True):
        try:
            title = " ".join(process.cmdline())
        except psutil.Error:
            continue
        for kind, part in TITLES.items():
            if part in title:
                found[kind].append(process)
    found["supervisor"] = found["driver"][:1]
    found["driver"] = found["driver"][1:]
    return found


def step_reached(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return max((json.loads(line)[sweep.STEP] for line in lines), default=0)


def sample_memory(folder: Path, found: dict[str, list[psutil.Process]], step: int) -> None:
    """Appends MB of unshared memory by kind of process."""
    usage: dict[str, float] = {}
    for kind, members in found.items():
        for process in members:
            try:
                memory = process.memory_info()
            except psutil.Error:
                continue
            usage[kind] = usage.get(kind, 0.0) + (memory.rss - memory.shared) / 2**20
    with (folder / "memory.jsonl").open("a") as file:
        file.write(json.dumps({"time": time.time(), "step": step, **usage}) + "\n")


def run(name: str) -> None:
    """The training, watched; with faults if it is the disturbed one."""
    folder = folder_of(name)
    folder.mkdir(parents=True, exist_ok=True)
    overrides = [
        f"trainer.total_training_steps={STEPS}",
        "trainer.save_freq=10",
        "trainer.test_freq=50",
        "trainer.seed=5",
    ]
    overrides += [
        "trainer.hang_timeout_s=300",
        "trainer.rollout_data_freq=50",
        f"trainer.experiment_name=faults-{name}",
    ]
    overrides += [f"trainer.default_local_dir={folder.relative_to(study.ROOT)}"]
    training = subprocess.Popen(["bash", "train_grpo.sh", *overrides], cwd=study.ROOT)
    root = psutil.Process(training.pid)
    sampled = 0.0
    done = folder / "faults.jsonl"
    while training.poll() is None:
        time.sleep(0.5)
        found = processes(root)
        step = step_reached(folder)
        if time.monotonic() - sampled > SAMPLE_S:
            sample_memory(folder, found, step)
            sampled = time.monotonic()
        past = [json.loads(line) for line in done.open()] if done.exists() else []
        due = EVERY * (len(past) + 1)
        if name == "disturbed" and due <= step < STEPS:
            kind = FAULTS[len(past) % len(FAULTS)]
            time.sleep(1.0)  # into the rollout of the next step
            if victims := found[kind]:
                os.kill(victims[0].pid, signal.SIGKILL)
                with done.open("a") as file:
                    file.write(json.dumps({"step": step, "killed": kind}) + "\n")
    if training.returncode:
        raise SystemExit(f"error: the training ended with status {training.returncode}")


def figures(name: str) -> study.Row:
    """What the run leaves: scores, faults and restarts, and memory after a quarter of the steps and
    at the end."""
    folder = folder_of(name)
    lines = {file: read(folder / f"{file}.jsonl") for file in ("faults", "restarts", "memory")}
    late = [line for line in lines["memory"] if line["step"] >= STEPS // 4]
    ends = {"quarter": late[: len(late) // 6], "end": late[-(len(late) // 6) :]}
    memory = {
        kind: {
            when: round(statistics.median(s[kind] for s in part if kind in s))
            for when, part in ends.items()
        }
        for kind in TITLES
    }
    return {
        **sweep.figures(folder),
        "faults": lines["faults"],
        "restarts": lines["restarts"],
        "memory_mb": memory,
    }


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.open()] if path.exists() else []


def table(rows: list[study.Row]) -> str:
    """Markdown: scores, faults, memory; and the plot beside the rows."""
    lines = ["| run | EM | faults | restarts | " + " | ".join(f"{k}, MB" for k in TITLES) + " |"]
    lines.append("|" + "---|" * (4 + len(TITLES)))
    for row in rows:
        memory = [
            f"{row['memory_mb'][k]['quarter']} -> {row['memory_mb'][k]['end']}" for k in TITLES
        ]
        counts = [str(len(row["faults"])), str(len(row["restarts"]))]
        lines.append(
            "| " + " | ".join([row["run"], f"{row['curve'][-1][1]:.3f}", *counts, *memory]) + " |"
        )
    if rows:
        plot(rows, ROWS.with_suffix(".png"))
    return "\n".join(lines) + "\n"


def plot(rows: list[study.Row], path: Path) -> None:
    """Memory of every kind of process over the minutes of the run; a line where something was
    killed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5 * len(rows)), layout="constrained")
    for axis, row in zip(figure.subplots(len(rows), 1, squeeze=False)[:, 0], rows, strict=True):
        memory = read(folder_of(row["run"]) / "memory.jsonl")
        for kind in TITLES:
            samples = [((s["time"] - memory[0]["time"]) / 60, s[kind]) for s in memory if kind in s]
            axis.plot(*zip(*samples, strict=True), label=kind)
        for fault in row["faults"]:
            at = next((s["time"] for s in memory if s["step"] >= fault["step"]), memory[-1]["time"])
            axis.axvline((at - memory[0]["time"]) / 60, color="gray", linewidth=0.5)
        axis.set(title=row["run"], xlabel="minutes", ylabel="unshared memory, MB", ylim=(0, None))
        axis.legend(fontsize=7, ncols=4)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    own = [sys.executable, str(Path(__file__).resolve()), "--watch"]
    if sys.argv[1:2] == ["--watch"]:
        run(sys.argv[2])
    else:
        study.main(
            __doc__,
            {name: [[*own, name]] for name in ("undisturbed", "disturbed")},
            ROWS,
            figures,
            table,
        )
