"""Supervised fine-tuning: on answers, on the policy's own trajectories, on traces.

Both resume behind the last finished round.
"""

import json
import os
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from search_r1.finetune import answer_rows
from search_r1.search.engines import bm25
from search_r1.world.__main__ import main as make_world
from tests.e2e.runs import ROOT
from tests.processes import PATIENCE_S
from tests.retrieval import retrieval_server, write_lines
from tests.templates import make_family_tokenizer
from verl.utils.dataset import read_parquet, read_questions
from verl.utils.errors import DataError

pytestmark = pytest.mark.cpu_engine

BASE = ROOT / "data" / "closed_world" / "base"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    sizes = [
        "--train-people=20",
        "--test-people=20",
        "--spare-people=0",
        "--train-questions=40",
        "--test-questions=10",
    ]
    make_world(["--out", str(folder), *sizes])
    bm25.build(folder / "corpus.jsonl", folder / "bm25")
    return folder


def finetune(folder, world, url, *overrides):
    settings = [
        "experiment=closed_world/grpo",
        f"data.train_files={world}/train.parquet",
        f"data.val_files={world}/test.parquet",
        f"actor_rollout_ref.model.path={BASE}",
        f"retriever.url={url}",
        f"trainer.default_local_dir={folder}",
        "trainer.logger=[console]",
        "finetune.steps=2",
        "template=short",
        "actor_rollout_ref.rollout.cpu_kvcache_gb=0.2",
        *overrides,
    ]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "search_r1.finetune", *settings]
    return subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=PATIENCE_S
    )


def test_answers_are_learned_and_a_finished_round_is_not_repeated(tmp_path, world):
    done = finetune(tmp_path, world, "http://127.0.0.1:9", "method=sft")
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "round_1" / "rows.jsonl").open()]
    questions = read_parquet(str(world / "train.parquet"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert len(rows) == len(questions)
    answer = questions[0]["reward_model"]["ground_truth"]["target"][0]
    text = f"{questions[0]['prompt'][0]['content']}<answer> {answer} </answer>{tokenizer.eos_token}"
    assert tokenizer.decode(rows[0]["input_ids"]) == text
    own = [i for i, mask in zip(rows[0]["input_ids"], rows[0]["loss_mask"], strict=True) if mask]
    assert tokenizer.decode(own) == f"<answer> {answer} </answer>{tokenizer.eos_token}"
    other = finetune(tmp_path, world, "http://127.0.0.1:9", "method=sft", "finetune.lr=3e-4")
    assert (
        other.returncode == 1 and "of another finetuning (not the same: finetune)" in other.stderr
    )
    before = (tmp_path / "round_1" / "rows.jsonl").stat().st_mtime_ns
    assert finetune(tmp_path, world, "http://127.0.0.1:9", "method=sft").returncode == 0
    assert (tmp_path / "round_1" / "rows.jsonl").stat().st_mtime_ns == before


def test_samples_that_scored_are_learned(tmp_path, world):
    with retrieval_server(world) as (url, _):
        more = [
            "method=rejection",
            "finetune.rounds=1",
            "finetune.samples=4",
            "data.train_data_num=30",
        ]
        done = finetune(tmp_path, world, url, *more)
    assert done.returncode == 0, done.stderr[-3000:]
    samples = [
        json.loads(line) for line in (tmp_path / "round_1" / "samples" / "evaluation.jsonl").open()
    ]
    right = [s for s in samples if s["reward"]["score"] >= 1]
    rows = [json.loads(line) for line in (tmp_path / "round_1" / "rows.jsonl").open()]
    assert len(samples) == 120 and 0 < len(rows) == len(right) < 120
    assert (tmp_path / "hf" / "model.safetensors").exists()
    check_that_they_are_traces_as_well(tmp_path, world, samples, rows)


def check_that_they_are_traces_as_well(folder, world, samples, rows):
    """Records of a run, and the texts of these records, become the rows that the loop made."""
    texts = [
        {
            "question": sample["extra_info"]["question"],
            "golden_answers": sample["ground_truth"]["target"],
            "response": "".join(segment["text"] for segment in sample["segments"]),
        }
        for sample in samples
    ]
    records = folder / "round_1" / "samples" / "evaluation.jsonl"
    for name, file in (("records", records), ("texts", write_lines(folder / "t.jsonl", texts))):
        run = folder / name
        more = ["method=traces", f"finetune.traces={file}"]
        done = finetune(run, world, "http://127.0.0.1:9", *more)
        assert done.returncode == 0, done.stderr[-3000:]
        made = [json.loads(line) for line in (run / "round_1" / "rows.jsonl").open()]
        assert made == rows, name
        assert (run / "hf" / "model.safetensors").exists()
        left_out = len((run / "round_1" / "rows.rejected.jsonl").read_text().splitlines())
        assert left_out == len(samples) - len(rows)


def test_without_a_method_there_is_nothing_to_do(tmp_path, world):
    done = finetune(tmp_path, world, "http://127.0.0.1:9")
    assert (
        done.returncode == 1 and "finetune.data: expected answers, samples or traces" in done.stderr
    )


@pytest.mark.parametrize(
    ("family", "kwargs", "opening", "end"),
    [
        ("qwen2.5-base", {}, "<|im_start|>assistant\n", "<|im_end|>"),
        (
            "qwen3",
            {"enable_thinking": False},
            "<|im_start|>assistant\n<think>\n\n</think>\n\n",
            "<|im_end|>",
        ),
        ("gemma-instruct", {}, "<start_of_turn>model\n", "<end_of_turn>"),
        ("llama3-base", {}, "?\n", "<|end_of_text|>"),
    ],
)
def test_rows_are_asked_and_ended_as_the_template_does(
    world, tmp_path, family, kwargs, opening, end
):
    tokenizer = make_family_tokenizer(tmp_path, family)
    (first, *_) = answer_rows(
        *read_questions([str(world / "train.parquet")]), None, tokenizer, kwargs
    )
    own = sum(first["loss_mask"])
    prompt, answer = (
        tokenizer.decode(ids) for ids in (first["input_ids"][:-own], first["input_ids"][-own:])
    )
    assert prompt.startswith(tokenizer.bos_token or "") and prompt.endswith(opening)
    assert answer.startswith("<answer>") and answer.endswith(f"</answer>{end}")


def test_a_row_that_cannot_be_asked_is_named(world, tmp_path):
    rows = read_parquet(str(world / "train.parquet"))[:2]
    rows[1]["prompt"].insert(0, {"role": "system", "content": "Be brief."})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "q.parquet")
    with pytest.raises(DataError, match=r"q.parquet, row 1: .*System role not supported"):
        questions = read_questions([str(tmp_path / "q.parquet")])
        list(answer_rows(*questions, None, make_family_tokenizer(tmp_path, "gemma-instruct")))


def test_rows_ask_in_the_named_template(world):
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    (first, *_) = answer_rows(*read_questions([str(world / "train.parquet")]), "direct", tokenizer)
    assert "few words, without explanation" in tokenizer.decode(first["input_ids"])
