"""Runs what only a GPU can tell, on one card, in the order of risk, in ten minutes, without a
network.

    bash scripts/bench/gpu.sh [--python PATH] [--device cpu] [--only STAGE ...] [--budget SECONDS]

Every stage is a process with a time limit of its own. One that fails does not stop the others,
except those that it makes pointless. Leaves runs/gpu_smoke.json and runs/gpu_smoke.html: status,
seconds and figures of every stage, and the end of the output of those that failed. Exit status 1
if one did. `--device cpu` rehearses the stages on a machine without a GPU: small, slower limits.
"""

import argparse
import html
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BENCH = "scripts/bench"
MARK = "RESULT "
"""A line of a stage's output that begins with it holds its figures, as JSON. The last one
counts."""
FALLBACK = "fallback"
"""Figure with which a stage that failed says under which environment the stages after it may
run."""
TAIL_LINES = 40
CPU_SLOWNESS = 10
"""Limits are so many times longer in a rehearsal on the CPU."""
OFFLINE = {
    "WANDB_MODE": "offline",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "RAY_USAGE_STATS_ENABLED": "0",
}


@dataclass(frozen=True)
class Stage:
    """A question, and the command that answers it."""

    name: str
    question: str
    command: list[str]
    limit_s: float
    needs: tuple[str, ...] = ("versions",)
    """Stages without whose success it is left out."""


@dataclass
class Outcome:
    """What became of a stage: ok, failed, timeout or skipped."""

    name: str
    question: str
    status: str
    seconds: float = 0.0
    limit_s: float = 0.0
    why: str = ""
    figures: dict[str, Any] = field(default_factory=dict)
    tail: str = ""
    """The last lines of its output, where it did not succeed."""


def run_all(stages: Sequence[Stage], env: Mapping[str, str], budget_s: float) -> list[Outcome]:
    """Runs the stages one after the other and says on the console how each went."""
    outcomes: dict[str, Outcome] = {}
    env = dict(env)
    ends = time.monotonic() + budget_s
    for stage in stages:
        left = ends - time.monotonic()
        if why := reason_to_skip(stage, outcomes, left):
            outcome = Outcome(stage.name, stage.question, "skipped", why=why)
        else:
            outcome = run_stage(stage, env, min(stage.limit_s, left))
        env |= outcome.figures.get(FALLBACK, {})
        outcomes[stage.name] = outcome
        sys.stdout.write(line_of(outcome) + "\n")
        sys.stdout.flush()
    return list(outcomes.values())


def reason_to_skip(stage: Stage, outcomes: Mapping[str, Outcome], left_s: float) -> str:
    """Why a stage is left out, or nothing. A needed stage that was not asked for is no obstacle."""
    for name in stage.needs:
        before = outcomes.get(name)
        if before is not None and before.status != "ok" and FALLBACK not in before.figures:
            return f"{name} {before.status}"
    return "the time is up" if left_s <= 0 else ""


