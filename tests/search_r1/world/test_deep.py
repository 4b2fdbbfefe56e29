"""Deep questions of the closed world, and the traces of their base model: what the real loop makes
of the same turns, with folds and findings."""

import asyncio
import dataclasses
import random
import re
from collections import Counter
from itertools import groupby
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer

from search_r1.agent.condense import CondenseConfig
from search_r1.agent.config import SearchAgentConfig
from search_r1.agent.contexts import ContextConfig
from search_r1.agent.loop import SearchAgentLoop
from search_r1.launch import BASE_FILES, prepare_base, prepare_world
from search_r1.prompts import FOLD_ACTION, LEFT_OUT, SHORT_CONDENSE_PROMPT
from search_r1.world.base import DEEP, DEEP_STAGES, SHIPPED, answered, build, examples, main
from search_r1.world.deep_traces import CLEAN_DEEP, POOR_DEEP, DeepMix, DeepTraceWriter
from search_r1.world.generate import (
    DEEP_FILES,
    DEEP_HOPS,
    FILES,
    RELATIONS,
    WorldConfig,
    make_world,
)
from search_r1.world.model import grown_model
from search_r1.world.names import FIRST, SECOND
from search_r1.world.tokenizer import SUMMARY_TAGS, train_tokenizer, training_texts
from search_r1.world.traces import WRITTEN, encode_trace
from tests.search_r1.world.played import Engine, Library
from tests.search_r1.world.reading import share_read
from verl.trainer.sft import start_process_group
from verl.utils.places import shipped
from verl.utils.tokenizer import encode_text

ROOT = Path(__file__).parents[3]
BASE = ROOT / "data" / "closed_world" / "deep" / "base"
SMALL = WorldConfig(
    train_people=60,
    test_people=60,
    spare_people=10,
    train_questions=90,
    test_questions=60,
    deep=True,
)
FOUND = re.compile(r'^Doc \d+\(Title: ("\w+")\) (.*)$', re.MULTILINE)
FACT = re.compile(rf"\b(\w+) ({'|'.join(r.sentence for r in RELATIONS.values())}) (\w+)\.")


@pytest.fixture(scope="module")
def world():
    return make_world(SMALL)


@pytest.fixture(scope="module")
def tokenizer():
    texts = training_texts(random.Random(0), 300, DEEP.texts)
    return train_tokenizer(texts, [*FIRST, *SECOND], further_tags=SUMMARY_TAGS)


def deep_rows(world):
    return [row for split in ("train", "test") for row in world.rows[f"{split}_deep"]]


def test_the_option_adds_questions_and_changes_nothing_else(world):
    plain = make_world(SMALL.model_copy(update={"deep": False}))
    assert world.passages == plain.passages
    assert {name: world.rows[name] for name in plain.rows} == plain.rows
    assert {f"{name}.parquet" for name in world.rows} == set(SMALL.files) - {"corpus.jsonl"}
    assert make_world(SMALL).rows == world.rows
    assert make_world(SMALL.model_copy(update={"seed": 1})).rows != world.rows


def test_deep_questions_have_equal_shares_of_hops_and_no_relation_twice(world):
    for split, count in (("train", 30), ("test", 20)):
        sources = Counter(row["data_source"] for row in world.rows[f"{split}_deep"])
        assert sources == {f"closed_world_{hops}hop": count for hops in DEEP_HOPS}
    asked = [row["extra_info"]["question"] for row in deep_rows(world)]
    assert len(asked) == len(set(asked))
    for question in asked:
        nouns = re.findall(r"residence|employer|country|mayor|home|founder|capital", question)
        assert len(nouns) == len(set(nouns))


def test_answers_are_found_by_following_the_passages(world):
    contents = {p["id"]: p["contents"] for p in world.passages}
    for row in deep_rows(world):
        path = row["extra_info"]["path"]
        assert len(path) == row["extra_info"]["hops"] + 1
        for gold, name, following in zip(
            row["extra_info"]["gold_ids"], path, path[1:], strict=False
        ):
            facts = FACT.findall(contents[gold])
            assert (name, following) in [(x, y) for x, _, y in facts]
        assert row["reward_model"]["ground_truth"]["target"] == [path[-1]]


