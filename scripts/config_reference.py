"""Writes docs/configuration.md from the pydantic models: `python scripts/config_reference.py [--check]`."""

import argparse
import sys
from pathlib import Path

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from search_r1.agent.loop import SearchAgentLoop
from search_r1.finetune import FinetuneConfig
from search_r1.launch import SetupConfig
from search_r1.rewards.compose import SearchReward
from search_r1.search.config import RetrieverConfig
from verl.trainer.config import PPOConfig

OUT = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"
HEAD = """# Configuration reference

Written by `python scripts/config_reference.py` from the models that validate a run. Defaults here are those of the
models; `configs/base.yaml` and the recipes in `configs/experiment/` set others: `--cfg job` shows what a command uses.
Batch sizes count over all ranks. `max_turns`, `do_search`, `template` and `retriever.*` are top-level keys that `agent`
takes over; `method=NAME` chooses one of `configs/method/`, which set them.

Names that differ from the original Search-R1: `actor_rollout_ref.rollout.n_agent` is `rollout.n`;
`actor.ppo_mini_batch_size` counts trajectories, also with groups; micro-batches are per GPU and
limited in tokens (`ppo_max_token_len_per_gpu`, `log_prob_max_token_len_per_gpu`), in trajectories only if
`*_micro_batch_size_per_gpu` is set; `actor.entropy_coeff` is 0 unless a recipe sets it; `rollout.top_p` is 1;
`fsdp_config.grad_offload` comes with `param_offload`; validation takes
all questions at once, so `data.val_batch_size` is gone; so are `algorithm.no_think_rl` and
`algorithm.state_masking.*`, which the original never used.
"""


def rows(model: type[BaseModel], prefix: str) -> list[str]:
    """Table rows of all fields, nested models flattened."""
    lines: list[str] = []
    for name, field in model.model_fields.items():
        key = f"{prefix}{name}"
        nested = field.annotation
        if key == "agent.retriever":  # set as `retriever.*`
            continue
        if isinstance(nested, type) and issubclass(nested, BaseModel):
            lines += rows(nested, f"{key}.")
            continue
        kind = getattr(nested, "__name__", None) if isinstance(nested, type) else str(nested)
        kind = str(kind).replace("typing.", "").replace("|", "\\|")
        default = "required" if field.default is PydanticUndefined else f"`{field.default!r}`"
        lines.append(f"| `{key}` | {kind} | {default} | {(field.description or '').replace(chr(10), ' ')} |")
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
        text += [f"\n## {title}\n", "| key | type | default | meaning |", "|---|---|---|---|", *rows(model, prefix)]
    return "\n".join(text) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit 1 if the file is not up to date")
    if parser.parse_args().check:
        sys.exit(OUT.read_text() != page())
    OUT.write_text(page())
