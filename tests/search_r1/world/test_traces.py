"""Warm-start traces: the loss is on the policy's words only, and names are two tokens."""

import random

import pytest

from search_r1.world.names import FIRST, SECOND, random_name
from search_r1.world.tokenizer import train_tokenizer, training_texts
from search_r1.world.traces import POOR, READING, PolicyMix, TraceSegment, TraceWriter, encode_trace
from verl.utils.tokenizer import encode_text


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(training_texts(random.Random(0), 300), [*FIRST, *SECOND])


def masked(row, tokenizer, key):
    return tokenizer.decode([t for t, m in zip(row["input_ids"], row[key], strict=True) if m])


def test_loss_is_on_the_words_of_the_policy(tokenizer):
    segments = [
        TraceSegment("prompt", "Question: Who employs Torvel?\n"),
        TraceSegment("model", "<think> find Torvel </think> <search> Torvel </search>"),
        TraceSegment("observation", "", (('"Torvel"', "Torvel serves Kalmen."),)),
        TraceSegment("model", "<think> Torvel serves"),
        TraceSegment("read", " Kalmen"),
        TraceSegment("model", " </think> <answer> Kalmen </answer>"),
    ]
    row = encode_trace(segments, tokenizer)
    assert masked(row, tokenizer, "loss_mask") == (
        "<think> find Torvel </think> <search> Torvel </search>"
        "<think> Torvel serves Kalmen </think> <answer> Kalmen </answer>"
    )
    assert masked(row, tokenizer, "read_mask") == " Kalmen"
    block = '\n\n<information>Doc 1(Title: "Torvel") Torvel serves Kalmen.</information>\n\n'
    assert block in tokenizer.decode(row["input_ids"])


def test_every_loss_token_lies_outside_prompt_and_observation(tokenizer):
    writer = TraceWriter(random.Random(0), POOR, 3, (1, 2, 3))
    for _ in range(50):
        row = encode_trace(writer(), tokenizer)
        text = masked(row, tokenizer, "loss_mask")
        assert "Doc 1" not in text and "Question" not in text and text.endswith("</answer>")


def test_clean_traces_search_every_hop_and_answer_right():
    writer = TraceWriter(random.Random(0), PolicyMix(), 3, (2,))
    for _ in range(30):
        segments = writer()
        queries = [p.text for p in segments if "<search>" in p.text]
        reads = [p.text.strip() for p in segments if p.kind == "read"]
        assert len(queries) == len(reads) == 2
        # a segment reads the relation and the name
        bridge, answer = (read.split()[-1] for read in reads)
        assert segments[-1].text == f" <answer> {answer} </answer>"
        assert f"<search> {bridge} </search>" in queries[1]


def test_poor_traces_guess_stop_early_and_keep_some_full_ones():
    writer = TraceWriter(random.Random(0), POOR, 3, (2,))
    traces = [writer() for _ in range(600)]
    searches = [sum(p.kind == "observation" for p in t) for t in traces]
    assert min(searches.count(n) for n in (0, 1, 2)) > 30


def test_reading_phase_shows_no_guess():
    writer = TraceWriter(random.Random(0), READING, 3, (1, 2))
    assert not any("I guess" in p.text for _ in range(100) for p in writer())


def test_tags_and_halves_of_names_are_single_tokens(tokenizer):
    assert len(encode_text(tokenizer, "</search>")) == 1
    rng = random.Random(0)
    sizes = [len(encode_text(tokenizer, " " + random_name(rng))) for _ in range(500)]
    assert sizes.count(2) >= 490
    assert tokenizer.eos_token_id != tokenizer.pad_token_id
