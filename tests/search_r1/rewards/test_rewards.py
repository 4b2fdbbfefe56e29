"""Scores by hand, by their properties, and against the published scores of real rollouts."""

import asyncio
import json
import math
import re
import string
from dataclasses import replace
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.responses import JSONResponse
from hydra import compose, initialize_config_dir
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from search_r1.rewards import components
from search_r1.rewards import compose as composition
from search_r1.rewards.compose import SearchReward
from search_r1.rewards.config import SearchRewardConfig
from search_r1.rewards.episode import Episode
from search_r1.rewards.matching import (
    exact_match,
    extract_answer,
    f1,
    gold_answers,
    normalize_answer,
    substring_match,
)
from search_r1.trajectory import Search
from tests.retrieval import serving
from tests.search_r1.rewards.trajectories import trajectory_of
from tests.templates import make_family_tokenizer
from verl.agent import AgentLoop, Source, TrajectoryFailed
from verl.trainer.config import validate
from verl.trainer.driver import check_trainable
from verl.utils.errors import ConfigError
from verl.utils.reward import score as score_trajectory
from verl.utils.schedule import weight_at
from verl.utils.tokenizer import encode_text

ROOT = Path(__file__).resolve().parents[3]
CONFIG = SearchRewardConfig()
ROLLOUTS = ROOT.parent / "shared/data/searchr1_trajectories"
WORDS = st.lists(
    st.sampled_from(["the", "a", "The", "U.S.A.", "well-known", "Rome", "–", "an apple", "7"]),
    max_size=6,
)
TEXT = st.one_of(WORDS.map(" ".join), st.text(max_size=20))


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
    assert (
        exact_match("the Beatles!", ["x", "Beatles"]) == 1
        and exact_match("Beatles band", ["Beatles"]) == 0
    )
    assert exact_match("the", ["A"]) == 1  # both normalise to nothing, as in the original
    assert exact_match("x", []) == substring_match("x", []) == f1("x", []) == 0
    assert (
        substring_match("The Beatles band", ["beatles"]) == 1
        and substring_match("Beat", ["beatles"]) == 0
    )
    assert f1("the red house", ["red house", "x"]) == 1
    assert f1("red house", ["red brick house"]) == pytest.approx(2 * 1 * (2 / 3) / (1 + 2 / 3))
    assert f1("red red", ["red"]) == pytest.approx(2 / 3)
    assert f1("blue", ["red"]) == f1("", ["red"]) == 0


@settings(deadline=None)
@given(TEXT, st.lists(TEXT, min_size=1, max_size=3))
def test_properties_of_matching(prediction, golds):
    em = exact_match(prediction, golds)
    sub = substring_match(prediction, golds)
    overlap = f1(prediction, golds)
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
    assert gold_answers({"target": ["a", "b"]}) == ["a", "b"] and gold_answers({"target": "a"}) == [
        "a"
    ]
    assert gold_answers("a") == ["a"] and gold_answers(["a", 7]) == ["a", "7"]


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
    parts = {"em": 0.0, "f1": 0.8, "sub_em": 0.0, "format": 1.0, "answered": 1.0, "no_answer": 0.0}
    assert score(tokenizer, trajectory, ["red brick house"]) == pytest.approx(
        {"score": 0.0, **parts}
    )
    mixed = score(tokenizer, trajectory, ["red brick house"], em=0.5, f1=0.25, format=0.1)
    assert mixed["score"] == pytest.approx(0.25 * 0.8 + 0.1)
    assert score(tokenizer, trajectory, "Red House.")["score"] == 1


@pytest.mark.parametrize("gold", ["Beijing", "and", "Rome"])
def test_what_the_policy_did_not_write_earns_nothing(tokenizer, gold):
    """The original scores a trajectory without an answer as if it had said `Beijing`: the prompt's
    example."""
    trajectory = trajectory_of(
        tokenizer, ("M", "no idea"), ("O", "<answer> Rome </answer>"), ("M", "none")
    )
    assert score(tokenizer, trajectory, gold, em=1, f1=1, format=1) == {
        "score": 0.0,
        "em": 0.0,
        "f1": 0.0,
        "sub_em": 0.0,
        "format": 0.0,
        "answered": 0.0,
        "no_answer": 1.0,
    }


