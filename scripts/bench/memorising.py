"""Does masking keep the policy from memorising what it retrieves?

    python scripts/bench/memorising.py [RUN ...] [--commit]

GRPO on the closed world with retrieved tokens masked, and with all of them trained; 3,600
trajectories and 15 optimizer steps a run. Before (`base`) and after: exact match without search
(closed book), and the negative log-likelihood of the corpus's passages, in nats a token. A finished
run appends its row to docs/results/memorising.jsonl and is not run again.
"""

import json
import random
import statistics
import sys
from pathlib import Path

import study
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ROWS = study.ROOT / "docs" / "results" / "memorising.jsonl"
WORK = "runs/memorising"
WORLD = study.ROOT / "data" / "closed_world"
BASE = "data/closed_world/base"
STEPS = 15
PASSAGES = 300
"""Passages, drawn once, whose likelihood is measured."""


def closed_book(run: str, model: str) -> list[str]:
    """The command that asks the held-out questions without search."""
    where = f"trainer.default_local_dir={WORK}/closed_book-{run}"
    return [sys.executable, "-m", "search_r1.evaluate", model, "method=direct", where]


def trained(run: str, seed: int, masks: bool) -> list[list[str]]:
    train = [
        "bash",
        "train_grpo.sh",
        f"trainer.total_training_steps={STEPS}",
        "trainer.val_before_train=false",
        "trainer.test_freq=-1",
        "trainer.save_freq=-1",
        f"trainer.seed={seed}",
        f"trainer.experiment_name=memorising-{run}",
        f"trainer.default_local_dir={WORK}/{run}",
        f"actor_rollout_ref.actor.state_masking={str(masks).lower()}",
    ]
    return [train, closed_book(run, f"{WORK}/{run}/hf")]


ARMS = {"masked": True, "unmasked": False}
RUNS = {"base": [closed_book("base", BASE)]} | {
    f"{arm}-seed{seed}": trained(f"{arm}-seed{seed}", seed, masks)
    for seed in range(3)
    for arm, masks in ARMS.items()
}


def figures(name: str) -> study.Row:
    """Closed-book exact match by set, likelihood of the passages, exact match with search."""
    summary = study.ROOT / WORK / f"closed_book-{name}" / "summary.json"
    found = json.loads(summary.read_text(encoding="utf-8"))
    sets = [source for source in found if source not in ("all", "average")]
    folder = study.ROOT / (BASE if name == "base" else f"{WORK}/{name}/hf")
    row: study.Row = {
        "closed_book": {source: found[source]["em"] for source in sets},
        "closed_book_interval": found["all"]["em_interval"],
        "nll": passage_nll(folder),
    }
    metrics = study.ROOT / WORK / name / "metrics.jsonl"
    if metrics.exists():
        last = json.loads(metrics.read_text(encoding="utf-8").splitlines()[-1])
        row["em"] = {key: last[key] for key in last if key.startswith("val/em/")}
    return row


@torch.inference_mode()
def passage_nll(folder: Path) -> float:
    """Mean negative log-likelihood of the tokens of PASSAGES passages, in nats."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with (WORLD / "corpus.jsonl").open(encoding="utf-8") as file:
        texts = [json.loads(line)["contents"] for line in file]
    losses: list[float] = []
    for text in random.Random(0).sample(texts, PASSAGES):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        log_probs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        losses += (-log_probs.gather(1, ids[0, 1:, None])).flatten().tolist()
    return statistics.mean(losses)


def table(rows: list[study.Row]) -> str:
    """Markdown: closed-book exact match by set, nats a token, exact match with search."""
    text = "| run | closed book | nats a token of the passages | with search |\n|---|---|---|---|\n"
    for row in rows:
        book = ", ".join(f"{source} {em:.3f}" for source, em in row["closed_book"].items())
        search = ", ".join(f"{em:.3f}" for em in row.get("em", {}).values())
        text += f"| {row['run']} | {book} | {row['nll']:.3f} | {search} |\n"
    return text


if __name__ == "__main__":
    study.main(__doc__ or "", RUNS, ROWS, figures, table)
