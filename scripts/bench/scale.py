"""What a training step of the paper's size costs without its model: the driver's seconds, the agent
workers' CPU.

    python scripts/bench/scale.py [--sizes 0.25 0.5 1 2] [--stages driver agents transport] [--json
    out.json]

The driver's verbs run with real Ray and eight ranks that do not compute, in two processes, so that
a small machine can hold them. Trajectories are written in every step here; training does it every
tenth. Agent workers run the real loop and reward against an engine and a retriever that answer at
once (synthetic.py), with a tokenizer of 150,000 entries.

Size 1 is the paper's GRPO: 512 prompts, five trajectories each, of up to 4,096 tokens. `driver` is
repeated at every size of the batch; `agents` with more and more searches a trajectory, 4 at size 1;
`transport` is that with engine calls through Ray and searches through HTTP. Each measurement has a
process of its own. Growth is the slope of log(figure) over log(tokens): 1 is linear, 2 quadratic.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

GENERATED_PER_S = 30_000
AGENT_WORKERS = 8
STEP_S = 100
"""Estimated seconds of a step of 3B GRPO on eight GPUs, at least."""
DRIVER_SHARE = 0.05
Figures = dict[str, float]


def measure(stage: str, folder: Path, size: float, args: argparse.Namespace) -> Figures:
    """One stage at one size, in this process."""
    if stage == "driver":
        from scale_driver import driver

        return driver(folder, max(1, round(args.prompts * size)), args.group)
    import ray
    from scale_agents import in_process, with_transport

    if stage == "agents":
        return in_process(folder, args.trajectories, searches=max(1, round(4 * size)))
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        return with_transport(folder, args.trajectories)
    finally:
        ray.shutdown()


def in_a_process(stage: str, folder: Path, size: float, args: argparse.Namespace) -> Figures:
    """`measure` in a fresh process, whose memory is its own."""
    command = [
        sys.executable,
        __file__,
        "--one",
        stage,
        "--work",
        str(folder),
        "--sizes",
        str(size),
    ]
    for name in ("prompts", "group", "trajectories"):
        command += [f"--{name}", str(getattr(args, name))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def growth(sizes: list[float], costs: list[float]) -> float:
    """The slope of log(cost) over log(size); NaN where there is nothing to compare."""
    if len(sizes) < 2 or min(costs) <= 0:
        return math.nan
    return float(np.polyfit(np.log(sizes), np.log(costs), 1)[0])


def table(stage: str, sizes: list[float], figures: list[Figures]) -> str:
    """A row for each figure, a column for each size, and the growth."""
    scale = [f["tokens"] for f in figures]
    lines = [
        f"| {stage} | {' | '.join(f'{size:g}' for size in sizes)} | growth |",
        "|---" * (len(sizes) + 2) + "|",
    ]
    for name in figures[0]:
        values = [f[name] for f in figures]
        lines.append(
            f"| {name} | {' | '.join(f'{v:,.3g}' for v in values)} | {growth(scale, values):.2f} |"
        )
    return "\n".join(lines)


def verdicts(stage: str, figures: Figures) -> list[str]:
    """The goals, and what was reached at size 1."""
    if stage == "driver":
        limit = DRIVER_SHARE * STEP_S
        return [
            f"{name} step: {figures[f'{name} step, CPU s']:.1f} s of driver; goal {limit:.0f} s"
            for name in ("GRPO", "PPO")
        ]
    goal = GENERATED_PER_S / AGENT_WORKERS
    return [
        f"{stage}: {figures['generated tokens/s']:,.0f} generated tokens/s of a core; goal "
        f"{goal:,.0f}"
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=float, nargs="+", default=[0.25, 0.5, 1, 2])
    parser.add_argument("--stages", nargs="+", default=["driver", "agents", "transport"])
    parser.add_argument("--prompts", type=int, default=512, help="at size 1")
    parser.add_argument("--group", type=int, default=5, help="trajectories per prompt")
    parser.add_argument(
        "--trajectories", type=int, default=256, help="of the stages agents and transport"
    )
    parser.add_argument("--vocabulary", type=int, default=150_000)
    parser.add_argument("--words", type=int, default=200_000, help="different words in all texts")
    parser.add_argument("--work", type=Path, help="where the tokenizer is kept for the next run")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        sys.stdout.write(json.dumps(measure(args.one, args.work, args.sizes[0], args)) + "\n")
        return
    from scale_agents import prepare

    results: dict[str, list[Figures]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.work or Path(temporary)
        prepare(folder, args.vocabulary, args.words)
        for stage in args.stages:
            sizes = [1.0] if stage == "transport" else args.sizes
            results[stage] = [in_a_process(stage, folder, size, args) for size in sizes]
            sys.stdout.write(table(stage, sizes, results[stage]) + "\n\n")
            if 1 in sizes:
                sys.stdout.write(
                    "\n".join(verdicts(stage, results[stage][sizes.index(1)])) + "\n\n"
                )
            sys.stdout.flush()
    if args.json:
        args.json.write_text(json.dumps({"sizes": args.sizes, **results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