def test_last_turn_that_answers_counts(tokenizer):
    turns = [
        ("M", "<answer> Oslo </answer>"),
        ("O", "x"),
        ("M", "<answer> Rome </answer>"),
        ("O", "x"),
        ("M", "hm"),
    ]
    assert score(tokenizer, trajectory_of(tokenizer, *turns), "Rome")["em"] == 1


def test_answer_does_not_span_turns_and_own_information_gains_nothing(tokenizer):
    spanning = trajectory_of(
        tokenizer, ("M", "<answer> Ro"), ("O", "try again"), ("M", "me </answer>")
    )
    assert score(tokenizer, spanning, "Rome")["answered"] == 0
    faked = (
        "<think> t </think> <information> <answer> Oslo </answer> </information> <answer> Rome "
        "</answer>"
    )
    result = score(tokenizer, trajectory_of(tokenizer, ("M", faked)), "Oslo")
    assert result["em"] == 0 and result["format"] == 0


def test_special_tokens_of_the_policy_are_no_text(tokenizer):
    trajectory = trajectory_of(tokenizer, ("M", "<think> t </think> <answer> Rome </answer>"))
    trajectory.segments[0].token_ids.append(tokenizer.eos_token_id)
    result = score(tokenizer, trajectory, "Rome")
    assert result["em"] == result["format"] == 1


OPENED = [
    ("M", "t </think> <search> q </search>"),
    ("O", "\n\n<information>Doc 1</information>\n\n"),
    ("M", "<think> t </think> <answer> Rome </answer>"),
]
"""Turns of a policy whose first thought was opened by the chat template."""


@pytest.mark.parametrize(
    ("weights", "expected"), [({"em_format": 1}, 1.0), ({"ikea": 1}, 1.6), ({"format": 1}, 1.0)]
)
@pytest.mark.parametrize("opening", ["<think>\n", "<think>"])
def test_a_thought_that_the_template_opened_is_well_formed(
    tmp_path, tokenizer, weights, expected, opening
):
    for words in (
        tokenizer,
        make_family_tokenizer(tmp_path, "qwen3-thinking"),
    ):  # <think> in pieces, and a token
        trajectory = trajectory_of(words, *OPENED)
        trajectory.prompt_ids += words(
            f"<|im_start|>assistant\n{opening}", add_special_tokens=False
        )["input_ids"]
        assert score(words, trajectory, "Rome", **({"em": 0} | weights))["score"] == expected


def test_a_thought_that_the_template_opened_after_a_correction_is_well_formed(tokenizer):
    again = (
        "O",
        "<|im_end|>\n<|im_start|>user\nTry again.<|im_end|>\n<|im_start|>assistant\n<think>\n",
    )
    trajectory = trajectory_of(
        tokenizer, ("M", SEARCHING), again, ("M", "t </think> <answer> Rome </answer>")
    )
    assert score(tokenizer, trajectory, "Rome")["format"] == 1
    # RAG: passages stand in the prompt
    retrieved_first = trajectory_of(tokenizer, ("O", ""), *OPENED)
    retrieved_first.prompt_ids += encode_text(tokenizer, "<think>\n")
    assert score(tokenizer, retrieved_first, "Rome")["format"] == 1


@pytest.mark.parametrize("prompt_end", ["", "<think>\n\n</think>\n\n", "<think> or not"])
def test_a_thought_that_nobody_opened_is_malformed(tokenizer, prompt_end):
    trajectory = trajectory_of(tokenizer, *OPENED)
    trajectory.prompt_ids += encode_text(tokenizer, prompt_end)
    assert score(tokenizer, trajectory, "Rome")["format"] == 0.5
    own = trajectory_of(tokenizer, ("M", "<think>"), ("M", "t </think> <answer> Rome </answer>"))
    assert score(tokenizer, own, "Rome")["format"] == 0


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        (["<think> 1 < 2 </think>\n<answer> a </answer>"], 1.0),
        (
            [
                "<think> t </think><search> q </search>\n\n",
                " <think> t </think> <answer> a </answer>\n",
            ],
            1.0,
        ),
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
    assert components.format_share(episode(turns), CONFIG) == expected
    assert components.is_well_formed(episode(turns)) == (expected == 1.0)


