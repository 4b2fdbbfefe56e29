"""The closed world: same seed same world, islands, gold passages, schema."""

import json
import random

import pyarrow.parquet as pq
import pytest

from search_r1.world.__main__ import main
from search_r1.world.generate import (
    Question,
    WorldConfig,
    ask,
    common_island,
    make_world,
    relation_chains,
)

SMALL = WorldConfig(
    train_people=40, test_people=30, spare_people=10, train_questions=100, test_questions=60
)


@pytest.fixture(scope="module")
def world():
    return make_world(SMALL)


def test_a_seed_is_a_world(world):
    again = make_world(SMALL)
    other = make_world(SMALL.model_copy(update={"seed": 1}))
    assert again.passages == world.passages and again.rows == world.rows
    assert other.passages != world.passages


def test_entities_of_held_out_questions_appear_in_no_training_question(world):
    train = {name for row in world.rows["train"] for name in row["extra_info"]["path"]}
    for name in ("test", "test_3hop"):
        assert not train & {n for row in world.rows[name] for n in row["extra_info"]["path"]}
    asked = {row["prompt"][0]["content"] for row in world.rows["train"]}
    assert not asked & {row["prompt"][0]["content"] for row in world.rows["test_common"]}


def test_gold_passages_lead_from_the_subject_to_the_answer(world):
    contents = {p["id"]: p["contents"] for p in world.passages}
    for row in (row for rows in world.rows.values() for row in rows):
        extra = row["extra_info"]
        assert len(extra["gold_ids"]) == extra["hops"] == len(extra["path"]) - 1
        assert extra["path"][0] in row["prompt"][0]["content"]
        for gold, subject, target in zip(
            extra["gold_ids"], extra["path"], extra["path"][1:], strict=False
        ):
            title, text = contents[gold].split("\n")
            assert title == f'"{subject}"' and f" {target}." in text
        assert row["reward_model"]["ground_truth"]["target"] == [extra["path"][-1]]


def test_questions_nest_from_the_last_relation_outwards():
    question = Question(
        ("employer", "founder", "residence"), ("Torvel", "Kalmen", "Binzor", "Zorbin")
    )
    assert question.text == "Where does the founder of the employer of Torvel live?"
    assert len(relation_chains(1)) == 7


def test_common_facts_do_not_depend_on_the_seed(world):
    names = set(common_island())
    other = make_world(SMALL.model_copy(update={"seed": 5}))
    for w in (world, other):
        assert names <= {json.loads(p["contents"].split("\n")[0]) for p in w.passages}


def test_filler_makes_passages_longer_and_keeps_the_facts(world):
    long = make_world(SMALL.model_copy(update={"filler": 10}))
    assert min(p["contents"].count(".") for p in long.passages) >= 11


def test_questions_are_different_and_spread_over_relations():
    questions = ask(common_island(), 1, 14, random.Random(0))
    assert len(set(questions)) == 14 and len({q.relations for q in questions}) == 7


def test_three_hops_are_trained_on_if_asked_for_and_the_other_files_stay(world):
    config = SMALL.model_copy(update={"train_three_hops": True})
    asked = make_world(config)
    three_hops = asked.rows.pop("train_3hop")
    assert asked.rows == world.rows and asked.passages == world.passages
    assert len(three_hops) == 50 and {row["extra_info"]["hops"] for row in three_hops} == {3}
    assert {len(row["extra_info"]["gold_ids"]) for row in three_hops} == {3}
    held_out = {name for row in world.rows["test_3hop"] for name in row["extra_info"]["path"]}
    assert not held_out & {name for row in three_hops for name in row["extra_info"]["path"]}
    assert set(config.files) - set(SMALL.files) == {"train_3hop.parquet"}


def test_command_line_writes_the_files(tmp_path):
    small = [
        "--train-people",
        "20",
        "--test-people",
        "20",
        "--train-questions",
        "20",
        "--test-questions",
        "10",
    ]
    assert main(["--out", str(tmp_path), *small]) == 0
    table = pq.read_table(tmp_path / "train.parquet")
    assert {"data_source", "prompt", "ability", "reward_model", "extra_info"} == set(
        table.column_names
    )
    line = json.loads((tmp_path / "corpus.jsonl").read_text().splitlines()[0])
    assert set(line) == {"id", "contents"}
