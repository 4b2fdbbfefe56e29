"""What single turns are paid."""

import asyncio
import random
from dataclasses import replace

import pytest

from search_r1.rewards import turn_components
from search_r1.rewards.compose import SearchReward
from search_r1.rewards.config import SearchRewardConfig
from search_r1.rewards.episode import Episode, read_episode
from search_r1.trajectory import GoldPassages, Search, searches_by_turn
from tests.search_r1.rewards.trajectories import trajectory_of
from verl.agent import Segment, Source
from verl.utils.errors import RewardError
from verl.utils.reward import score

ROW = {
    "data_source": "made",
    "reward_model": {"ground_truth": {"target": ["Rome"]}},
    "extra_info": {"question": "q?", "gold_ids": ["1", "2"]},
}


def passage(name):
    return {"id": name, "title": f"T{name}", "text": f"about {name}"}


def found(query, *names):
    return Search(query, [passage(name) for name in names])


def episode(*by_turn, gold=("1", "2")):
    names = None if gold is None else GoldPassages(frozenset(gold), "id")
    return Episode("q?", ["Rome"], [], [list(searches) for searches in by_turn], gold=names)


PLAYED = episode(
    [found("The moon?", "1", "5")],
    [found("moon", "5", "1"), found("sun", "2", "6")],
    [],
    [found("sun", "2")],
)


def test_evidence_is_paid_to_the_turn_that_found_it_first():
    assert turn_components.new_evidence(PLAYED) == [0.5, 0.5, 0.0, 0.0]
    both = episode([found("a", "1", "2")], [found("b", "1")])
    assert turn_components.new_evidence(both) == [1.0, 0.0]
    assert turn_components.new_evidence(episode([found("a", "1")], gold=())) == [0.0]


def test_a_path_is_worth_what_it_takes_of_the_reference_and_each_turn_what_it_changes():
    """By hand: after its searches it has taken 1 of 2 in 1, 2 of 2 in 3, and nothing more in 4."""
    assert turn_components.path(PLAYED) == pytest.approx([1 / 2, 2 / 3 - 1 / 2, 0.0, 1 / 2 - 2 / 3])
    in_any_order = episode([found("b", "2")], [found("a", "1")])
    assert turn_components.path(in_any_order) == [0.5, 0.5]
    both_at_once = episode([found("a", "1", "2")], [found("b", "9")])
    assert turn_components.path(both_at_once) == [1.0, 0.0]
    in_vain = episode([found("a", "9")], [found("b", "1")])
    assert turn_components.path(in_vain) == [0.0, 0.25]
    assert turn_components.path(episode([found("a", "1")], gold=())) == [0.0]


def test_what_the_agent_found_by_itself_is_no_turns_path():
    before = replace(episode([found("b", "2")], []), searches_before=[found("q?", "1")])
    assert turn_components.path(before) == [0.5, 0.0]


def test_what_was_found_or_asked_before_counts_against_the_later_turn():
    assert turn_components.redundancy(PLAYED) == [0.0, 0.5, 0.0, 1.0]
    assert turn_components.repeated_search(PLAYED) == [0.0, 1.0, 0.0, 1.0]


def test_coins_fall_for_turns_that_search():
    flips = [turn_components.coins(PLAYED, random.Random(seed)) for seed in range(200)]
    assert {flip[2] for flip in flips} == {0.0}
    for turn in (0, 1, 3):
        heads = sum(flip[turn] for flip in flips)
        assert 60 < heads < 140
    assert turn_components.coins(PLAYED, random.Random(3)) == flips[3]


def searching(tokenizer):
    """A trajectory of three turns, of which the first two find one gold passage each."""
    trajectory = trajectory_of(
        tokenizer,
        ("M", "<search> a </search>"),
        ("O", "<information> 1 </information>"),
        ("M", "<search> b </search>"),
        ("O", "<information> 2 </information>"),
        ("M", "<answer> Rome </answer>"),
    )
    for place, (query, name) in {1: ("a", "1"), 3: ("b", "2")}.items():
        trajectory.segments[place].info = {"query": query, "passages": [passage(name)]}
    return trajectory


def scored(tokenizer, trajectory, row=ROW, **weights):
    reward = SearchReward(SearchRewardConfig(**weights), tokenizer)
    asyncio.run(score(reward, trajectory, row))
    return trajectory


def test_turns_are_paid_a_part_of_the_score(tokenizer):
    trajectory = scored(tokenizer, searching(tokenizer), new_evidence=0.4, repeated_search=-1.0)
    assert [turn.reward for turn in trajectory.turns] == pytest.approx([0.2, 0.2, 0.0])
    assert trajectory.reward["new_evidence"] == 1.0 and trajectory.reward["repeated_search"] == 0.0
    assert trajectory.reward["score"] == pytest.approx(1.4)
    unpaid = scored(tokenizer, searching(tokenizer))
    assert [turn.reward for turn in unpaid.turns] == [0.0, 0.0, 0.0]
    assert "new_evidence" not in unpaid.reward


def test_a_search_belongs_to_the_turn_that_asked_and_not_to_an_aside(tokenizer):
    trajectory = searching(tokenizer)
    aside = Segment(Source.MODEL, [5], [-1.0], is_aside=True, info={"kind": "finding"})
    trajectory.segments.insert(1, aside)
    before, by_turn = searches_by_turn(trajectory)
    assert before == []
    assert [[search.query for search in asked] for asked in by_turn] == [["a"], [], ["b"], []]


def test_searches_that_the_agent_made_by_itself_count_and_are_paid_to_no_turn(tokenizer):
    """RAG and IRCoT search before the policy says anything."""
    trajectory = searching(tokenizer)
    searched = trajectory.segments.pop(1)
    trajectory.segments.insert(0, searched)
    scored(tokenizer, trajectory, new_evidence=1.0, no_search=-1.0)
    assert [turn.reward for turn in trajectory.turns] == pytest.approx([0.0, 0.5, 0.0])
    assert trajectory.reward["no_search"] == 0.0 and trajectory.reward["new_evidence"] == 0.5
    episode = read_episode(trajectory, ROW, tokenizer)
    assert episode.queries == ["a", "b"] and len(episode.passages) == 2


@pytest.mark.parametrize("facts", [{}, {"gold_ids": None}])
@pytest.mark.parametrize("name", ["new_evidence", "path"])
def test_evidence_that_the_data_do_not_name_ends_the_run_with_the_cure(tokenizer, name, facts):
    row = {**ROW, "extra_info": {"question": "q?", **facts}}
    with pytest.raises(RewardError, match=rf"{name} needs extra_info.gold_ids.*made row"):
        scored(tokenizer, searching(tokenizer), row, **{name: 1.0})
    unknown = {**ROW, "extra_info": {"question": "q?", "gold_ids": []}}
    trajectory = scored(tokenizer, searching(tokenizer), unknown, **{name: 1.0})
    assert trajectory.reward[name] == 0.0


def test_search_p1_pays_the_path_to_the_turns_and_the_rest_at_the_end(tokenizer):
    weights = {"em": 0.0, "soft_em": 0.6, "path": 0.3, "format": 0.1}
    trajectory = scored(tokenizer, searching(tokenizer), **weights)
    assert [turn.reward for turn in trajectory.turns] == pytest.approx([0.15, 0.15, 0.0])
    assert trajectory.reward["path"] == 1.0 and trajectory.reward["format"] == 0.0
    assert trajectory.reward["score"] == pytest.approx(0.6 + 0.3)