def test_no_entity_of_a_test_question_is_in_a_training_question(world):
    train, test = (
        {name for row in world.rows[f"{split}_deep"] for name in row["extra_info"]["path"]}
        for split in ("train", "test")
    )
    assert train and test and not train & test


def turns_of(row, tokenizer):
    """What the engine is given and says in a row: every run of segments that the model writes."""
    calls = []
    context = []
    for is_said, segments in groupby(row, lambda s: s.kind in WRITTEN):
        ids = encode_trace(list(segments), tokenizer)["input_ids"]
        if is_said:
            calls.append((list(context), ids))
        context += ids
    return calls


def is_side_call(row):
    return not row[0].text.startswith("Question")


def is_whole(rows):
    """Whether no turn of a trace was left out."""
    return is_side_call(rows[0]) or (rows[0][1].kind in WRITTEN and "</answer>" in said_in(rows))


def calls_of(rows, tokenizer):
    """The calls of the engine in the order of time: that of a finding follows its search."""
    pending = [row for row in rows if is_side_call(row)]
    calls = []
    for row in rows:
        if is_side_call(row):
            continue
        findings = sum(s.kind == "finding" for s in row)
        for call in turns_of(row, tokenizer):
            calls.append(call)
            if findings and tokenizer.decode(call[1]).endswith("</search>"):
                calls += turns_of(pending.pop(0), tokenizer)
                findings -= 1
    return calls


def passages_of(rows):
    """What each search of a trace finds, read out of the request where that is condensed."""
    if any(is_side_call(row) for row in rows):
        return [FOUND.findall(row[0].text) for row in rows if is_side_call(row)]
    return [s.passages for row in rows for s in row if s.kind == "observation"]


def fold_at(rows, tokenizer):
    """A limit at which the loop folds where the trace does.

    None for a trace without a fold, 0 where there is no such limit.
    """
    folded = []
    kept = [0]
    for row in rows:
        if is_side_call(row):
            continue
        for number, (context, said) in enumerate(turns_of(row, tokenizer)):
            if tokenizer.decode(said).startswith("<summary>"):
                folded.append(len(context) - len(encode_text(tokenizer, FOLD_ACTION)))
            elif number:
                kept.append(len(context))
    if not folded:
        return None
    return max(kept) if max(kept) < min(folded) else 0


def rolled(rows, limit, tokenizer):
    """The engine and the trajectory of the real loop that plays a trace."""
    condense = CondenseConfig()
    if any(is_side_call(row) for row in rows):
        condense = CondenseConfig(by="policy", prompt=SHORT_CONDENSE_PROMPT)
    config = SearchAgentConfig(
        max_turns=DeepTraceWriter.max_turns,
        context=ContextConfig(fold_at=limit),
        condense=condense,
        max_obs_length=2000,
    )
    loop = SearchAgentLoop(config, tokenizer)
    loop.search.client = Library(passages_of(rows))
    engine = Engine(said for _, said in calls_of(rows, tokenizer))
    prompt = encode_text(tokenizer, rows[-1][0].text)
    return engine, asyncio.run(loop.run(prompt, {}, engine))


@pytest.mark.parametrize("mix", [CLEAN_DEEP, POOR_DEEP])
def test_traces_are_what_the_loop_makes_of_their_turns(tokenizer, mix):
    writer = DeepTraceWriter(random.Random(0), mix)
    folds = findings = 0
    for _ in range(60):
        rows = writer.trace()
        limit = fold_at(rows, tokenizer)
        if limit == 0 or not is_whole(rows):
            continue
        engine, trajectory = rolled(rows, limit or None, tokenizer)
        assert engine.calls == calls_of(rows, tokenizer)
        assert trajectory.stop_reason == "answer" and trajectory.context_violations == 0
        assert trajectory.info.get("folds", 0) == sum(
            s.text == FOLD_ACTION for row in rows for s in row
        )
        trained = sum(sum(encode_trace(row, tokenizer)["loss_mask"]) for row in rows)
        assert trained == sum(len(said) for _, said in engine.calls)
        folds += trajectory.info.get("folds", 0)
        findings += sum(map(is_side_call, rows))
    assert folds > 10 and findings > 5