def episode(turns, golds=("Rome",), queries=(), passages=None):
    """An episode in which each query was asked in a turn of its own."""
    found = passages or [[] for _ in queries]
    searches = [
        [Search(query, [passage_of(text) for text in texts])]
        for query, texts in zip(queries, found, strict=True)
    ]
    return Episode("q?", list(golds), list(turns), searches)


def passage_of(text):
    title, _, body = text.rpartition("\n")
    return {"title": title, "text": body}


SEARCHING = "<think> t </think> <search> q </search>"
RIGHT = "<think> t </think> <answer> Rome </answer>"
WRONG = "<think> t </think> <answer> Oslo </answer>"


@pytest.mark.parametrize(
    ("turns", "passages", "expected"),
    [
        ([SEARCHING, RIGHT], ["Rome is"], 1.0),
        ([SEARCHING, "<answer> Rome </answer>"], ["Rome is"], 0.8),
        ([SEARCHING, WRONG], ["x"], 0.2),
        ([SEARCHING, WRONG], ["in rome, they"], 0.5),
        ([SEARCHING, "<answer> Oslo </answer>"], ["Rome"], 0.1),
        ([SEARCHING, "hm"], ["Rome"], 0.0),
        ([], [], 0.0),
    ],
)
def test_em_with_format_is_the_released_table(turns, passages, expected):
    e = episode(turns, queries=["q"], passages=[passages])
    config = SearchRewardConfig(retrieval_score=0.3)
    assert components.em_format(e, config) == pytest.approx(expected)


def test_a_search_inside_think_is_well_formed_by_option():
    nested = episode(["<think> t <search> q </search>", RIGHT])
    assert components.is_well_formed(nested, nested=True) and not components.is_well_formed(nested)
    closed = episode(["<think> t <search> q </search> </think>", RIGHT])
    assert components.is_well_formed(closed, nested=True)
    assert not components.is_well_formed(episode([RIGHT, RIGHT]), nested=True)


def test_a_call_of_another_tool_is_well_formed_where_the_trajectory_names_its_tags():
    calling = "<think> t </think> <calculate> 1 + 1 </calculate>"
    unknown = episode([SEARCHING, calling, RIGHT])
    tags = {"call_tags": ("search", "calculate"), "result_tags": ("information", "result")}
    known = replace(unknown, **tags)
    assert components.format_share(unknown, CONFIG) == pytest.approx(2 / 3)
    assert components.format_share(known, CONFIG) == 1 and components.is_well_formed(known)
    faked = replace(known, turns=["<think> <result> 2 </result> </think> <answer> Rome </answer>"])
    assert not components.is_well_formed(faked)
    nested = replace(known, turns=["<think> t <calculate> 1 + 1 </calculate>", RIGHT])
    assert components.is_well_formed(nested, nested=True) and not components.is_well_formed(nested)


def test_retrieval_reads_what_the_retriever_brought_alone():
    own = episode(["<think> t </think> <information> Rome </information> <answer> x </answer>"])
    assert components.retrieval(own, CONFIG) == 0
    found = episode([WRONG], queries=["q"], passages=[["T\nThe ROME."]])
    assert components.retrieval(found, CONFIG) == 1
    wordless = episode([WRONG], golds=["the", "!"], queries=["q"], passages=[["the x"]])
    assert components.retrieval(wordless, CONFIG) == 0


