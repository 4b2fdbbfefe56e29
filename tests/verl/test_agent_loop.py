"""A loop of one's own is a class with `run`, beside the stock configuration as it is."""

import asyncio

import pytest

from tests.configs import composed
from tests.e2e.toy import CountE, SingleTurn
from verl.agent import AgentLoop, Completion, Trajectory, context_digest
from verl.trainer.config import build_agent, build_reward, validate
from verl.utils.errors import ConfigError

OWN = ("experiment=closed_world/grpo", "agent._target_=tests.e2e.toy.SingleTurn")


async def generate(prompt_ids, *, max_tokens, stop=(), images=()):
    return Completion([7] * max_tokens, [0.0] * max_tokens, "stop", None, 1, context_digest([1]))


def test_it_takes_the_stock_configuration():
    config = validate(composed("grpo", *OWN, "max_turns=3"))
    loop = build_agent(config, tokenizer=None)
    assert isinstance(loop, SingleTurn) and loop.config.max_turns == 3
    assert loop.preflight() == []
    trajectory = asyncio.run(loop.run([1], {}, generate))
    assert trajectory.response_ids == [7] * 16 and trajectory.context_violations == 0
    assert loop.reduce_metrics([trajectory]) == {"toy/count": 1.0}
    asyncio.run(loop.close())


def test_a_reward_of_ones_own_takes_the_stock_section_as_well():
    config = validate(composed("grpo", *OWN, "reward._target_=tests.e2e.toy.CountE"))
    assert isinstance(build_reward(config, tokenizer=None), CountE)


def test_the_librarys_own_keys_are_checked_all_the_same():
    raw = composed("grpo", *OWN)
    raw["trainer"]["seeed"] = 1
    with pytest.raises(ConfigError, match=r"trainer\.seeed: there is no such key"):
        validate(raw)


def test_a_loop_has_no_metrics_of_its_own_unless_it_says_so():
    assert AgentLoop.reduce_metrics([Trajectory([1])]) == {}
    with pytest.raises(NotImplementedError):
        asyncio.run(AgentLoop(None, None).run([1], {}, generate))
