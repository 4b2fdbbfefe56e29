"""Takes model families the whole way: rollout, log-probs, update, sync, rollout again; a row of
differences for each.

    python scripts/bench/families.py [FAMILY ...]    # adds to docs/results/families.jsonl
    python scripts/bench/families.py --table         # the rows as a table in Markdown

A real engine (vLLM on the CPU, float32) and a real trainer, on random models of two layers. Every
family runs in a process of its own.
"""

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.verl.rollout.test_families import (
    FAMILIES,
    FLOAT32,
    ROLLOUT,
    SLIDING,
    Family,
    gap,
    make_model,
    whole_way,
)
from verl.utils.errors import ConfigError
from verl.workers.config import ModelConfig
from verl.workers.packing import packing_of

RESULTS = Path(__file__).resolve().parents[2] / "docs/results/families.jsonl"
SECONDS = 330
"""What a family may take."""
GATED_DELTA_NET = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
}
MORE: dict[str, Family] = {
    "mistral": (transformers.MistralConfig, SLIDING),
    "gemma": (transformers.GemmaConfig, {}),
    "phi3": (transformers.Phi3Config, {}),
    "olmo2": (transformers.Olmo2Config, {}),
    "smollm3": (transformers.SmolLM3Config, {}),
    "granite": (transformers.GraniteConfig, {}),
    "glm4": (transformers.Glm4Config, {}),
    "gpt2": (transformers.GPT2Config, {}),
    "gpt_neox": (transformers.GPTNeoXConfig, {"num_key_value_heads": 2}),
    "stablelm": (transformers.StableLmConfig, {}),
    "opt": (transformers.OPTConfig, {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "qwen3-moe": (
        transformers.Qwen3MoeConfig,
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "norm_topk_prob": True,
        },
    ),
    "qwen3.5": (transformers.Qwen3_5TextConfig, GATED_DELTA_NET),
    "mixtral": (transformers.MixtralConfig, {"num_local_experts": 4}),
    "olmoe": (transformers.OlmoeConfig, {"num_experts": 4, "num_experts_per_tok": 2}),
    "phimoe": (transformers.PhimoeConfig, {"num_local_experts": 4}),
    "lfm2": (
        transformers.Lfm2Config,
        {
            "layer_types": ["conv", "full_attention"],
            "conv_dim": 64,
            "block_dim": 64,
            "block_ff_dim": 96,
        },
    ),
    "qwen3_next": (
        transformers.Qwen3NextConfig,
        {
            **GATED_DELTA_NET,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
        },
    ),
}
ROUNDING = 0.1
"""Nats that the log-prob of a token may differ by where the engine computes in bfloat16 and the
trainer in float32."""
ALL = FAMILIES | MORE
RECURRENT = {"qwen3.5", "lfm2", "qwen3_next"}
"""Families whose prefixes an engine on the CPU cannot keep: vLLM wants chunked prefill for that."""
GATED = {"qwen3.5", "qwen3_next"}
"""Families whose gated DeltaNet vLLM computes on the CPU in bfloat16 alone."""


def row_of(family: str, folder: Path) -> dict[str, Any]:
    """Differences in nats between engine and trainer, before and after an update; how rows went
    through the model."""
    path = make_model(folder, ALL[family])
    row: dict[str, Any] = {"family": family}
    try:
        packing = packing_of(
            ModelConfig(path=path), "lm", on_gpu=False, dtype=getattr(torch, FLOAT32.dtype)
        )
        row |= {"rows": "packed" if packing.packs else "alone", "probe": packing.gap}
        dtype = "bfloat16" if family in GATED else FLOAT32.dtype
        rollout = ROLLOUT.model_copy(
            update={"enable_prefix_caching": family not in RECURRENT, "dtype": dtype}
        )
        before, trained, after, scored = asyncio.run(whole_way(path, rollout))
    except ConfigError as error:
        return row | {"verdict": "refused", "why": error.problems[0][:300]}
    row |= {
        "rollout": gap(before, trained["old_log_probs"]),
        "reference": gap(before, trained["ref_log_prob"]),
        "synced": gap(after, scored),
        "critic": len(trained["grad_norms"]) == 2,
    }
    largest = max(row["rollout"], row["reference"], row["synced"])
    if family in GATED and largest <= ROUNDING:
        return row | {
            "verdict": "agrees in bfloat16",
            "why": "vLLM has gated DeltaNet on the CPU in bfloat16 only",
        }
    return row | {"verdict": "exact" if largest <= 1e-3 else "differs"}


def measure(family: str) -> dict[str, Any]:
    """`row_of` in a process of its own; what ends it otherwise is a refusal with its last line."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--one", family, folder]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=SECONDS, check=False
            )
        except subprocess.TimeoutExpired:
            return {"family": family, "verdict": "refused", "why": f"more than {SECONDS} s"}
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    errors = [
        line.strip()
        for line in done.stderr.splitlines()
        if "rror" in line and "FutureWarning" not in line
    ]
    lines = errors or done.stderr.strip().splitlines()
    why = " ".join(lines[-2:])[:300] if lines else f"status {done.returncode}"
    return {"family": family, "verdict": "fails", "why": why}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, a row per family."""
    lines = [
        "| family | verdict | rows | probe | engine–trainer | reference | after a sync | critic | "
        "why |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        numbers = [
            f"{row[key]:.0e}" if key in row else ""
            for key in ("probe", "rollout", "reference", "synced")
        ]
        critic = {True: "yes", False: "none in transformers", None: ""}[row.get("critic")]
        cells = [
            row["family"],
            row["verdict"],
            row.get("rows", ""),
            *numbers,
            critic,
            row.get("why", ""),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    """Measures the families that have no row yet, or writes the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("families", nargs="*")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--one", nargs=2, metavar=("FAMILY", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        family, folder = arguments.one
        sys.stdout.write(json.dumps(row_of(family, Path(folder))) + "\n")
        return 0
    rows = (
        [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    )
    if arguments.table:
        sys.stdout.write(table(rows) + "\n")
        return 0
    asked = arguments.families or list(ALL)
    rows = [row for row in rows if row["verdict"] != "fails" or row["family"] not in asked]
    RESULTS.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = {row["family"] for row in rows}
    for family in asked:
        if family in done:
            continue
        row = measure(family)
        with RESULTS.open("a") as file:
            file.write(json.dumps(row) + "\n")
        sys.stdout.write(json.dumps(row) + "\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
