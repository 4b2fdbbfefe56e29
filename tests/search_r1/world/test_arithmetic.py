"""The closed world's arithmetic: search alone cannot answer, a program alone neither, and the
traces are what the real loop makes of the same turns with the real tool."""

import asyncio
import dataclasses
import hashlib
import json
import random
import re
from pathlib import Path

import pytest
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer

from search_r1.agent.config import SearchAgentConfig
from search_r1.agent.loop import SearchAgentLoop
from search_r1.launch import BASE_FILES, prepare_base, prepare_world
from search_r1.world.arithmetic import ARITHMETIC_FILES
from search_r1.world.arithmetic_traces import (
    CLEAN,
    POOR_ARITHMETIC,
    ArithmeticWriter,
    YearRecallWriter,
)
from search_r1.world.base import ARITHMETIC, ARITHMETIC_STAGES, answered, build, examples
from search_r1.world.generate import FILES, WorldConfig, make_world
from search_r1.world.names import FIRST, SECOND
from search_r1.world.tokenizer import train_tokenizer, training_texts
from search_r1.world.traces import RecallWriter, encode_trace
from tests.search_r1.world.played import Engine, Library
from tests.search_r1.world.reading import share_read
from verl.agent import Source
from verl.trainer.sft import start_process_group
from verl.utils.places import shipped
from verl.utils.tokenizer import encode_text

ROOT = Path(__file__).parents[3]
BASE = ROOT / "data" / "closed_world" / "arithmetic" / "base"
SMALL = WorldConfig(
    train_people=40,
    test_people=40,
    spare_people=10,
    train_questions=100,
    test_questions=80,
    arithmetic=True,
)
DIFFERENCE_SOURCES = {"closed_world_interval", "closed_world_age"}
SUBJECTS = (
    re.compile(r"When was (\w+) (?:founded|born)\?"),
    re.compile(r"How many years after (\w+) was (\w+) founded\?"),
    re.compile(r"How old was (\w+) when (\w+) was founded\?"),
)
DEFAULT_WORLD = "74574799b507e2f90ad5cf48710d6e704505cde69a4d13f3be8352d195e79d38"


@pytest.fixture(scope="module")
def world():
    return make_world(SMALL)


@pytest.fixture(scope="module")
def tokenizer():
    rng = random.Random(0)
    texts = training_texts(rng, 300, ARITHMETIC.texts)
    return train_tokenizer(texts, [*FIRST, *SECOND], numbers=True)


def arithmetic_rows(world):
    return [row for split in ("train", "test") for row in world.rows[f"{split}_arithmetic"]]


def years_in(world):
    """The year of each name, read out of the passages."""
    found = {}
    for passage in world.passages:
        for name, year in re.findall(r"(\w+) (?:opened|born) (\d{4})\.", passage["contents"]):
            assert found.setdefault(name, year) == year
    return found


def test_the_world_without_the_option_is_what_it_was():
    world = make_world(WorldConfig())
    text = json.dumps([world.passages, world.rows], sort_keys=True)
    assert hashlib.sha256(text.encode()).hexdigest() == DEFAULT_WORLD
    assert WorldConfig().files == FILES


def test_the_option_adds_years_and_questions_and_changes_nothing_else(world):
    plain = make_world(SMALL.model_copy(update={"arithmetic": False}))
    without = [
        {**p, "contents": re.sub(r" \w+ (?:opened|born) \d{4}\.", "", p["contents"])}
        for p in world.passages
    ]
    assert without == plain.passages
    assert {name: world.rows[name] for name in plain.rows} == plain.rows
    assert {f"{name}.parquet" for name in world.rows} == set(SMALL.files) - {"corpus.jsonl"}
    assert make_world(SMALL).rows == world.rows
    assert make_world(SMALL.model_copy(update={"seed": 1})).rows != world.rows


def test_answers_are_those_of_the_years_in_the_passages(world):
    years = years_in(world)
    for row in arithmetic_rows(world):
        question = row["extra_info"]["question"]
        (match,) = (m for pattern in SUBJECTS if (m := pattern.fullmatch(question)))
        values = [int(years[name]) for name in match.groups()]
        right = values[0] if len(values) == 1 else values[1] - values[0]
        assert row["reward_model"]["ground_truth"]["target"] == [str(right)]
        assert row["prompt"][0]["content"] == f"Question: {question}\n"


