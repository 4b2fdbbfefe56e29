"""Supervised fine-tuning: loss on masked-in tokens only, whatever the micro-batch size; files; the
command line."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.distributed import run_ranks
from tests.models import make_tiny_qwen2
from verl.trainer.sft import SFTConfig, SFTTrainer, batches, collate, read_examples
from verl.utils.errors import DataError
from verl.workers.config import FSDPConfig, ModelConfig, OptimConfig

ROWS = [
    {"input_ids": [5, 6, 7, 8, 9], "loss_mask": [0, 0, 1, 1, 0]},
    {"input_ids": [9, 8, 7], "loss_mask": [1, 1, 1]},
    {
        "input_ids": [3, 4, 5, 6, 7, 8, 9],
        "loss_mask": [0, 1, 0, 0, 1, 1, 1],
        "watch_mask": [0, 0, 0, 0, 1, 0, 0],
    },
]


def config(model: Path, **changes) -> SFTConfig:
    return SFTConfig(
        model=ModelConfig(path=str(model), enable_gradient_checkpointing=False),
        output=str(model),
        optim=OptimConfig(lr=1e-2, weight_decay=0.0),
        fsdp=FSDPConfig(dtype="float32"),
        **changes,
    )


def test_collate_puts_the_first_token_in_the_prompt():
    data = collate(ROWS, max_length=10)
    assert data.batch["prompts"].tolist() == [[5], [9], [3]]
    assert data.batch["responses"][1].tolist() == [8, 7, 0, 0, 0, 0]
    assert data.batch["response_mask"].tolist() == [
        [0, 1, 1, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 0, 0, 1, 1, 1],
    ]
    assert data.batch["attention_mask"].sum(1).tolist() == [5, 3, 7]
    assert data.batch["watch_mask"][2].tolist() == [0, 0, 0, 1, 0, 0]


@pytest.mark.parametrize(
    "row",
    [
        {"input_ids": [1, 2], "loss_mask": [1]},
        {"input_ids": [1, 2], "loss_mask": [1, 0]},
        {"input_ids": list(range(20)), "loss_mask": [1] * 20},
    ],
)
def test_a_row_that_cannot_be_trained_is_named(row):
    with pytest.raises(DataError, match="row 1"):
        collate([ROWS[0], row], max_length=10)


def test_files_are_checked(tmp_path):
    good = tmp_path / "good.jsonl"
    bad = tmp_path / "bad.jsonl"
    good.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    bad.write_text('{"input_ids": [1]}\n')
    assert len(read_examples([str(good)])) == 3
    with pytest.raises(DataError, match=r"bad.jsonl, row 0"):
        read_examples([str(good), str(bad)])
    with pytest.raises(DataError, match="no such file"):
        read_examples([str(tmp_path / "none.jsonl")])
    for text, message in (
        ("\n{broken\n", "line 2: not JSON"),
        ("[1]\n", "row 0: .*got a list that holds int 1"),
    ):
        bad.write_text(text)
        with pytest.raises(DataError, match=rf"bad\.jsonl, {message}"):
            read_examples([str(bad)])


def test_batches_take_every_row_once_per_epoch(tmp_path):
    rows = batches(ROWS, config(tmp_path, train_batch_size=3))
    assert sorted(len(row["input_ids"]) for row in next(rows)) == [3, 5, 7]


def two_steps(model: Path, tokens: int) -> list[dict[str, float]]:
    trainer = SFTTrainer(config(model, max_token_len_per_gpu=tokens))
    return [trainer.step(ROWS), trainer.step(ROWS)]


def test_loss_is_the_mean_over_trained_tokens_and_falls(tmp_path):
    model = make_tiny_qwen2(tmp_path, layers=1, width=32, vocab=300)
    plain = AutoModelForCausalLM.from_pretrained(model)
    total = 0.0
    count = 0
    for row in ROWS:
        ids = torch.tensor([row["input_ids"]])
        log_probs = plain(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        mask = torch.tensor(row["loss_mask"][1:])
        total = total - float((log_probs.detach() * mask).sum())
        count = count + int(mask.sum())
    (steps,) = run_ranks(1, two_steps, model, 5)
    assert steps[0]["loss"] == pytest.approx(total / count, rel=1e-5)
    assert steps[1]["loss"] < steps[0]["loss"] and steps[0]["skipped_steps"] == 0
    (wide,) = run_ranks(1, two_steps, model, 100)
    ranks = run_ranks(2, two_steps, model, 8)
    for other in (wide, *ranks):
        assert [s["loss"] for s in other] == pytest.approx([s["loss"] for s in steps], rel=1e-4)