def run_stage(stage: Stage, env: Mapping[str, str], limit_s: float) -> Outcome:
    """Runs one, and ends it with all its children when its time is up."""
    began = time.monotonic()
    process = subprocess.Popen(
        stage.command,
        cwd=ROOT,
        env=dict(env),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    status = "ok"
    why = ""
    try:
        output, _ = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        status = "timeout"
        why = f"not done within {limit_s:.0f} s"
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
    if status == "ok" and process.returncode:
        status = "failed"
        why = f"exit status {process.returncode}"
    outcome = Outcome(stage.name, stage.question, status, limit_s=limit_s, why=why)
    outcome.seconds = round(time.monotonic() - began, 1)
    outcome.figures = figures_of(output)
    if status != "ok":
        outcome.tail = "\n".join(output.splitlines()[-TAIL_LINES:])
    return outcome


def figures_of(output: str) -> dict[str, Any]:
    """What the last line of a stage's output that is marked holds."""
    marked = [line for line in output.splitlines() if line.startswith(MARK)]
    return json.loads(marked[-1].removeprefix(MARK)) if marked else {}


def line_of(outcome: Outcome) -> str:
    """A stage in one line of the console."""
    text = f"{outcome.status:8} {outcome.name:14} {outcome.seconds:6.1f} s"
    shown = {key: value for key, value in outcome.figures.items() if key != FALLBACK}
    details = [outcome.why] if outcome.why else []
    details += [f"{key} {value}" for key, value in shown.items() if not isinstance(value, list)]
    return f"{text}  {'; '.join(details)}"


def page(report: Mapping[str, Any]) -> str:
    """One HTML page that needs no other file."""
    rows = []
    outputs = []
    for stage in report["stages"]:
        figures = "<br>".join(
            html.escape(f"{key}: {value}") for key, value in stage["figures"].items()
        )
        cells = [
            html.escape(stage["name"]),
            html.escape(stage["question"]),
            f'<td class="{stage["status"]}">{stage["status"]}</td>',
            f"{stage['seconds']} of {stage['limit_s']:.0f} s",
            html.escape(stage["why"]) + ("<br>" if stage["why"] and figures else "") + figures,
        ]
        rows.append("".join(c if c.startswith("<td") else f"<td>{c}</td>" for c in cells))
        if stage["tail"]:
            name = html.escape(stage["name"])
            tail = html.escape(stage["tail"])
            outputs.append(f"<h2>{name}</h2><pre>{tail}</pre>")
    head = "".join(f"<th>{name}</th>" for name in ("stage", "question", "status", "time", "found"))
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    title = html.escape(f"GPU smoke, {report['began']}, {report['commit']}, {report['device']}")
    return (
        f"<!doctype html><meta charset=utf-8><title>{title}</title><style>{STYLE}</style>"
        f"<h1>{title}</h1><table><tr>{head}</tr>{body}</table>{''.join(outputs)}\n"
    )


STYLE = """
body { font: 14px sans-serif; margin: 2em; }
table { border-collapse: collapse; }
td, th { border: 1px solid #bbb; padding: .3em .6em; text-align: left; vertical-align: top; }
.ok { background: #cfc; }
.failed, .timeout { background: #fbb; }
.skipped { background: #eee; }
pre { background: #f4f4f4; padding: 1em; overflow-x: auto; }
"""


def write_report(outcomes: Sequence[Outcome], folder: Path, device: str, began: str) -> None:
    """Writes gpu_smoke.json and gpu_smoke.html."""
    report = {
        "began": began,
        "commit": commit(),
        "device": device,
        "stages": [asdict(outcome) for outcome in outcomes],
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "gpu_smoke.json").write_text(json.dumps(report, indent=1) + "\n")
    (folder / "gpu_smoke.html").write_text(page(report))


def commit() -> str:
    """The short name of the commit, or `unknown` in a copy without history."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def stages_of(python: str, device: str, peak_tflops: float, work: Path) -> list[Stage]:
    """All stages, the riskiest first."""
    on_gpu = device == "cuda"

    def body(name: str, question: str, limit_s: float, *needs: str) -> Stage:
        command = [python, f"{BENCH}/gpu_stages.py", name, "--device", device, "--dir", str(work)]
        return Stage(name, question, command, limit_s, needs or ("versions",))

    def speed(shape: str, rows: int, budget: int, limit_s: float) -> Stage:
        sizes = ["--shape", shape, "--rows", str(rows), "--budget", str(budget), "--repeats", "3"]
        command = [python, f"{BENCH}/update.py", *sizes]
        command += ["--peak-tflops", str(peak_tflops)] if on_gpu else []
        question = f"tokens/s and MFU of the update, {shape}"
        return Stage(f"speed-{shape}", question, command, limit_s, ("versions", "attention"))

    shape = "0.5B" if on_gpu else "tiny"
    colocated = [python, f"{BENCH}/colocated.py", "--device", device, "--shape", shape]
    colocated += ["--steps", "1", "--prompts", "8" if on_gpu else "2"]
    colocated += ["--group", "8" if on_gpu else "2", "--dir", str(work)]
    offload = [python, "-m", "pytest", "-q", "tests/gpu/test_update.py", "-k", "offloaded"]
    estimate = [python, f"{BENCH}/estimate.py", *([] if on_gpu else ["--layer"])]
    engine = ("versions", "runner")
    return [
        body("versions", "do the packages import, and which are they", 60, "none"),
        body("runner", "does vLLM's second model runner sample what the first does", 150),
        body("attention", "is the variable-length kernel attention, forward and backward", 60),
        body(
            "agreement", "do engine and trainer agree in bfloat16, with CUDA graphs", 120, *engine
        ),
        body("sync", "does every group of parameters arrive over CUDA IPC", 90, *engine),
        body("sleep", "does sleep free the memory, and are weights right afterwards", 120, "sync"),
        body("closed_world", "do three steps of GRPO run, retrieval included", 150, *engine),
        Stage(f"steps-{shape}", "does a real shape train", colocated, 150, ("sleep",)),
        *([speed("0.5B", 128, 16384, 60), speed("1.5B", 64, 4096, 60)] if on_gpu else []),
        speed("3B", 64, 4096, 90) if on_gpu else speed("tiny", 12, 4096, 30),
        *([Stage("offload", "does an update with offload learn the same", offload, 90)] * on_gpu),
        Stage("estimate", "memory, estimated and measured", estimate, 120),
        body("faiss", "does faiss search on the GPU what it does on the CPU", 60, "none"),
    ]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "gpu.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", default=sys.executable, help="interpreter of the stages")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="these stages alone")
    parser.add_argument("--budget", type=float, help="seconds for all (default: 600; CPU: 6,000)")
    parser.add_argument("--peak-tflops", type=float, default=989.0, help="dense bfloat16 peak")
    parser.add_argument("--out", default="runs", help="folder of the report")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs, reports; the exit status."""
    args = parse(argv)
    folder = Path(args.out).resolve()
    work = folder / "gpu_smoke"
    work.mkdir(parents=True, exist_ok=True)
    stages = stages_of(args.python, args.device, args.peak_tflops, work)
    if args.only and (unknown := set(args.only) - {stage.name for stage in stages}):
        known = ", ".join(stage.name for stage in stages)
        sys.stderr.write(f"error: --only {' '.join(sorted(unknown))}: the stages are {known}\n")
        return 2
    slowness = 1 if args.device == "cuda" else CPU_SLOWNESS
    chosen = [
        Stage(s.name, s.question, s.command, s.limit_s * slowness, s.needs)
        for s in stages
        if not args.only or s.name in args.only
    ]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    began = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    env = {**os.environ, **OFFLINE, "PYTHONPATH": path}
    outcomes = run_all(chosen, env, args.budget or 600 * slowness)
    write_report(outcomes, folder, args.device, began)
    sys.stdout.write(f"{folder / 'gpu_smoke.html'}\n")
    return int(any(outcome.status in ("failed", "timeout") for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
