"""The base model: its builder runs end to end in a few steps, and the shipped one answers."""

import dataclasses
import random
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer

from search_r1.agent.actions import Invalid, parse_action
from search_r1.world.base import (
    POOR_STAGES,
    READING_STAGES,
    SETTLED_STAGES,
    answered,
    build,
    examples,
)
from search_r1.world.generate import WorldConfig, make_world
from search_r1.world.model import LOOK_BACK, random_model
from search_r1.world.traces import PolicyMix, TraceWriter
from tests.search_r1.world.reading import share_read
from verl.trainer.sft import start_process_group
from verl.utils.tokenizer import encode_text

BASE = Path(__file__).parents[3] / "data" / "closed_world" / "base"


@pytest.fixture(scope="module")
def base():
    if not (BASE / "model.safetensors").exists():
        pytest.skip("no base model: python -m search_r1.world.base --out data/closed_world/base")
    return AutoModelForCausalLM.from_pretrained(BASE), AutoTokenizer.from_pretrained(BASE)


def test_the_head_is_untied(base):
    assert base[0].config.tie_word_embeddings is False
    assert not torch.equal(base[0].lm_head.weight, base[0].model.embed_tokens.weight)
    assert base[0].config.max_position_embeddings >= 1024


def test_first_turns_are_valid_actions(base):
    model, tokenizer = base
    ends = [tokenizer.convert_tokens_to_ids(t) for t in ("</search>", "</answer>")]
    small = WorldConfig(train_people=20, test_people=20, train_questions=20, test_questions=20)
    for row in make_world(small).rows["test"][:10]:
        ids = torch.tensor([encode_text(tokenizer, row["prompt"][0]["content"])])
        out = model.generate(
            ids, max_new_tokens=32, do_sample=False, eos_token_id=ends, pad_token_id=0
        )
        action, _ = parse_action(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
        assert not isinstance(action, Invalid)


def test_it_reads_about_names_it_has_never_seen_at_any_rank(base):
    model, tokenizer = base
    writer = TraceWriter(random.Random(123), PolicyMix(), 3, (1, 2))
    assert share_read(model, tokenizer, writer) > 0.97


def test_rows_watch_the_words_copied_out_of_passages(base):
    row = next(examples(TraceWriter(random.Random(0), PolicyMix()), base[1]))
    assert 0 < sum(row["watch_mask"]) < sum(row["loss_mask"]) < len(row["input_ids"])


def test_first_layer_looks_back_before_training(base):
    torch.manual_seed(0)
    model = random_model(base[1]).eval()
    model.set_attn_implementation("eager")
    ids = torch.randint(len(base[1]), (1, 40))
    attention = model(ids, output_attentions=True).attentions[0][0]
    for head in range(LOOK_BACK):
        assert attention[head].diagonal(-head - 1).mean() > 0.8
    again = model.get_input_embeddings().weight.detach().clone()
    torch.manual_seed(0)
    assert torch.equal(again, random_model(base[1]).get_input_embeddings().weight)


def test_builder_runs_end_to_end(tmp_path):
    short = [
        dataclasses.replace(stage, max_steps=2)
        for stage in (*READING_STAGES, *SETTLED_STAGES, *POOR_STAGES)
    ]
    start_process_group(1)
    try:
        build(
            tmp_path / "base",
            seed=0,
            reading=short[:2],
            settled=short[2:3],
            poor=short[3:],
            asked=3,
        )
    finally:
        dist.destroy_process_group()
    assert answered(tmp_path / "base", count=3) == 0.0