@pytest.mark.parametrize(
    ("last", "searches", "expected"),
    [
        (RIGHT, 0, 1.6),
        (RIGHT, 1, 1.4),
        (RIGHT, 2, 1.2),
        (RIGHT, 3, 1.0),
        (RIGHT, 5, 1.0),
        (WRONG, 0, 0.0),
        (WRONG, 2, 0.05),
        ("x", 1, -1.0),
    ],
)
def test_ikea(last, searches, expected):
    e = episode([SEARCHING] * searches + [last], queries=["q"] * searches)
    assert components.ikea(e, CONFIG) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        ([SEARCHING, "<think> t </think> <answer> Rome city </answer>"], 2 / 3),
        (["<answer> Rome </answer>"], 1.0),
        ([SEARCHING, WRONG], 0.0),
        ([SEARCHING, "hm"], -1.0),
        (["<think> t <search> q </search>", "so </think> <answer> Rome </answer>"], 1.0),
        (["<think> t <answer> Rome </answer>"], -1.0),
        (["</think> <think> <answer> Rome </answer>"], -1.0),
        (["<think> <think> t </think> </think> <answer> Rome </answer>"], -1.0),
        (["<information> <answer> Rome </answer>"], -1.0),
        ([], -1.0),
    ],
)
def test_f1_of_an_answer_whose_tags_are_balanced(turns, expected):
    assert components.balanced_f1(episode(turns), CONFIG) == pytest.approx(expected)


def test_a_wrong_answer_that_is_partly_right_earns_some_of_a_right_one():
    half = episode(["<answer> Rome city </answer>"])
    assert components.soft_em(half, CONFIG) == pytest.approx(0.8 * 2 / 3)
    assert components.soft_em(episode([RIGHT]), CONFIG) == 1.0
    assert components.soft_em(episode([WRONG]), CONFIG) == 0.0


def test_otc_by_hand():
    def of(searches, last=RIGHT):
        return episode([SEARCHING] * searches + [last], queries=["q"] * searches)

    assert components.otc_ppo(of(0), CONFIG) == 1 and components.otc_ppo(of(2, WRONG), CONFIG) == 0
    assert components.otc_ppo(of(1), CONFIG) == pytest.approx(math.cos(math.pi / 6))
    assert components.otc_ppo(of(2), CONFIG) == pytest.approx(math.cos(math.pi / 4))
    # n = 1: m = 1 -> f = 1 -> sin(pi / 2) = 1; m = 3 -> f = 1.5 -> sin(3 pi / 4)
    group = components.otc_grpo([3, 1, 0], [True, True, False], 4)
    assert group == pytest.approx([math.sin(3 * math.pi / 4), 1.0, 0.0])
    assert components.otc_grpo([0, 2], [True, True], 4) == pytest.approx(
        [1.0, math.cos(math.pi / 4)]
    )
    assert components.otc_grpo([1, 2], [False, False], 4) == [0.0, 0.0]


@pytest.mark.parametrize(
    ("tokens", "expected"), [(0, 0), (60, 0), (80, -0.5), (100, -1), (500, -1)]
)
def test_overlong(tokens, expected):
    config = SearchRewardConfig(overlong_limit=100, overlong_buffer=40)
    assert components.overlong(replace(episode([]), own_tokens=tokens), config) == expected


def test_penalties_and_f1_plus(tokenizer):
    repeating = episode([], queries=["The moon?", "moon", "sun"])
    assert components.repeated_query(repeating, CONFIG) == pytest.approx(1 / 3)
    assert components.repeated_query(episode([]), CONFIG) == 0

    silent = trajectory_of(tokenizer, ("M", "hm"))
    plus = {"em": 0.0, "f1": 1.0, "no_search": -0.1, "no_answer": -0.1}
    assert score(tokenizer, silent, "Rome", **plus)["score"] == pytest.approx(-0.2)
    half = trajectory_of(tokenizer, ("M", "<answer> red house </answer>"))
    assert score(tokenizer, half, "red brick house", **plus)["score"] == pytest.approx(0.8 - 0.1)


def test_weights_follow_their_schedule(tokenizer):
    schedule = [(10, 0.0), (20, 1.0), (40, 0.5)]
    assert [weight_at(schedule, step) for step in (1, 10, 15, 20, 30, 99)] == [
        0,
        0,
        0.5,
        1,
        0.75,
        0.5,
    ]
    assert weight_at(2.0, 7) == 2.0
    # of policy version 3, which is step 4
    right = trajectory_of(tokenizer, ("M", "<answer> Rome </answer>"))
    assert score(tokenizer, right, "Rome", em=[(0, 0.0), (8, 1.0)])["score"] == pytest.approx(0.5)
    with pytest.raises(ValueError, match="rising steps"):
        SearchRewardConfig(em=[(5, 1.0), (5, 0.0)])


