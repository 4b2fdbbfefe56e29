"""Writes docs/configuration.md and docs/migration.md.

The first is made from the pydantic models and the composed configuration, the second from the
tables of other projects' keys.

python scripts/config_reference.py [--check]
"""

import argparse
import re
import sys
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from omegaconf import DictConfig, OmegaConf
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from search_r1.agent.loop import SearchAgentLoop
from search_r1.config import FinetuneConfig, SetupConfig
from search_r1.rewards.compose import SearchReward
from search_r1.search.client.config import RetrieverConfig
from verl.trainer.compat import PROJECTS, Project
from verl.trainer.compose import compose_or_say_why
from verl.trainer.config import PPOConfig
from verl.trainer.overrides import written
from verl.utils.config import OneOf
from verl.utils.loading import load_class

DOCS = Path(__file__).resolve().parents[1] / "docs"
OUT = DOCS / "configuration.md"
OUT_MIGRATION = DOCS / "migration.md"
WITHOUT_RECIPE = ("~experiment", "~algo", "~method")
SET_ELSEWHERE = {"agent.retriever"}
"""Keys that users do not set themselves: `retriever.*` is taken over."""
LINK = re.compile(r"\$\{([\w.]+)\}")
HEAD = """# Configuration reference

Written by `python scripts/config_reference.py` from the models that validate a run
(`verl/trainer/config.py`, `verl/workers/config.py`, `search_r1/`), where every default stands.
`configs/base.yaml` and `configs/search.yaml` name these models, and hold the few values that no
model can know: links (`as ...` below), and what the search task sets for the library. The column
*default* is what they compose to. A command then chooses a file of each of these groups, which set
values of their own; `--cfg job` shows what comes of it:

- `experiment=NAME`, a recipe of `configs/experiment/`. One that is made for an algorithm chooses
  it, whatever script starts it.
- `algo=NAME`, the algorithm (`configs/algo/`): every switch that tells PPO, GRPO and LOOP apart.
  Without a recipe that chooses it (`experiment=own_data`, for instance) it is the script's:
  `train_ppo.sh` or `train_grpo.sh`, `--config-name ppo` or `grpo`.
- `method=NAME`, how the model is asked to search (`configs/method/`).
- `+mode=deterministic`: the same bits in every run.

Batch sizes count over all ranks, unless the key ends in `_per_gpu`. `max_turns`, `do_search`,
`template` and `retriever.*` are top-level keys that `agent` takes over.

Names that differ from the original Search-R1: `actor_rollout_ref.rollout.n_agent` is `rollout.n`;
`actor.ppo_mini_batch_size` counts trajectories, also with groups; micro-batches are per GPU and
limited in tokens (`ppo_max_token_len_per_gpu`, `log_prob_max_token_len_per_gpu`), in trajectories
only if `*_micro_batch_size_per_gpu` is set; `actor.entropy_coeff` is 0 unless a recipe sets it;
`rollout.top_p` is 1. [migration.md](migration.md) lists the keys of the original and of verl that
are known to be others here.
"""
MIGRATION = """# Every key of Search-R1 and of verl

Written by `python scripts/config_reference.py` from the tables that translate
(`search_r1/compat.py`, `verl/trainer/compat.py`). What else is different, and worked examples:
[from Search-R1](from_search_r1.md), [from verl](from_verl.md), [from SkyRL](from_skyrl.md).

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


def table(model: type[BaseModel], section: DictConfig, prefix: str) -> list[str]:
    """The rows of a section: the keys of its model, with the values that it is composed with."""
    rows: list[str] = []
    for name, field in model.model_fields.items():
        key = f"{prefix}{name}"
        if key in SET_ELSEWHERE:
            continue
        nested = field.annotation
        if isinstance(nested, type) and issubclass(nested, BaseModel):
            rows += table(nested, section[name], f"{key}.")
            continue
        meaning = (field.description or "").replace("\n", " ")
        kind = type_in_words(field).replace("|", "\\|")
        rows.append(f"| `{key}` | {kind} | {default_in_words(section, name)} | {meaning} |")
    return rows


def default_in_words(section: DictConfig, name: str) -> str:
    """The value of a key in the form of a command line. For a link, the key that it follows."""
    if OmegaConf.is_missing(section, name):
        return "required"
    empty = "''"
    plain = OmegaConf.to_container(section, resolve=False)
    assert isinstance(plain, dict)
    link = LINK.fullmatch(str(plain[name]))
    return f"as `{link[1]}`" if link else f"`{written(plain[name]) or empty}`"


def type_in_words(field: FieldInfo) -> str:
    """The type of a field, or the names that it may have."""
    choices = [mark for mark in field.metadata if isinstance(mark, OneOf)]
    shown = "str" if choices else annotation_in_words(field.annotation)
    return shown.replace("str", names_in_words(choices[0])) if choices else shown


def annotation_in_words(annotation: Any) -> str:
    """A type without what pydantic adds to it."""
    if annotation is None or annotation is type(None):
        return "None"
    origin = get_origin(annotation)
    parts = get_args(annotation)
    if origin is Annotated:
        marks = [mark for mark in parts[1:] if isinstance(mark, OneOf)]
        return names_in_words(marks[0]) if marks else annotation_in_words(parts[0])
    if origin is Literal:
        return ", ".join(map(repr, parts))
    if origin in (Union, UnionType):
        return " | ".join(map(annotation_in_words, parts))
    if origin is not None:
        return f"{origin.__name__}[{', '.join(map(annotation_in_words, parts))}]"
    return annotation.__name__


def names_in_words(mark: OneOf) -> str:
    return ", ".join(map(repr, mark.names))


def page() -> str:
    """The whole text of docs/configuration.md."""
    config = compose_or_say_why("grpo", WITHOUT_RECIPE)
    sections: dict[str, type[BaseModel]] = {
        name: field.annotation
        for name, field in PPOConfig.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
    }
    sections |= {
        "agent": SearchAgentLoop.Config,
        "retriever": RetrieverConfig,
        "reward": SearchReward.Config,
        "finetune": FinetuneConfig,
        "setup": SetupConfig,
    }
    text = [HEAD]
    for name, model in sections.items():
        text += [
            f"\n## {name}\n",
            "| key | type | default | meaning |",
            "|---|---|---|---|",
            *table(model, config[name], f"{name}."),
        ]
    return "\n".join(text) + "\n"


def migration_page() -> str:
    """The text of docs/migration.md: every key of other projects that differs here."""
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