def test_a_turn_behind_passages_left_out_is_what_the_loop_makes_of_it(tokenizer):
    writer = DeepTraceWriter(random.Random(0), CLEAN_DEEP)
    compared = 0
    for _ in range(80):
        rows = writer.trace()
        whole = rows[-1]
        if len(rows) > 1 or not is_whole(rows):
            continue
        row = writer.shortened(whole)
        config = SearchAgentConfig(
            max_turns=7, max_obs_length=2000, context=ContextConfig(keep_observations=1)
        )
        loop = SearchAgentLoop(config, tokenizer)
        loop.search.client = Library(passages_of([whole]))
        engine = Engine(said for _, said in turns_of(whole, tokenizer))
        asyncio.run(loop.run(encode_text(tokenizer, whole[0].text), {}, engine))
        assert turns_of(row, tokenizer)[0] in engine.calls
        compared += any(s.text == LEFT_OUT for s in row)
    assert compared > 2


def said_in(rows):
    """The text that the policy says in a trace."""
    return "".join(s.text for row in rows for s in row if s.kind in WRITTEN)


def untrue(rows):
    """Facts that the policy states and no passage does."""
    texts = [text for passages in passages_of(rows) for _, text in passages]
    found = {fact for text in texts for fact in FACT.findall(text)}
    return set(FACT.findall(said_in(rows).replace(",", "."))) - found


def missing_searches(rows):
    """How many searches a trace lacks for its hops."""
    question = rows[-1][0].text
    nouns = re.findall(
        r"the (?:residence|employer|country|mayor|home|founder|capital) of", question
    )
    # the last relation is asked for by a verb, but for the capital
    hops = len(nouns) + ("What is the capital of" not in question)
    return hops - said_in(rows).count("<search>")


def misreads(rows):
    """Whether a finding is not about what its query names."""
    calls = [row for row in rows if is_side_call(row)]
    queries = [re.findall(r"Query: (\w+)", row[0].text)[0] for row in calls]
    return any(
        not said_in([row]).startswith(f" {query} ")
        for query, row in zip(queries, calls, strict=True)
    )


MISTAKES = {
    "guess": lambda rows: "I guess" in said_in(rows),
    "guess_known": lambda rows: "I guess" in said_in(rows),
    "wrong_query": lambda rows: missing_searches(rows) < 0,
    "stop_early": lambda rows: missing_searches(rows) > 0,
    "search_again": lambda rows: missing_searches(rows) < 0,
    "lose": lambda rows: missing_searches(rows) < 0,
    "misstate": untrue,
    "misread": misreads,
}


def whole_traces(mix, count):
    writer = DeepTraceWriter(random.Random(0), mix)
    traces = [writer.trace() for _ in range(count)]
    return [rows for rows in traces if is_whole(rows)]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_poor_policy_makes_every_mistake_and_a_clean_trace_none(mistake):
    assert 0 < getattr(POOR_DEEP, mistake) < 1
    only = dataclasses.replace(CLEAN_DEEP, **{mistake: 1.0})
    assert any(MISTAKES[mistake](rows) for rows in whole_traces(only, 60))
    assert not any(MISTAKES[mistake](rows) for rows in whole_traces(CLEAN_DEEP, 60))


def test_every_probability_is_a_mistake_of_the_deep_policy():
    others = {"common", "bold"}
    assert {f.name for f in dataclasses.fields(DeepMix)} - others == set(MISTAKES)