def test_group_scores_are_added_to_the_trajectories(tokenizer):
    def rolled(searches):
        found = ("O", "<information></information>")
        t = trajectory_of(tokenizer, *[("M", SEARCHING), found] * searches, ("M", RIGHT))
        for s in t.segments:
            if s.source is Source.OBSERVATION:
                s.info = {"kind": "search", "query": "q", "passages": []}
        t.reward = score(tokenizer, t, "Rome", em=0.0, otc_grpo=2.0)
        return t

    group = [rolled(1), rolled(3)]
    SearchReward(SearchRewardConfig(em=0.0, otc_grpo=2.0), tokenizer).score_groups([group])
    assert [t.reward["score"] for t in group] == pytest.approx([2.0, 2 * math.sin(3 * math.pi / 4)])
    assert all(t.reward["otc_grpo"] <= 1 for t in group)


def test_its_entries_are_those_that_it_returns_and_dynamic_sampling_on_another_is_refused(
    tokenizer,
):
    reward = SearchReward(SearchRewardConfig(ikea=1.0, random=1.0, otc_grpo=1.0), tokenizer)
    trajectory = trajectory_of(tokenizer, ("M", RIGHT))
    asyncio.run(score_trajectory(reward, trajectory, {"reward_model": {"ground_truth": "Rome"}}))
    reward.score_groups([[trajectory]])
    assert trajectory.reward.keys() == reward.entries
    with initialize_config_dir(str(ROOT / "configs"), version_base=None):
        composed = compose(
            "grpo", ["experiment=closed_world/grpo", "algorithm.filter_groups.enable=true"]
        )
    for metric in ("em", "score", "otc_ppo"):
        composed.algorithm.filter_groups.metric = metric
        config = validate(OmegaConf.to_container(composed, resolve=True))
        if metric in reward.entries:
            check_trainable(config, AgentLoop(None, None), reward)
        else:
            with pytest.raises(
                ConfigError, match=r"filter_groups\.metric=otc_ppo: .* only answered, em, "
            ):
                check_trainable(config, AgentLoop(None, None), reward)


ANY_TEXT = st.one_of(
    st.text(max_size=40),
    st.lists(
        st.sampled_from(
            [
                "<think>",
                "</think>",
                "<search>",
                "</search>",
                "<answer>",
                "</answer>",
                "<information>",
                "</information>",
                "Rome",
                "\n",
                " ",
                "\ud7ff",
                "\0",
            ]
        ),
        max_size=12,
    ).map("".join),
)


@settings(deadline=None, max_examples=300)
@given(
    st.lists(ANY_TEXT, max_size=4),
    st.lists(ANY_TEXT, min_size=1, max_size=2),
    st.lists(ANY_TEXT, max_size=3),
    ANY_TEXT,
)
def test_components_keep_their_range_and_ignore_what_was_retrieved(turns, golds, queries, passage):
    bare, full = (episode(turns, golds, queries, [[p] for _ in queries]) for p in ("", passage))
    ranges = {"ikea": (-1, 1.6), "em_format": (0, 1), "balanced_f1": (-1, 1)}
    for name, function in (composition.ALWAYS | composition.WEIGHTED).items():
        low, high = ranges.get(name, (0, 1))
        assert low <= function(bare, CONFIG) <= high
        if name != "retrieval":
            assert function(bare, CONFIG) == function(full, CONFIG)