def test_a_difference_needs_both_tools(world):
    """It stands in no passage, nor does its question tell a year."""
    numbers = {n for p in world.passages for n in re.findall(r"\d+", p["contents"])}
    sources = set()
    for row in arithmetic_rows(world):
        sources.add(row["data_source"])
        (answer,) = row["reward_model"]["ground_truth"]["target"]
        is_difference = row["data_source"] in DIFFERENCE_SOURCES
        assert (answer in numbers) != is_difference
        assert len(answer) == (2 if is_difference else 4)
        assert not re.search(r"\d", row["extra_info"]["question"])
    assert sources == {"closed_world_year", *DIFFERENCE_SOURCES}


def test_gold_passages_are_those_of_the_entities_asked_about(world):
    contents = {p["id"]: p["contents"] for p in world.passages}
    years = years_in(world)
    for row in arithmetic_rows(world):
        extra = row["extra_info"]
        assert len(extra["gold_ids"]) == extra["hops"] == len(extra["path"]) - 1
        for gold, name in zip(extra["gold_ids"], extra["path"], strict=False):
            assert contents[gold].startswith(f'"{name}"\n')
        operands = [years[name] for name in extra["path"][:-1]]
        assert extra["program"] == " - ".join(reversed(operands))


def test_entities_and_questions_of_the_splits_differ(world):
    train, test = (
        {name for row in world.rows[f"{split}_arithmetic"] for name in row["extra_info"]["path"]}
        for split in ("train", "test")
    )
    assert not {name for name in train & test if name.isalpha()}
    asked = [row["extra_info"]["question"] for row in arithmetic_rows(world)]
    assert len(asked) == len(set(asked))


def test_years_are_two_ids_and_differences_one_whatever_stands_before(tokenizer):
    for before in ("", " ", " opened ", "<result>", "\n"):
        for number, size in (("1873", 2), ("53", 1)):
            ids = encode_text(tokenizer, before + number)
            assert tokenizer.decode(ids[-size:]) == number
    assert all(len(encode_text(tokenizer, t)) == 1 for t in ("<python>", "</result>"))


def turns_of(segments, tokenizer):
    """The prompt of a trace, and the ids of its turns."""
    turns = [[]]
    for segment in segments[1:]:
        if segment.kind in ("observation", "result"):
            turns.append([])
        else:
            turns[-1] += encode_text(tokenizer, segment.text)
    return encode_text(tokenizer, segments[0].text), turns


def rolled(segments, tokenizer):
    """The trajectory that the real loop, with the real tool, makes of the turns of a trace."""
    tools = [{"_target_": "search_r1.tools.python.PythonTool"}]
    loop = SearchAgentLoop(SearchAgentConfig(tools=tools), tokenizer)
    loop.search.client = Library(s.passages for s in segments if s.kind == "observation")
    prompt, turns = turns_of(segments, tokenizer)
    return asyncio.run(loop.run(prompt, {}, Engine(turns)))


@pytest.mark.parametrize(("mix", "count"), [(CLEAN, 12), (POOR_ARITHMETIC, 40)])
def test_traces_are_what_the_loop_makes_of_their_turns(tokenizer, mix, count):
    writer = ArithmeticWriter(random.Random(0), mix)
    results = 0
    for _ in range(count):
        segments = writer()
        row = encode_trace(segments, tokenizer)
        trajectory = rolled(segments, tokenizer)
        assert trajectory.token_ids == row["input_ids"]
        mask = [0] * len(trajectory.prompt_ids)
        for segment in trajectory.segments:
            mask += [int(segment.source == Source.MODEL)] * len(segment.token_ids)
        assert mask == row["loss_mask"]
        assert trajectory.stop_reason == "answer"
        results += sum(s.info.get("kind") == "python" for s in trajectory.segments)
        assert all(loss for read, loss in zip(row["read_mask"], mask, strict=True) if read)
    assert results > 0


def test_clean_traces_find_calculate_and_answer_right():
    writer = ArithmeticWriter(random.Random(0), CLEAN)
    for _ in range(100):
        segments = writer()
        text = "".join(s.text for s in segments)
        question = segments[0].text
        (match,) = (m for p in SUBJECTS if (m := p.search(question)))
        stated = dict(
            re.findall(
                r"(\w+) (?:opened|born) (\d{4})\.",
                " ".join(body for s in segments for _, body in s.passages),
            )
        )
        years = [int(stated[name]) for name in match.groups()]
        right = years[0] if len(years) == 1 else years[1] - years[0]
        assert text.endswith(f"<answer> {right} </answer>")
        assert re.findall(r"<search> (\w+) </search>", text) == list(match.groups())
        assert ("<python>" in text) == (len(years) == 2)
        assert any(s.kind == "read" and s.text == f" {years[0]}" for s in segments)