def test_the_launcher_makes_the_further_files_and_the_base_for_them(tmp_path, monkeypatch, capsys):
    called = []
    monkeypatch.setattr("search_r1.launch.module", lambda *args: called.append(args))
    prepare_world(tmp_path, SMALL)
    assert "--deep=True" in called[0]
    prepare_base(tmp_path / "base", deep=True)
    ours = shipped("data/closed_world/deep/base/model.safetensors")
    assert (tmp_path / "base" / ours.name).read_bytes() == ours.read_bytes()
    monkeypatch.setattr("search_r1.launch.shipped", lambda path: tmp_path / "nowhere")
    prepare_base(tmp_path / "second", deep=True)
    assert called[1][-1] == "--deep"
    monkeypatch.undo()
    prepare_world(tmp_path, SMALL)
    assert all((tmp_path / name).exists() for name in (*FILES, *DEEP_FILES))
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path), "--deep", "--arithmetic"])
    assert "one of them" in capsys.readouterr().err


def test_tags_of_summaries_are_one_token_and_the_request_is_short(tokenizer):
    assert all(len(encode_text(tokenizer, tag)) == 1 for tag in SUMMARY_TAGS)
    assert len(encode_text(tokenizer, FOLD_ACTION)) < 40


def test_rows_watch_the_facts_copied(tokenizer):
    row = next(examples(DeepTraceWriter(random.Random(0), CLEAN_DEEP), tokenizer))
    assert 0 < sum(row["watch_mask"]) < sum(row["loss_mask"]) < len(row["input_ids"])


@pytest.fixture(scope="module")
def base():
    if not (BASE / "model.safetensors").exists():
        pytest.skip("no base model: python -m search_r1.world.base --deep --out " + str(BASE))
    return AutoModelForCausalLM.from_pretrained(BASE), AutoTokenizer.from_pretrained(BASE)


def test_a_grown_model_keeps_the_vectors_of_the_tokens_it_knew(tokenizer):
    if not (SHIPPED / "model.safetensors").exists():
        pytest.skip("no base model: python -m search_r1.world.base --out " + str(SHIPPED))
    old = AutoModelForCausalLM.from_pretrained(SHIPPED)
    places = AutoTokenizer.from_pretrained(SHIPPED).get_vocab()
    grown = grown_model(SHIPPED, tokenizer)
    place = tokenizer.get_vocab()
    for weights in ("model.embed_tokens.weight", "lm_head.weight"):
        new, was = grown.get_parameter(weights), old.get_parameter(weights)
        assert len(new) == len(tokenizer) and torch.equal(
            new[place["<search>"]], was[places["<search>"]]
        )
    assert torch.equal(
        grown.model.layers[1].mlp.up_proj.weight, old.model.layers[1].mlp.up_proj.weight
    )


def test_builder_runs_end_to_end(tmp_path):
    if not (SHIPPED / "model.safetensors").exists():
        pytest.skip("no base model: python -m search_r1.world.base --out " + str(SHIPPED))
    short = [
        [dataclasses.replace(stage, max_steps=1, rows=2) for stage in stages]
        for stages in DEEP_STAGES
    ]
    start_process_group(1)
    try:
        build(tmp_path / "base", 0, *short, asked=2, task=DEEP, keep_reader=tmp_path / "reader")
    finally:
        dist.destroy_process_group()
    assert answered(tmp_path / "base", count=2, task=DEEP) <= 1.0
    kept, made = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name).lm_head.weight
        for name in ("reader", "base")
    )
    assert kept.shape == made.shape and not torch.equal(kept, made)


def test_the_shipped_base_reads_summaries_and_passages_it_has_never_seen(base):
    model, tokenizer = base
    writer = DeepTraceWriter(random.Random(123), CLEAN_DEEP)
    assert share_read(model, tokenizer, writer) > 0.95


def test_the_shipped_base_says_how_it_was_made(base):
    text = (BASE / "README.md").read_text()
    assert "python -m search_r1.world.base --deep --out data/closed_world/deep/base" in text
    assert all((BASE / name).exists() for name in BASE_FILES)
    assert sum(path.stat().st_size for path in BASE.iterdir()) < 4_000_000