class Endpoint:
    """An OpenAI-compatible server that gives these answers in turn, the last one for ever."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.asked = []
        self.app = FastAPI()
        self.app.add_api_route("/v1/chat/completions", self.complete, methods=["POST"])

    async def complete(self, body: dict):
        self.asked.append(body)
        status, text = self.answers[min(len(self.asked), len(self.answers)) - 1]
        return JSONResponse(
            {"choices": [{"message": {"role": "assistant", "content": text}}]}, status
        )


def judged(tokenizer, endpoint, text="<answer> Roma </answer>"):
    trajectory = trajectory_of(tokenizer, ("M", text))
    row = {
        "reward_model": {"ground_truth": {"target": ["Rome", "Eternal City"]}},
        "extra_info": {"question": "Which?"},
    }
    with serving(endpoint.app) as base:
        where = {"url": f"{base}/v1", "model": "m", "max_retries": 2, "backoff_s": 0.01}
        reward = SearchReward(
            SearchRewardConfig(em=0.0, judge=1.0, judge_endpoint=where), tokenizer
        )

        async def run():
            return await reward(trajectory, row)

        return asyncio.run(run())


def test_the_judge_is_asked_and_believed(tokenizer):
    endpoint = Endpoint((200, "Yes."))
    assert judged(tokenizer, endpoint)["score"] == 1.0
    (body,) = endpoint.asked
    text = body["messages"][0]["content"]
    assert body["model"] == "m" and all(
        part in text for part in ("Which?", "Rome; Eternal City", "Roma")
    )
    assert judged(tokenizer, Endpoint((200, "no, it does not")))["judge"] == 0.0
    silent = Endpoint((500, ""))
    assert judged(tokenizer, silent, "hm")["judge"] == 0.0 and not silent.asked


def test_the_judge_is_asked_again_and_a_failure_is_no_zero(tokenizer):
    endpoint = Endpoint((500, ""), (200, "perhaps"), (200, "no"))
    assert judged(tokenizer, endpoint)["score"] == 0.0 and len(endpoint.asked) == 3
    with pytest.raises(TrajectoryFailed, match="status 500"):
        judged(tokenizer, Endpoint((500, "")))
    refused = Endpoint((401, ""))
    with pytest.raises(TrajectoryFailed, match="status 401"):
        judged(tokenizer, refused)
    assert len(refused.asked) == 1


def test_random_reward_is_a_fair_reproducible_coin_that_changes_with_the_weights(tokenizer):
    def flips(version):
        for i in range(400):
            trajectory = trajectory_of(tokenizer, ("M", f"<answer> {i} </answer>"))
            trajectory.segments[0].policy_version = version
            result = score(tokenizer, trajectory, "x", em=0, random=1)
            assert result["score"] == result["random"]
            yield result["random"]

    first = list(flips(1))
    again = list(flips(1))
    later = list(flips(2))
    assert first == again and set(first) == {0.0, 1.0}
    assert (
        150 < sum(first) < 250
        and 150 < sum(a == b for a, b in zip(first, later, strict=True)) < 250
    )


@pytest.mark.skipif(not ROLLOUTS.is_dir(), reason="needs ../shared/data/searchr1_trajectories")
@pytest.mark.parametrize("run", ["nq_qwen2.5-3b-base-grpo", "bamboogle_qwen2.5-3b-instruct-grpo"])
def test_published_scores_of_real_rollouts(tokenizer, run):
    """Every record's em, acc and f1, and the averages of the run, from the policy's own text."""
    records = json.loads((ROLLOUTS / run / "intermediate_data.json").read_text())
    expected = dict(
        line.split(": ")
        for line in (ROLLOUTS / run / "metric_score.txt").read_text().split("\n")
        if line
    )
    sums = {"em": 0.0, "acc": 0.0, "f1": 0.0}
    for record in records:
        output = record["output"]
        golds = record["golden_answers"]
        own = re.split(
            r"\n\n<information>.*?</information>\n\n", output["final_response"], flags=re.DOTALL
        )
        answer = next((a for turn in own[::-1] if (a := extract_answer(turn)) is not None), "")
        assert answer == output["pred"]
        scores = {
            "em": exact_match(answer, golds),
            "acc": substring_match(answer, golds),
            "f1": f1(answer, golds),
        }
        assert scores == pytest.approx(output["metric_score"])
        sums = {name: total + scores[name] for name, total in sums.items()}
    for name, total in sums.items():
        assert total / len(records) == pytest.approx(float(expected[name]))
