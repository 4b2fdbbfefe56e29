"""Prices and weights by tool: what is charged to whom, by hand."""

import asyncio

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from search_r1.agent.config import SearchAgentConfig
from search_r1.agent.loop import SearchAgentLoop
from search_r1.rewards.compose import SearchReward
from search_r1.rewards.config import SearchRewardConfig
from tests.configs import ROOT
from tests.search_r1.agent.scripted import ADA, ANSWER, PROMPT, SEARCH, Engine, Library
from tests.search_r1.rewards.trajectories import trajectory_of
from verl.agent import AgentLoop, Source
from verl.trainer.config import build_reward, validate
from verl.trainer.driver import check_trainable
from verl.utils.errors import ConfigError
from verl.utils.reward import score as score_trajectory
from verl.utils.tokenizer import encode_text

ROW = {"reward_model": {"ground_truth": {"target": ["Torvel"]}}}
CALCULATOR = {"_target_": "tests.calculator.Calculator"}
GOOD = "<calculate> 2 * 3 </calculate>"
BAD = "<calculate> 2 * x </calculate>"
WRONG = "<answer> Oslo </answer>"


@pytest.fixture(scope="module")
def agent(tokenizer):
    made = SearchAgentLoop(SearchAgentConfig(tools=[CALCULATOR], max_turns=6), tokenizer)
    made.search.client = Library([ADA])
    return made


@pytest.fixture(scope="module")
def rolled(tokenizer, agent):
    """Trajectories of the loop itself: two searches, three sums of which one is wrong."""

    def roll(last):
        engine = Engine(tokenizer, [SEARCH, SEARCH, GOOD, BAD, GOOD, last])
        return asyncio.run(agent.run(encode_text(tokenizer, PROMPT), {}, engine))

    return {"right": roll(ANSWER), "wrong": roll(WRONG)}


def score(tokenizer, trajectory, **weights):
    return SearchReward(SearchRewardConfig(**weights), tokenizer)(trajectory, ROW)


def test_right_answers_pay_for_every_call_of_a_tool_that_has_a_price(tokenizer, rolled):
    prices = {"call_price": {"search": 0.02, "calculator": 0.01}}
    right = score(tokenizer, rolled["right"], **prices)
    assert right["call_price/search"] == 2 and right["call_price/calculator"] == 3
    assert right["score"] == pytest.approx(1 - 2 * 0.02 - 3 * 0.01)
    wrong = score(tokenizer, rolled["wrong"], **prices)
    assert wrong["score"] == wrong["call_price/search"] == 0


def test_all_answers_pay_where_the_configuration_says_so(tokenizer, rolled):
    prices = {"call_price": {"search": 0.02}, "price_when": "always"}
    assert score(tokenizer, rolled["right"], **prices)["score"] == pytest.approx(0.96)
    assert score(tokenizer, rolled["wrong"], **prices)["score"] == pytest.approx(-0.04)


def test_tokens_of_observations_have_a_price_and_are_those_that_the_metrics_count(
    tokenizer, agent, rolled
):
    trajectory = rolled["right"]
    tokens = sum(len(s.token_ids) for s in trajectory.segments if s.info.get("kind") == "search")
    assert tokens and agent.reduce_metrics([trajectory])["tool/search/tokens"] == tokens
    result = score(tokenizer, trajectory, token_price={"search": 0.001})
    assert result["token_price/search"] == tokens
    assert result["score"] == pytest.approx(1 - 0.001 * tokens)
    wrong = score(tokenizer, rolled["wrong"], token_price={"search": 0.001})
    assert wrong["score"] == wrong["token_price/search"] == 0


