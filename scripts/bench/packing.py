"""Asks the probe of the trainer about every causal family that transformers knows: packed, alone,
or refused.

    python scripts/bench/packing.py [FAMILY ...]     # adds to docs/results/packing.jsonl
    python scripts/bench/packing.py --table          # the rows as a table in Markdown

Models are random and narrow where the family allows it, with the layer types of its default
configuration.
"""

import argparse
import json
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForTokenClassification, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from verl.workers.attention import choose_attention
from verl.workers.packing import Packing, Probe
from verl.workers.shallow import Head

RESULTS = Path(__file__).resolve().parents[2] / "docs/results/packing.jsonl"
NARROW = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 512,
}
TYPICAL: dict[str, dict[str, Any]] = {
    "lfm2": {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {
        "num_hidden_layers": 2,
        "layer_types": ["conv", "full_attention"],
        "num_dense_layers": 1,
    },
}
"""What the published models of a family have and its default configuration has not."""
SECONDS = 90
"""What a family may take."""


def configurations(family: str) -> list[PretrainedConfig]:
    """The narrow configuration of the family, then its default one; what cannot be made is left
    out."""
    cls = CONFIG_MAPPING[family]
    default = cls(**TYPICAL.get(family, {}))
    known = {key: value for key, value in NARROW.items() if hasattr(default.get_text_config(), key)}
    made: list[PretrainedConfig] = []
    if default.get_text_config() is default:
        try:
            made.append(cls(**known, **TYPICAL.get(family, {})))
        except Exception:  # sizes that do not go together in this family
            made = []
    return [*made, default]


def verdict(family: str, head: Head) -> dict[str, Any]:
    """What the probe says of the family."""
    problem = ""
    for config in configurations(family):
        try:
            probe = Probe(config, head)
            found = probe.decide(choose_attention(config, on_gpu=False, dtype=torch.float32))
        except Exception as error:
            problem = f"cannot be built: {type(error).__name__}: {str(error).splitlines()[0][:120]}"
            continue
        if isinstance(found, Packing):
            way = "packed" if found.packs else "alone"
            return {
                "way": way,
                "attention": found.attention,
                "gap": found.gap,
                "reason": found.reason,
            }
        problem = found
    return {"way": "refused", "reason": problem}


def row_of(family: str) -> dict[str, Any]:
    """The verdicts on policy and critic of a family, within `SECONDS`."""

    def expire(*_: Any) -> None:
        raise TimeoutError(f"more than {SECONDS} s")

    signal.signal(signal.SIGALRM, expire)
    signal.alarm(SECONDS)
    try:
        row = {"family": family, **verdict(family, "lm")}
        if (
            CONFIG_MAPPING[family] in AutoModelForTokenClassification._model_mapping
            and row["way"] != "refused"
        ):
            row["critic"] = verdict(family, "value")["way"]
        return row
    except Exception as error:
        return {
            "family": family,
            "way": "refused",
            "reason": f"{type(error).__name__}: {str(error)[:120]}",
        }
    finally:
        signal.alarm(0)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a row per family, those that pack first."""
    order = ["packed", "alone", "refused"]
    lines = [
        "| family | way | attention | difference | critic | why |",
        "|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda r: (order.index(r["way"]), r["family"])):
        gap = f"{row['gap']:.0e}" if "gap" in row else ""
        cells = [
            row["family"],
            row["way"],
            row.get("attention", ""),
            gap,
            row.get("critic", ""),
            row["reason"],
        ]
        on_a_line = [" ".join(cell.replace("|", "\\|").split()) for cell in cells]
        lines.append("| " + " | ".join(on_a_line) + " |")
    return "\n".join(lines)


def main() -> int:
    """Probes the families that have no row yet, or writes the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("families", nargs="*")
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    rows = (
        [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    )
    if arguments.table:
        sys.stdout.write(table(rows) + "\n")
        return 0
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    done = {row["family"] for row in rows}
    for family in arguments.families or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        if family in done:
            continue
        row = row_of(family)
        with RESULTS.open("a") as file:
            file.write(json.dumps(row) + "\n")
        sys.stdout.write(f"{row['family']:24} {row['way']:8} {row['reason'][:100]}\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
