"""Memory and time of every recipe, computed in one go: the tables of docs/results/sizing.md.

    python scripts/bench/recipes.py [--recipes configs/experiment/nq_hotpotqa] [override ...]

Recipes are found in the folder: every file that sets a model. Models' configs come from
model_shapes.json, so that no hub is needed. Nothing here runs on a GPU.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from verl.estimate import report as estimate
from verl.estimate import sizing, step_time
from verl.estimate.assumptions import card, default_assumptions
from verl.estimate.engine_memory import retriever_memory
from verl.estimate.memory import GIB
from verl.estimate.report import Estimate
from verl.estimate.step_time import StepTime
from verl.utils.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
SHAPES = ROOT / "scripts" / "bench" / "model_shapes.json"
CARDS = {"h100": 80, "h200": 141}
"""By card: memory in GiB."""
WIKI_18 = 21_015_324
"""Passages of the published index."""
SOURCES = {
    "nq": 3_610,
    "triviaqa": 11_313,
    "popqa": 14_267,
    "hotpotqa": 7_405,
    "2wikimultihopqa": 12_576,
    "musique": 2_417,
    "bamboogle": 125,
}
"""Questions of the seven data sets of the paper's test file: 51,713 in all."""
Row = tuple[str, str]
"""A recipe and the cells of its row."""
MEMORY_HEADER = (
    "| recipe | card | rollout | log-probs | critic update | actor update | left | left beside a "
    "retriever "
    "| KV cache, tokens | trajectories at once: longest, mean |"
)
TIME_HEADER = (
    "| recipe | card | gen | log-probs, values | updates | sync, sleep, driver | step | validation "
    "| run |"
)


def find_recipes(folder: Path) -> Iterator[tuple[str, str]]:
    """Yields config name and experiment of every recipe that names a model."""
    for path in sorted(folder.glob("*.yaml")):
        raw: Any = OmegaConf.load(path)
        if OmegaConf.select(raw, "actor_rollout_ref.model.path"):
            config_name = "ppo" if path.stem.endswith("ppo") else "grpo"
            yield config_name, f"{folder.name}/{path.stem}"


def validation_questions(config: Any) -> int:
    """Questions of a validation with the paper's test file."""
    sample = config.data.val_sample_per_source
    everything = sum(
        SOURCES.values() if sample is None else (min(sample, size) for size in SOURCES.values())
    )
    return min(everything, config.data.val_data_num or everything)


def header(text: str) -> list[str]:
    columns = text.count("|") - 1
    return [text, "|" + "---|" * columns]


def memory_row(card: str, alone: Estimate, beside: Estimate, mean_tokens: float) -> str:
    """A row of the table of memory. GiB."""
    phases = ("rollout", "log-probs", "critic update", "actor update")
    cells = [
        f"{estimate.total(alone.peaks[phase][0]) / GIB:.1f}" if phase in alone.peaks else ""
        for phase in phases
    ]
    tokens = alone.engine.kv_tokens if alone.engine else 0
    at_once = f"{tokens // alone.longest.tokens:,}, {tokens // mean_tokens:,.0f}"
    lefts = [
        f"{found.left / GIB:.1f}" if found.fits else f"**does not fit** ({found.left / GIB:.1f})"
        for found in (alone, beside)
    ]
    return f"{card} | " + " | ".join([*cells, *lefts, f"{tokens:,}", at_once]) + " |"


def time_row(card: str, found: StepTime) -> str:
    """A row of the table of time. Seconds; hours of the run."""
    seconds = {verb.name: verb.seconds for verb in found.verbs()}
    step = sum(seconds.values())
    passes = sum(seconds.get(verb, 0.0) for verb in ("old_log_prob", "ref", "values"))
    updates = sum(seconds.get(verb, 0.0) for verb in ("update_critic", "update_actor"))
    rest = step - seconds["gen"] - passes - updates
    validation = found.validation(validation_questions(found.config)).seconds
    run = (found.config.trainer.total_training_steps or 0) * step
    run += step_time.num_validations(found.config) * validation
    cells = [seconds["gen"], passes, updates, rest, step, validation]
    return f"{card} | " + " | ".join(f"{cell:.0f}" for cell in cells) + f" | {run / 3600:.0f} h |"


def rows_of(config_name: str, experiment: str, overrides: list[str]) -> tuple[list[Row], list[Row]]:
    """Name and cells of the rows of both tables for a recipe. Raises ConfigError where it cannot be
    estimated."""
    name = experiment.rpartition("/")[2]
    config = sizing.load_config(config_name, [f"experiment={experiment}", *overrides])
    step_time.refuse_other_schedules(config)
    longest = sizing.longest_trajectory(config)
    roles = sizing.roles_of(config, longest, sizing.load_shapes(str(SHAPES)))
    assumptions = default_assumptions()
    retriever = retriever_memory(WIKI_18, config.trainer.n_gpus_per_node)
    memory: list[Row] = []
    time: list[Row] = []
    for kind, gib in CARDS.items():
        alone, beside = (
            estimate.estimate(config, roles, longest, gib * GIB, taken)
            for taken in (0.0, retriever)
        )
        seconds = StepTime(config, roles, longest, card(kind, gib), assumptions)
        memory.append((name, memory_row(kind, alone, beside, seconds.mean_tokens)))
        time.append((name, time_row(kind, seconds)))
    return memory, time


def joined(rows: list[Row]) -> list[str]:
    """One row for all recipes (first of each pair) whose figures (second) are the same."""
    names: dict[str, list[str]] = {}
    for name, cells in rows:
        names.setdefault(cells, []).append(name)
    return [f"| {', '.join(recipes)} | {cells}" for cells, recipes in names.items()]


def main() -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a recipe without a shape is named at once
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as in training")
    parser.add_argument(
        "--recipes", type=Path, default=ROOT / "configs" / "experiment" / "nq_hotpotqa"
    )
    args = parser.parse_intermixed_args()
    memory: list[Row] = []
    time: list[Row] = []
    refused: list[str] = []
    known = json.loads(SHAPES.read_text())
    for config_name, experiment in find_recipes(args.recipes):
        try:
            rows = rows_of(config_name, experiment, args.overrides)
        except ConfigError as error:
            refused.append(f"- {experiment}: {'; '.join(error.problems)}")
            continue
        memory += rows[0]
        time += rows[1]
    lines = [*header(MEMORY_HEADER), *joined(memory), "", *header(TIME_HEADER), *joined(time)]
    if refused:
        lines += ["", f"Not estimated (configs known: {', '.join(known)}):", *refused]
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
