"""Measures a base model in a closed world: reading, EM by hops, searches, pass@k and how often groups disagree.

    python -m search_r1.world.measure --model data/closed_world/base --world data/closed_world

One process, transformers and BM25 only: turns in lock-step, so it is a check of the base and not how to train.
"""

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from search_r1.agent.observation import encode_passages
from search_r1.search.bm25 import BM25Retriever, build
from search_r1.world.traces import READING, TraceWriter, encode_trace
from verl.utils.tokenizer import encode_text

MAX_SEARCHES, TOPK, MAX_NEW_TOKENS = 4, 3, 48


@dataclass
class Run:
    """One trajectory: its context, its queries, and its answer if it gave one."""

    row: dict[str, Any]
    ids: list[int]
    queries: list[str]
    answer: str | None = None
    done: bool = False

    @property
    def correct(self) -> bool:
        return self.answer in self.row["reward_model"]["ground_truth"]["target"]


class Probe:
    """A model, its tokenizer and the passages it may search."""

    def __init__(self, model: str, corpus: Path, scratch: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.model: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self.stops = [self.tokenizer.convert_tokens_to_ids(t) for t in ("</search>", "</answer>")]
        self.stops.append(self.tokenizer.eos_token_id)
        build(corpus, scratch / "bm25")
        self.retriever = BM25Retriever(scratch / "bm25", corpus)

    def roll_out(self, rows: Sequence[dict[str, Any]], temperature: float, size: int = 250) -> list[Run]:
        """A trajectory per row; temperature 0 is greedy."""
        runs = [Run(r, encode_text(self.tokenizer, r["prompt"][0]["content"]), []) for r in rows]
        for start in range(0, len(runs), size):
            for turn in range(MAX_SEARCHES + 1):
                self.turn([r for r in runs[start : start + size] if not r.done], temperature, turn < MAX_SEARCHES)
        return runs

    @torch.no_grad()
    def turn(self, runs: Sequence[Run], temperature: float, may_search: bool) -> None:
        """Lets every run write up to its next tag, and answers its search."""
        if not runs:
            return
        inputs = self.tokenizer.pad({"input_ids": [r.ids for r in runs]}, padding_side="left", return_tensors="pt")
        how: dict[str, Any] = {"do_sample": temperature > 0}
        how |= {"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0 else {}
        out = self.model.generate(**inputs, **how, max_new_tokens=MAX_NEW_TOKENS, eos_token_id=self.stops)
        searching: list[tuple[Run, str]] = []
        for run, ids in zip(runs, out[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
            end = next((i for i, t in enumerate(ids) if t in self.stops), len(ids) - 1)
            run.ids += ids[: end + 1]
            text = self.tokenizer.decode(ids[: end + 1])
            run.done = not (may_search and text.endswith("</search>"))
            if text.endswith("</answer>"):
                run.answer = text.rpartition("<answer>")[2].removesuffix("</answer>").strip()
            elif not run.done:
                searching.append((run, text.rpartition("<search>")[2].removesuffix("</search>").strip()))
        for (run, query), hits in zip(searching, self.retriever.search([q for _, q in searching], TOPK), strict=True):
            passages = [tuple(document["contents"].split("\n", 1)) for document, _ in hits]
            run.queries.append(query)
            run.ids += encode_passages(passages, self.tokenizer, 512, emitted="")[0]

    @torch.no_grad()
    def reading(self, count: int, seed: int) -> float:
        """Share of words copied out of passages that are right, in fresh clean traces with the gold passages given."""
        writer = TraceWriter(random.Random(seed), READING, TOPK, (1, 2))
        right = total = 0
        for _ in range(count):
            trace = encode_trace(writer(), self.tokenizer)
            ids = torch.tensor([trace["input_ids"]])
            read = torch.tensor(trace["read_mask"][1:]).bool()
            said = self.model(input_ids=ids).logits[0, :-1].argmax(-1)
            right += int((said == ids[0, 1:])[read].sum())
            total += int(read.sum())
        return right / total


def mean(values: Sequence[float]) -> float:
    return sum(values) / max(1, len(values))


def summarise(runs: Sequence[Run]) -> dict[str, float]:
    """EM and searches by hops, and reading: EM of the last hop's passages among what was searched."""
    result = {"em": mean([r.correct for r in runs]), "answered": mean([r.answer is not None for r in runs])}
    for hops in sorted({r.row["extra_info"]["hops"] for r in runs}):
        some = [r for r in runs if r.row["extra_info"]["hops"] == hops]
        full = [r for r in some if set(r.row["extra_info"]["path"][:-1]) <= set(r.queries)]
        result[f"em_{hops}hop"] = mean([r.correct for r in some])
        result[f"searches_{hops}hop"] = mean([len(r.queries) for r in some])
        result[f"all_searched_{hops}hop"] = mean([r in full for r in some])
        result[f"em_if_all_searched_{hops}hop"] = mean([r.correct for r in full])
    return {k: round(v, 4) for k, v in result.items()}


def group_figures(runs: Sequence[Run], k: int) -> dict[str, float]:
    """pass@k, and the share of groups of k whose members disagree."""
    groups = [runs[i : i + k] for i in range(0, len(runs), k)]
    hits = [sum(r.correct for r in g) for g in groups]
    return {f"pass@{k}": round(mean([h > 0 for h in hits]), 4), f"mixed@{k}": round(mean([0 < h < k for h in hits]), 4)}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m search_r1.world.measure", description="Measure a base model.")
    parser.add_argument("--model", required=True, help="its folder")
    parser.add_argument("--world", type=Path, required=True, help="folder written by python -m search_r1.world")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (default: 0)")
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    rows = pq.read_table(args.world / "test.parquet").to_pylist()
    common = pq.read_table(args.world / "test_common.parquet").to_pylist()
    with tempfile.TemporaryDirectory() as scratch:
        probe = Probe(args.model, args.world / "corpus.jsonl", Path(scratch))

        def show(name: str, figures: dict[str, float]) -> None:
            sys.stdout.write(json.dumps({"what": name, **figures}) + "\n")
            sys.stdout.flush()

        show("reading, fresh traces", {"accuracy": round(probe.reading(400, args.seed + 1), 4)})
        show("greedy", summarise(probe.roll_out(rows, 0.0)))
        show("common, greedy", summarise(probe.roll_out(common, 0.0)))
        show("sampled", summarise(probe.roll_out(rows, 1.0)))
        some = [r for h in (1, 2) for r in [r for r in rows if r["extra_info"]["hops"] == h][:50]]
        for k in (5, 16):
            show("sampled groups", group_figures(probe.roll_out([r for r in some for _ in range(k)], 1.0), k))
    return 0


if __name__ == "__main__":
    sys.exit(main())
