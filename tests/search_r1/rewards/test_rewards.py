"""Scores by hand, by their properties, and against the published scores of real rollouts."""

import asyncio
import json
import re
import string
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search_r1.rewards.compose import SearchReward, SearchRewardConfig, format_score
from search_r1.rewards.matching import exact_match, extract_answer, f1, gold_answers, normalize_answer, substring_match
from tests.models import make_tokenizer
from verl.agent import Segment, Source, Trajectory
from verl.utils.tokenizer import encode_text

ROLLOUTS = Path(__file__).resolve().parents[4] / "shared/data/searchr1_trajectories"
WORDS = st.lists(st.sampled_from(["the", "a", "The", "U.S.A.", "well-known", "Rome", "–", "an apple", "7"]), max_size=6)
TEXT = st.one_of(WORDS.map(" ".join), st.text(max_size=20))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The U.S.A. – a Test", "usa – test"),
        ("well-known", "wellknown"),
        ("  An  apple, the apple ", "apple apple"),
        ("theatre", "theatre"),
        ("The", ""),
        ("İstanbul", "i̇stanbul"),
    ],
)
def test_normalisation(text, normal):
    assert normalize_answer(text) == normal


def test_matching_by_hand():
    assert exact_match("the Beatles!", ["x", "Beatles"]) == 1 and exact_match("Beatles band", ["Beatles"]) == 0
    assert exact_match("the", ["A"]) == 1  # both normalise to nothing, as in the original
    assert exact_match("x", []) == substring_match("x", []) == f1("x", []) == 0
    assert substring_match("The Beatles band", ["beatles"]) == 1 and substring_match("Beat", ["beatles"]) == 0
    assert f1("the red house", ["red house", "x"]) == 1
    assert f1("red house", ["red brick house"]) == pytest.approx(2 * 1 * (2 / 3) / (1 + 2 / 3))
    assert f1("red red", ["red"]) == pytest.approx(2 / 3)
    assert f1("blue", ["red"]) == f1("", ["red"]) == 0


@settings(deadline=None)
@given(TEXT, st.lists(TEXT, min_size=1, max_size=3))
def test_properties_of_matching(prediction, golds):
    em, sub, overlap = exact_match(prediction, golds), substring_match(prediction, golds), f1(prediction, golds)
    assert 0 <= overlap <= 1 and em <= sub
    assert normalize_answer(normalize_answer(prediction)) == normalize_answer(prediction)
    assert exact_match(prediction, [prediction]) == 1
    assert exact_match(prediction, golds[::-1]) == em and f1(prediction, golds[::-1]) == overlap
    assert exact_match(f" The {prediction.upper()}. ", [f" the {prediction.upper()}"]) == 1
    if em and normalize_answer(prediction):
        assert overlap == 1
    assert not set(normalize_answer(prediction)) & set(string.punctuation)


def test_last_complete_answer_counts():
    assert extract_answer("<answer> a </answer> <answer>\nb </answer> <answer> c") == "b"
    assert extract_answer("<answer></answer>") == "" and extract_answer("<answer> a") is None


def test_gold_answers():
    assert gold_answers({"target": ["a", "b"]}) == ["a", "b"] and gold_answers({"target": "a"}) == ["a"]
    assert gold_answers("a") == ["a"] and gold_answers(["a", 7]) == ["a", "7"]


def trajectory_of(tokenizer, *segments):
    made = [
        Segment(Source.MODEL if author == "M" else Source.OBSERVATION, encode_text(tokenizer, text), policy_version=3)
        for author, text in segments
    ]
    return Trajectory(encode_text(tokenizer, "For example, <answer> Beijing </answer>. Question: x?\n"), made)


def score(tokenizer, trajectory, gold, **weights):
    row = {"reward_model": {"ground_truth": {"target": gold}}}
    result = SearchReward(SearchRewardConfig(**weights), tokenizer)(trajectory, row)
    assert not asyncio.iscoroutine(result)
    return result


def test_components_by_hand(tokenizer):
    trajectory = trajectory_of(
        tokenizer,
        ("M", "<think> t </think> <search> q </search>\n\n"),
        ("O", "<information>Doc 1 <answer> Rome </answer></information>\n\n"),
        ("M", "<think> t </think> <answer> red house </answer>"),
    )
    parts = {"em": 0.0, "f1": 0.8, "sub_em": 0.0, "format": 1.0, "answered": 1.0}
    assert score(tokenizer, trajectory, ["red brick house"]) == pytest.approx({"score": 0.0, **parts})
    mixed = score(tokenizer, trajectory, ["red brick house"], em=0.5, f1=0.25, format=0.1)
    assert mixed["score"] == pytest.approx(0.25 * 0.8 + 0.1)
    assert score(tokenizer, trajectory, "Red House.")["score"] == 1