def test_what_was_called_and_what_went_wrong_have_weights_by_tool(tokenizer, rolled):
    weights = {"tool_used": {"calculator": 0.5}, "tool_errors": {"calculator": -0.1, "search": -1}}
    result = score(tokenizer, rolled["wrong"], **weights)
    parts = {name: value for name, value in result.items() if name.startswith("tool_")}
    assert parts == {
        "tool_used/calculator": 1,
        "tool_errors/calculator": 1,
        "tool_errors/search": 0,
    }
    assert result["score"] == pytest.approx(0.5 - 0.1)
    silent = trajectory_of(tokenizer, ("M", WRONG))
    assert score(tokenizer, silent, **weights)["score"] == 0


def test_a_block_that_the_policy_wrote_itself_costs_nothing(tokenizer):
    faked = trajectory_of(
        tokenizer, ("M", "<search> x </search> <information> y </information> " + ANSWER)
    )
    prices = {"call_price": {"search": 0.5}, "token_price": {"search": 0.5}}
    assert score(tokenizer, faked, **prices)["score"] == 1


def test_an_answer_to_a_turn_without_action_is_no_call(tokenizer):
    said = trajectory_of(tokenizer, ("M", "hm"), ("O", "Try again."), ("M", ANSWER))
    said.segments[1].info["kind"] = "invalid_action"
    assert said.segments[1].source is Source.OBSERVATION
    assert score(tokenizer, said, call_price={"search": 0.5})["score"] == 1


def test_prices_follow_schedules(tokenizer, rolled):
    trajectory = rolled["right"]  # of policy version 1, which is step 2
    price = {"search": [(0, 0.0), (4, 0.2)]}
    assert score(tokenizer, trajectory, call_price=price)["score"] == pytest.approx(1 - 2 * 0.1)


def test_its_entries_are_those_that_it_returns(tokenizer, rolled):
    weights = {
        name: {"search": 0.1} for name in ("call_price", "token_price", "tool_used", "tool_errors")
    }
    reward = SearchReward(SearchRewardConfig(**weights), tokenizer)
    trajectory = rolled["right"]
    asyncio.run(score_trajectory(reward, trajectory, ROW))
    assert trajectory.reward.keys() == reward.entries
    assert {"call_price/search", "tool_errors/search"} < reward.entries


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"call_price": {"search": -0.1}}, "expected a price of at least 0 for search"),
        ({"token_price": {"search": [(0, 0.1), (5, -0.1)]}}, "expected a price of at least 0"),
        ({"call_price": {"search": float("nan")}}, "expected a finite number for search"),
        ({"tool_used": {"search": float("inf")}}, "expected a finite number for search"),
        ({"call_price": {"search": [(5, 0.1), (5, 0.2)]}}, "rising steps"),
        ({"call_price": {"search": "cheap"}}, "valid number"),
        ({"price_when": "sometimes"}, "'right' or 'always'"),
    ],
)
def test_bad_prices_are_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        SearchRewardConfig(**keys)


def test_a_price_of_a_tool_that_the_agent_lacks_is_refused_before_the_start(tokenizer, agent):
    overrides = ["++reward.call_price.serch=0.02", "++reward.call_price.calculator=0.1"]
    with initialize_config_dir(str(ROOT / "configs"), version_base=None):
        raw = OmegaConf.to_container(
            compose("grpo", ["experiment=closed_world/grpo", *overrides]), resolve=True
        )
    config = validate(raw)
    reward = build_reward(config, tokenizer)
    with pytest.raises(ConfigError) as caught:
        check_trainable(config, agent, reward)
    assert caught.value.problems == [
        "reward.call_price.serch: there is no such tool; the agent has search, calculator"
    ]
    with pytest.raises(ConfigError, match="the agent has none"):
        check_trainable(config, AgentLoop(None, None), reward)


def test_a_group_that_is_wrong_throughout_learns_nothing_from_prices(tokenizer, rolled):
    """With `always` it would learn to call less, whatever it was asked."""
    cheap = trajectory_of(tokenizer, ("M", WRONG))
    prices = {"call_price": {"search": 0.02}}
    assert score(tokenizer, cheap, **prices)["score"] == 0
    assert score(tokenizer, rolled["wrong"], **prices)["score"] == 0