SEARCHES = "<search>"
MISTAKES = {
    "guess": lambda text: text.count(SEARCHES) == 0,
    "guess_known": lambda text: text.count(SEARCHES) == 0,
    "wrong_query": lambda text: text.count(SEARCHES) == 3 and "I guess" in text,
    "stop_early": lambda text: text.count(SEARCHES) == 1 and "<python>" not in text,
    "forget": lambda text: text.count(SEARCHES) == 2 and "<python>" not in text,
    "wrong_year": lambda text: "<python>" in text and not re.search(r"that is \d\d <", text),
    "needless": lambda text: text.count(SEARCHES) == 1 and "<python>" in text,
}


@pytest.mark.parametrize("mistake", [f.name for f in dataclasses.fields(POOR_ARITHMETIC)])
def test_the_poor_policy_makes_every_mistake_and_a_clean_trace_none(mistake):
    rng = random.Random(0)
    assert 0 < getattr(POOR_ARITHMETIC, mistake) < 1
    only = ArithmeticWriter(rng, dataclasses.replace(CLEAN, **{mistake: 1.0}))
    made = [MISTAKES[mistake]("".join(s.text for s in only())) for _ in range(60)]
    assert any(made)
    clean = ArithmeticWriter(rng, CLEAN)
    texts = ["".join(s.text for s in clean()) for _ in range(60)]
    if mistake != "stop_early":  # a year alone is found by one search and needs no program
        assert not any(MISTAKES[mistake](text) for text in texts)


def test_lists_to_recall_have_years_and_are_otherwise_those_of_names():
    text = YearRecallWriter(random.Random(0))()[0].text
    assert re.search(r"(?:opened|born) \d{4}\.", text)
    assert not re.search(r"\d", RecallWriter(random.Random(0))()[0].text)


def test_the_launcher_makes_the_further_files_and_the_base_for_them(tmp_path, monkeypatch):
    called = []
    monkeypatch.setattr("search_r1.launch.module", lambda *args: called.append(args))
    prepare_world(tmp_path, SMALL)
    assert "--arithmetic=True" in called[0]
    prepare_base(tmp_path / "base", arithmetic=True)
    ours = shipped("data/closed_world/arithmetic/base/model.safetensors")
    assert (tmp_path / "base" / ours.name).read_bytes() == ours.read_bytes()
    monkeypatch.setattr("search_r1.launch.shipped", lambda path: tmp_path / "nowhere")
    prepare_base(tmp_path / "second", arithmetic=True)
    assert called[1][-1] == "--arithmetic"
    monkeypatch.undo()
    prepare_world(tmp_path, SMALL)
    assert all((tmp_path / name).exists() for name in (*FILES, *ARITHMETIC_FILES))
    with pytest.raises(SystemExit, match="arithmetic=True"):
        prepare_world(tmp_path, SMALL.model_copy(update={"arithmetic": False}))


def test_rows_watch_the_years_and_results_copied(tokenizer):
    row = next(examples(ArithmeticWriter(random.Random(0), CLEAN), tokenizer))
    assert 0 < sum(row["watch_mask"]) < sum(row["loss_mask"]) < len(row["input_ids"])


def test_builder_runs_end_to_end(tmp_path):
    short = [
        [dataclasses.replace(stage, max_steps=1) for stage in stages]
        for stages in ARITHMETIC_STAGES
    ]
    start_process_group(1)
    try:
        build(tmp_path / "base", 0, *short, asked=2, task=ARITHMETIC)
    finally:
        dist.destroy_process_group()
    assert answered(tmp_path / "base", count=2, task=ARITHMETIC) == 0.0


@pytest.fixture(scope="module")
def base():
    if not (BASE / "model.safetensors").exists():
        pytest.skip("no base model: python -m search_r1.world.base --arithmetic --out " + str(BASE))
    return AutoModelForCausalLM.from_pretrained(BASE), AutoTokenizer.from_pretrained(BASE)


def test_the_shipped_base_reads_years_it_has_never_seen(base):
    model, tokenizer = base
    writer = ArithmeticWriter(random.Random(123), CLEAN)
    assert share_read(model, tokenizer, writer) > 0.95


def test_the_shipped_base_says_how_it_was_made(base):
    text = (BASE / "README.md").read_text()
    assert "python -m search_r1.world.base --arithmetic --out data/closed_world/arithmetic" in text
    assert all((BASE / name).exists() for name in BASE_FILES)
    assert sum(path.stat().st_size for path in BASE.iterdir()) < 4_000_000
