"""The answer that a reward reads, against the `pred` of real rollouts; and which other rules these
would have told."""

import json
import re
from pathlib import Path

import pytest

from search_r1.agent.actions import parse_action
from search_r1.rewards.components import em, f1, sub_em
from search_r1.rewards.config import SearchRewardConfig
from search_r1.rewards.episode import read_episode
from search_r1.rewards.matching import exact_match, extract_answer
from tests.models import make_tokenizer
from verl.agent import Segment, Source, Trajectory
from verl.utils.tokenizer import encode_text

ROLLOUTS = Path(__file__).resolve().parents[4] / "shared/data/searchr1_trajectories"
NQ = "nq_qwen2.5-3b-base-grpo"
BAMBOOGLE = "bamboogle_qwen2.5-3b-instruct-grpo"
BLOCK = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
INFORMATION = re.compile(r"(\n\n<information>.*?</information>\n\n)", re.DOTALL)
CLASSES = {
    "cut before any <answer>": lambda o, answer: (
        answer is None
        and o["pred"] == ""
        and o["stop_reason"] == "length"
        and "<answer" not in o["final_response"]
    ),
}
AGREE = {
    NQ: (999, {"cut before any <answer>": 1}, 0),
    BAMBOOGLE: (125, {"cut before any <answer>": 0}, 0),
}
"""Records that agree, that disagree by class, and how many of these change exact match."""
# with (records that differ from pred, those whose exact match changes) of NQ and of Bamboogle
RULES = {
    "last of the response": (lambda q, r: extract_answer(r), [(0, 0), (0, 0)]),
    "first of the response": (lambda q, r: "".join(BLOCK.findall(r)[:1]).strip(), [(0, 0), (0, 0)]),
    "the engine's": (
        lambda q, r: getattr(parse_action(INFORMATION.split(r)[-1])[0], "text", ""),
        [(0, 0), (0, 0)],
    ),
    "with the prompt's example": (lambda q, r: extract_answer(q + r), [(1, 0), (0, 0)]),
    "no < inside": (
        lambda q, r: "".join(re.findall("<answer>([^<]*)</answer>", r)).strip(),
        [(0, 0), (4, 1)],
    ),
    "not stripped": (lambda q, r: "".join(BLOCK.findall(r)), [(999, 0), (0, 0)]),
}
CONFIG = SearchRewardConfig()
pytestmark = pytest.mark.skipif(
    not ROLLOUTS.is_dir(), reason="needs ../shared/data/searchr1_trajectories"
)


def records(run):
    return json.loads((ROLLOUTS / run / "intermediate_data.json").read_text())


def episode(record, tokenizer):
    ids = [
        encode_text(tokenizer, part)
        for part in INFORMATION.split(record["output"]["final_response"])
    ]
    segments = [
        Segment(Source.OBSERVATION if i % 2 else Source.MODEL, part) for i, part in enumerate(ids)
    ]
    row = {
        "question": record["question"],
        "reward_model": {"ground_truth": {"target": record["golden_answers"]}},
    }
    return read_episode(
        Trajectory(encode_text(tokenizer, record["output"]["query"]), segments), row, tokenizer
    )


@pytest.mark.parametrize("run", AGREE)
def test_every_answer_is_pred_or_of_a_named_class_and_every_score_is_the_published_one(
    tmp_path, run
):
    """em and acc are equal, f1 but for the rounding of another order of operations; averages as
    they are printed."""
    tokenizer = make_tokenizer(tmp_path)
    classes = dict.fromkeys(CLASSES, 0)
    changed = 0
    sums = [0.0, 0.0, 0.0]
    for record in (data := records(run)):
        e = episode(record, tokenizer)
        output = record["output"]
        if e.answer != output["pred"]:
            (name,) = [name for name, rule in CLASSES.items() if rule(output, e.answer)]
            classes[name] += 1
            changed += em(e, CONFIG) != exact_match(output["pred"], e.golds)
        scores = [component(e, CONFIG) for component in (em, sub_em, f1)]
        published = output["metric_score"]
        assert scores[:2] == [published["em"], published["acc"]]
        assert scores[2] == pytest.approx(published["f1"], rel=2**-51, abs=0)
        sums = [total + score for total, score in zip(sums, scores, strict=True)]
    assert (len(data) - sum(classes.values()), classes, changed) == AGREE[run]
    averages = re.findall(r": (.+)", (ROLLOUTS / run / "metric_score.txt").read_text())
    assert [total / len(data) for total in sums] == [float(average) for average in averages]


@pytest.mark.parametrize("rule", RULES)
def test_what_the_rollouts_tell_apart(rule):
    """With one `<answer>` at most they cannot tell the first from the last; they rule out the last
    three."""
    extract, expected = RULES[rule]
    for run, differ in zip((NQ, BAMBOOGLE), expected, strict=True):
        changed = []
        for golds, output in (
            (record["golden_answers"], record["output"]) for record in records(run)
        ):
            assert output["final_response"].count("<answer>") <= 1
            if (answer := extract(output["query"], output["final_response"]) or "") != output[
                "pred"
            ]:
                changed.append(exact_match(answer, golds) != exact_match(output["pred"], golds))
        assert (len(changed), sum(changed)) == differ