@pytest.mark.parametrize("gold", ["Beijing", "and", "Rome"])
def test_what_the_policy_did_not_write_earns_nothing(tokenizer, gold):
    """The original scores a trajectory without an answer as if it had said `Beijing`: the prompt's example."""
    trajectory = trajectory_of(tokenizer, ("M", "no idea"), ("O", "<answer> Rome </answer>"), ("M", "none"))
    assert score(tokenizer, trajectory, gold, em=1, f1=1, format=1) == {
        "score": 0.0, "em": 0.0, "f1": 0.0, "sub_em": 0.0, "format": 0.0, "answered": 0.0,
    }  # fmt: skip


def test_last_turn_that_answers_counts(tokenizer):
    turns = [("M", "<answer> Oslo </answer>"), ("O", "x"), ("M", "<answer> Rome </answer>"), ("O", "x"), ("M", "hm")]
    assert score(tokenizer, trajectory_of(tokenizer, *turns), "Rome")["em"] == 1


def test_answer_does_not_span_turns_and_own_information_gains_nothing(tokenizer):
    spanning = trajectory_of(tokenizer, ("M", "<answer> Ro"), ("O", "try again"), ("M", "me </answer>"))
    assert score(tokenizer, spanning, "Rome")["answered"] == 0
    faked = "<think> t </think> <information> <answer> Oslo </answer> </information> <answer> Rome </answer>"
    result = score(tokenizer, trajectory_of(tokenizer, ("M", faked)), "Oslo")
    assert result["em"] == 0 and result["format"] == 0


def test_special_tokens_of_the_policy_are_no_text(tokenizer):
    trajectory = trajectory_of(tokenizer, ("M", "<think> t </think> <answer> Rome </answer>"))
    trajectory.segments[0].token_ids.append(tokenizer.eos_token_id)
    result = score(tokenizer, trajectory, "Rome")
    assert result["em"] == result["format"] == 1


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        (["<think> 1 < 2 </think>\n<answer> a </answer>"], 1.0),
        (["<think> t </think><search> q </search>\n\n", " <think> t </think> <answer> a </answer>\n"], 1.0),
        (["<search> q </search>", "<think> t </think> <answer> a </answer>"], 0.5),
        (["<think> t </think> <search> q </search>"], 0.0),
        (["<think> t </think> <answer> a </answer> more"], 0.0),
        (["<think> t </think> so <answer> a </answer>"], 0.0),
        (["<think> t <search> q </search> </think> <answer> a </answer>"], 0.0),
        (["<think> t </think> <information>x</information> <answer> a </answer>"], 0.0),
        ([], 0.0),
    ],
)
def test_format(turns, expected):
    assert format_score(turns) == expected


def test_random_reward_is_a_fair_reproducible_coin_that_changes_with_the_weights(tokenizer):
    def flips(version):
        for i in range(400):
            trajectory = trajectory_of(tokenizer, ("M", f"<answer> {i} </answer>"))
            trajectory.segments[0].policy_version = version
            result = score(tokenizer, trajectory, "x", em=0, random=1)
            assert result["score"] == result["random"]
            yield result["random"]

    first, again, later = list(flips(1)), list(flips(1)), list(flips(2))
    assert first == again and set(first) == {0.0, 1.0}
    assert 150 < sum(first) < 250 and 150 < sum(a == b for a, b in zip(first, later, strict=True)) < 250


@pytest.mark.skipif(not ROLLOUTS.is_dir(), reason="needs ../shared/data/searchr1_trajectories")
@pytest.mark.parametrize("run", ["nq_qwen2.5-3b-base-grpo", "bamboogle_qwen2.5-3b-instruct-grpo"])
def test_published_scores_of_real_rollouts(tokenizer, run):
    """Every record's em, acc and f1, and the averages of the run, from the policy's own text."""
    records = json.loads((ROLLOUTS / run / "intermediate_data.json").read_text())
    expected = dict(line.split(": ") for line in (ROLLOUTS / run / "metric_score.txt").read_text().split("\n") if line)
    sums = {"em": 0.0, "acc": 0.0, "f1": 0.0}
    for record in records:
        output, golds = record["output"], record["golden_answers"]
        own = re.split(r"\n\n<information>.*?</information>\n\n", output["final_response"], flags=re.DOTALL)
        answer = next((a for turn in own[::-1] if (a := extract_answer(turn)) is not None), "")
        assert answer == output["pred"]
        scores = {"em": exact_match(answer, golds), "acc": substring_match(answer, golds), "f1": f1(answer, golds)}
        assert scores == pytest.approx(output["metric_score"])
        sums = {name: total + scores[name] for name, total in sums.items()}
    for name, total in sums.items():
        assert total / len(records) == pytest.approx(float(expected[name]))
