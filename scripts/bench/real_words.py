"""A real language model learns to search real questions, on a laptop without a GPU.

    python scripts/bench/real_words_data.py --data FOLDER --gguf FILE
    python scripts/bench/real_words.py [RUN ...] [--commit]

SmolLM2-135M-Instruct answers held-out questions of NQ and HotpotQA directly, with one search for
the question (RAG), and with search as a prompt describes it to a model that nobody has taught it.
`cold` is tuned on traces that a template makes of training questions; `grpo-seed0` and
`grpo-seed1` train it further by reinforcement. `rag_cold` asks the cold start in the prompt of RAG.
A finished run appends its row to docs/results/real_words.jsonl and is not run again; an interrupted
one goes on. The table compares every run with the cold start, question by question.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import study

from search_r1.data import demonstrate
from search_r1.evaluation.scores import bootstrap_interval, compare
from search_r1.launch import RetrievalServer
from search_r1.trajectory import question_key

ROWS = study.ROOT / "docs" / "results" / "real_words.jsonl"
DATA = "data/real_words"
WORK = "runs/real_words"
BASE = f"{DATA}/base"
COLD = f"{WORK}/cold"
TRACES = f"{WORK}/traces.jsonl"
SETS = ("nq", "hotpotqa")
RECIPE = [
    "experiment=smollm2_nq",
    f"data.train_files={DATA}/train.parquet",
    f"data.val_files=[{DATA}/test_nq.parquet,{DATA}/test_hotpotqa.parquet]",
    f"setup.corpus_path={DATA}/corpus.jsonl",
    f"setup.index_dir={DATA}/index",
    f"actor_rollout_ref.rollout.cpu_threads={os.cpu_count()}",
]
CURVES = [
    "critic/score/mean",
    "reward/em",
    "reward/format",
    "env/number_of_valid_search",
    "env/finish_ratio",
    "rollout/filtered/zero_variance",
    "response_length_model/mean",
    "rollout/logprob_diff_mean",
    "rollout/logprob_diff_max",
    "perf/time_per_step",
    "timing_s/gen",
    "timing_s/old_log_prob",
    "timing_s/update_actor",
    "perf/total_num_tokens",
]
"""Metrics whose value in each training step belongs to the row of a training."""
FOR_LONG_PROMPTS = ["data.max_start_length=384", "data.max_prompt_length=1376"]
"""Room for a prompt that explains the tags, which the recipe's does not."""
SHOWN = 3
"""Trajectories of each set that a row holds as text."""


def evaluate(run: str, model: str, *overrides: str) -> list[str]:
    """The command that evaluates `model` on the held-out questions, as `run`."""
    where = f"trainer.default_local_dir={evaluation_of(run)}"
    return [sys.executable, "-m", "search_r1.evaluate", model, *RECIPE, where, *overrides]


def evaluation_of(run: str) -> str:
    return f"{WORK}/evaluate-{run}"


def train(folder: str, model: str, *overrides: str) -> list[str]:
    """The command that trains `model` into `folder`."""
    return [
        "bash",
        "train_grpo.sh",
        *RECIPE,
        f"actor_rollout_ref.model.path={model}",
        f"trainer.default_local_dir={folder}",
        *overrides,
    ]


MAKE_COLD_START = [sys.executable, __file__, "--make-cold-start"]


def reinforced(seed: int) -> list[list[str]]:
    run = f"grpo-seed{seed}"
    folder = f"{WORK}/{run}"
    only_the_end = ["trainer.val_before_train=false", "trainer.test_freq=-1", "trainer.save_freq=5"]
    named = [f"trainer.seed={seed}", f"trainer.experiment_name=real_words-{run}"]
    learn = train(folder, f"{COLD}/hf", *named, *only_the_end)
    return [MAKE_COLD_START, learn, evaluate(run, f"{folder}/hf")]


RUNS: dict[str, list[list[str]]] = {
    "cold": [MAKE_COLD_START, evaluate("cold", f"{COLD}/hf")],
    "grpo-seed0": reinforced(0),
    "search": [evaluate("search", BASE, "template=search", *FOR_LONG_PROMPTS)],
    "rag": [evaluate("rag", BASE, "method=rag")],
    "direct": [evaluate("direct", BASE, "method=direct")],
    "rag_cold": [MAKE_COLD_START, evaluate("rag_cold", f"{COLD}/hf", "method=rag")],
    "grpo-seed1": reinforced(1),
}


