"""Writes docs/configuration.md from the pydantic models, and docs/migration.md from the tables of
other projects' keys.

python scripts/config_reference.py [--check]
"""

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from search_r1.agent.loop import SearchAgentLoop
from search_r1.finetune import FinetuneConfig
from search_r1.launch import SetupConfig
from search_r1.rewards.compose import SearchReward
from search_r1.search.client.config import RetrieverConfig
from verl.trainer.compat import PROJECTS, Project
from verl.trainer.config import PPOConfig
from verl.trainer.overrides import written
from verl.utils.loading import load_class

DOCS = Path(__file__).resolve().parents[1] / "docs"
OUT = DOCS / "configuration.md"
OUT_MIGRATION = DOCS / "migration.md"
HEAD = """# Configuration reference

Written by `python scripts/config_reference.py` from the models that validate a run, with their
defaults. `configs/base.yaml` and `configs/search.yaml` repeat them. They also give values to
`trainer.panels` and `trainer.collapse_watch.signals`, and let many keys of `critic`, `ref`,
`agent` and `finetune` follow others. The recipes in `configs/experiment/` set values of their
own: `--cfg job` shows what a command uses. Batch sizes count over all ranks, unless the key ends
in `_per_gpu`. `max_turns`, `do_search`, `template` and `retriever.*` are top-level keys that
`agent` takes over; `method=NAME` chooses one of `configs/method/`, which set them.

Names that differ from the original Search-R1: `actor_rollout_ref.rollout.n_agent` is `rollout.n`;
`actor.ppo_mini_batch_size` counts trajectories, also with groups; micro-batches are per GPU and
limited in tokens (`ppo_max_token_len_per_gpu`, `log_prob_max_token_len_per_gpu`), in trajectories
only if `*_micro_batch_size_per_gpu` is set; `actor.entropy_coeff` is 0 unless a recipe sets it;
`rollout.top_p` is 1. [migration.md](migration.md) lists the keys of the original and of verl that
are known to be others here.
"""
MIGRATION = """# Coming from the original Search-R1, or from verl

Written by `python scripts/config_reference.py` from the tables that translate
(`search_r1/compat.py`, `verl/trainer/compat.py`).

A command line of the original is taken whole, with its `+`-prefixed keys, when it says so:

```bash
python -m verl.trainer.main_ppo compat=search_r1 actor_rollout_ref.rollout.n_agent=5 ...
bash train_grpo.sh compat=search_r1 ...     # the same, with the launcher around it
python -m verl.trainer.main_ppo compat=verl --config-name=search_multiturn_grpo ...
```

It starts from that project's defaults instead of an `experiment=`, and prints what became of
every key that is not the same here: translated, ignored and why, or a default of that project.
What would silently train something else is refused, all of it at once. `--cfg job` beside it
shows the result without running it. Without `compat=` nothing is translated: each such key is
refused with what became of it. A key that neither this project nor the tables below know is
refused as well.

What no key says: validation is greedy, all questions are asked, and the reward reads the response
alone (README, *What differs from the original on purpose*). `trainer.total_training_steps=N`
makes N steps; the original stops one before. `top_p` is 1 unless it is given; the original's
default of .95 samples from another distribution than it trains. Checkpoints of either project are
read as Hugging Face models (`actor_rollout_ref.model.path`).
"""


def rows(model: type[BaseModel], prefix: str, whole: Any = PydanticUndefined) -> list[str]:
    """Table rows of all fields, nested models flattened. `whole` is the default of the section,
    where it has one: it may set other values than the fields of its model."""
    lines: list[str] = []
    for name, field in model.model_fields.items():
        key = f"{prefix}{name}"
        nested = field.annotation
        default = getattr(whole, name) if isinstance(whole, BaseModel) else field.default
        if key == "agent.retriever":  # set as `retriever.*`
            continue
        if isinstance(nested, type) and issubclass(nested, BaseModel):
            lines += rows(nested, f"{key}.", default)
            continue
        kind = getattr(nested, "__name__", None) if isinstance(nested, type) else str(nested)
        kind = re.sub(r"Annotated\[(\w+), \w+\(.*?\)\]", r"\1", str(kind).replace("typing.", ""))
        kind = re.sub(r"^Optional\[(.*)\]$", r"\1 | None", kind).replace("|", "\\|")
        shown = "required" if default is PydanticUndefined else f"`{default!r}`"
        lines.append(
            f"| `{key}` | {kind} | {shown} | {(field.description or '').replace(chr(10), ' ')} |"
        )
    return lines


def page() -> str:
    """The whole document."""
    sections: list[tuple[str, type[BaseModel], str]] = [
        (name, field.annotation, f"{name}.")  # pyright: ignore
        for name, field in PPOConfig.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
    ]
    sections += [
        ("agent", SearchAgentLoop.Config, "agent."),
        ("retriever", RetrieverConfig, "retriever."),
        ("reward", SearchReward.Config, "reward."),
        ("finetune", FinetuneConfig, "finetune."),
        ("setup", SetupConfig, "setup."),
    ]
    text = [HEAD]
    for title, model, prefix in sections:
        text += [
            f"\n## {title}\n",
            "| key | type | default | meaning |",
            "|---|---|---|---|",
            *rows(model, prefix),
        ]
    return "\n".join(text) + "\n"


def migration_page() -> str:
    """docs/migration.md: what became of every key that the other projects have and this one does
    not, or otherwise."""
    text = [MIGRATION]
    titles = {"search_r1": "The original Search-R1", "verl": "verl"}
    for name, path in PROJECTS.items():
        project: Project = load_class(path, name)
        text += [
            f"\n## {titles[name]}: `compat={name}`\n",
            "| key there | key here | |",
            "|---|---|---|",
        ]
        for key, fate in sorted(project.keys.items()):
            here = f"`{fate.key}`" if fate.key else "-"
            text.append(f"| `{key}` | {here} | {fate.note} |")
        defaults = ", ".join(f"`{key}={written(value)}`" for key, value in project.defaults.items())
        text.append(f"\nDefaults: {defaults}.")
    return "\n".join(text) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit 1 if the file is not up to date")
    if parser.parse_args().check:
        sys.exit(OUT.read_text() != page() or OUT_MIGRATION.read_text() != migration_page())
    OUT.write_text(page())
    OUT_MIGRATION.write_text(migration_page())