def make_cold_start() -> None:
    """Writes the traces and trains on them, unless that has been done on this machine."""
    if not Path(TRACES).exists():
        make_traces()
    if not Path(COLD, "hf").exists():
        command = train(COLD, BASE, "method=traces", f"finetune.traces={TRACES}")
        subprocess.run(command, check=True)


def make_traces() -> None:
    """Writes the traces of the cold start."""
    index = [sys.executable, "-m", "search_r1.search.index_builder", "--retrieval_method", "bm25"]
    corpus = f"{DATA}/corpus.jsonl"
    subprocess.run([*index, "--corpus_path", corpus, "--save_dir", f"{DATA}/index"], check=True)
    with RetrievalServer(Path(DATA, "index", "bm25"), corpus, topk=2) as server:
        questions = ["--questions", f"{DATA}/train.parquet", "--topk", "2", "--out", TRACES]
        demonstrate.main([*questions, "--retriever_url", server.url])


def figures(name: str) -> study.Row:
    """Scores of every question, figures of each set, some trajectories; curves of a training."""
    folder = study.ROOT / evaluation_of(name)
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    with (folder / "evaluation.jsonl").open(encoding="utf-8") as file:
        records = sorted(map(json.loads, file), key=question_key)
    of_sets = {s: [r for r in records if r["data_source"] == s] for s in SETS}
    row: study.Row = {
        "summary": {s: summary[s] for s in SETS},
        "scores": {s: scores_of(group) for s, group in of_sets.items()},
        "shown": {s: [as_text(r) for r in group[:SHOWN]] for s, group in of_sets.items()},
    }
    metrics = study.ROOT / WORK / name / "metrics.jsonl"
    if metrics.exists():
        with metrics.open(encoding="utf-8") as file:
            steps = [line for line in map(json.loads, file) if "perf/time_per_step" in line]
        row["training"] = {key: [step.get(key) for step in steps] for key in CURVES}
    return row


def scores_of(records: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """EM and F1 of the questions, in the order of their keys."""
    return {
        score: [round(r["reward"].get(score, 0.0), 4) for r in records] for score in ("em", "f1")
    }


def as_text(record: dict[str, Any]) -> str:
    """The question, the gold answers, and all that was written after the prompt."""
    written = "".join(segment["text"] for segment in record["segments"])
    return f"{record['extra_info']['question']} {record['ground_truth']}\n{written}"


def table(rows: list[study.Row]) -> str:
    """Markdown: every run's figures by set, then its paired comparison with the cold start."""
    cold = next((row for row in rows if row["run"] == "cold"), None)
    head = "run, set, EM, F1, searches, answered, gold retrieved, EM if retrieved, EM beside cold"
    columns = head.split(", ")
    lines = [columns, ["---"] * len(columns)]
    for row in rows:
        lines += [cells(row, name, cold) for name in (*SETS, "both")]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def cells(row: study.Row, name: str, cold: study.Row | None) -> list[str]:
    """A line of the table. `name`: a set, or "both" for the questions of both."""
    em = scores_in(row, name, "em")
    shown = [row["run"], name, with_interval(em), with_interval(scores_in(row, name, "f1"))]
    if name in row["summary"]:
        found = row["summary"][name]["behaviour"]
        keys = ("searches", "answered", "gold_retrieved", "right_if_gold_retrieved")
        shown += [f"{found[key]:.3f}" if found.get(key) is not None else "-" for key in keys]
    else:
        shown += ["", "", "", ""]
    return [*shown, beside(em, scores_in(cold, name, "em")) if cold and cold is not row else ""]


def scores_in(row: study.Row, name: str, score: str) -> list[float]:
    sets = SETS if name == "both" else (name,)
    return [value for each in sets for value in row["scores"][each][score]]


def with_interval(values: list[float]) -> str:
    low, high = bootstrap_interval(values)
    return f"{sum(values) / len(values):.3f} ({low:.3f}-{high:.3f})"


def beside(ours: list[float], cold: list[float]) -> str:
    """The difference to the cold start on the same questions, its interval, McNemar's p."""
    found = compare(numbered(cold), numbered(ours))
    low, high = found.interval
    return f"{found.difference:+.3f} ({low:+.3f} to {high:+.3f}), p = {found.p_value:.3f}"


def numbered(values: list[float]) -> dict[str, float]:
    return {str(place): value for place, value in enumerate(values)}


if __name__ == "__main__":
    if sys.argv[1:] == ["--make-cold-start"]:
        make_cold_start()
    else:
        study.main(__doc__ or "", RUNS, ROWS, figures, table)
