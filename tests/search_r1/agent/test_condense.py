"""Results that are shortened before the policy reads them: by itself, trained or not, or by another
model."""

import asyncio
import re

import pytest
from pydantic import ValidationError

from search_r1.agent.condense import CondenseConfig, CondenserEndpointConfig
from search_r1.agent.config import SearchAgentConfig
from search_r1.agent.loop import SearchAgentLoop
from search_r1.rewards.compose import SearchReward
from search_r1.rewards.config import SearchRewardConfig
from tests.openai_server import Player
from tests.retrieval import serving
from tests.search_r1.agent.scripted import ADA, ANSWER, BLOCK, SEARCH, Engine, Library, shown
from verl.agent import Source, TrajectoryFailed
from verl.protocol import collate_trajectories

ROW = {
    "data_source": "set",
    "extra_info": {"question": "Where was Ada Marin born?"},
    "reward_model": {"ground_truth": "Torvel"},
}
FINDING = "born in Torvel"


def roll(tokenizer, turns, **condense):
    config = SearchAgentConfig(template="short", condense=CondenseConfig(**condense))
    loop = SearchAgentLoop(config, tokenizer)
    loop.search.client = Library([ADA])
    engine = Engine(tokenizer, turns)

    async def once():
        try:
            return await loop.run([1], ROW, engine)
        finally:
            await loop.close()

    return asyncio.run(once()), engine, loop


@pytest.mark.parametrize("train", [True, False])
def test_the_policy_shortens_a_result_beside_the_conversation(tokenizer, train):
    turns = [SEARCH, FINDING, ANSWER]
    trajectory, engine, loop = roll(tokenizer, turns, by="policy", train=train, max_tokens=9)
    texts = [tokenizer.decode(ids) for ids, _, _ in engine.calls]
    assert "Ada Marin was born in Torvel" in texts[1] and "Search query: Ada" in texts[1]
    assert SEARCH in texts[1], "the reasoning so far"
    assert texts[2].endswith(f"<information>{FINDING}</information>\n\n")
    assert engine.calls[1][1] == 9
    assert trajectory.context_violations == 0 and trajectory.info["searches"] == 1
    spoken = [text for source, text in shown(trajectory, tokenizer) if source == "model"]
    assert spoken == [SEARCH, *([FINDING] if train else []), ANSWER]
    conversation = engine.calls[0][0] + trajectory.segments[0].token_ids
    expected = [engine.calls[1][0], conversation] if train else []
    assert [row.prompt_ids for row in trajectory.rows[1:]] == expected
    trajectory.reward = SearchReward(SearchRewardConfig(), tokenizer)(trajectory, ROW)
    assert trajectory.reward["format"] == 1 and trajectory.reward["em"] == 1
    batch = collate_trajectories([trajectory], 0).batch
    assert int(batch["response_mask"].sum()) == trajectory.num_tokens(Source.MODEL)
    assert loop.reduce_metrics([trajectory])["env/number_of_actions/mean"] == 2


def test_short_results_and_those_of_other_tools_stay(tokenizer):
    _, engine, _ = roll(tokenizer, [SEARCH, ANSWER], by="policy", min_tokens=50)
    assert len(engine.calls) == 2 and tokenizer.decode(engine.calls[1][0]).endswith(BLOCK)
    _, engine, _ = roll(tokenizer, [SEARCH, ANSWER], by="policy", tools=["open"])
    assert len(engine.calls) == 2


def endpoint(url):
    return CondenserEndpointConfig(url=f"{url}/v1", model="m", max_retries=1, backoff_s=0.01)


@pytest.mark.parametrize("train", [True, False])
def test_the_request_is_what_the_key_says(tokenizer, train):
    asked = "{context} | {query} | {reasoning} | {{}}"
    _, engine, _ = roll(
        tokenizer, [SEARCH, FINDING, ANSWER], by="policy", train=train, prompt=asked
    )
    text = tokenizer.decode(engine.calls[1][0])
    assert (
        f'Doc 1(Title: "Ada Marin") Ada Marin was born in Torvel. | Ada | {SEARCH} | {{}}' in text
    )
    short = "{context} {query}"
    _, engine, _ = roll(tokenizer, [SEARCH, FINDING, ANSWER], by="policy", prompt=short)
    assert "born in Torvel. Ada" in tokenizer.decode(engine.calls[1][0])


@pytest.mark.parametrize(
    ("prompt", "problem"),
    [
        ("{query}", "found {query}"),
        ("Shorten this.", "found none"),
        ("{query} {context} {answer}", "found {answer}, {context}, {query}"),
        ("{query} {context} {", "a brace of the text is written twice"),
    ],
)
def test_a_request_without_its_fields_is_refused(prompt, problem):
    with pytest.raises(ValidationError, match=re.escape(problem)):
        CondenseConfig(by="policy", prompt=prompt)


def test_another_model_shortens_a_result(tokenizer):
    player = Player({}, finding=FINDING)
    with serving(player.app) as url:
        trajectory, engine, loop = roll(
            tokenizer, [SEARCH, ANSWER], by="endpoint", endpoint=endpoint(url)
        )
        assert not [p for p in loop.preflight() if "condense" in p]
    assert tokenizer.decode(engine.calls[1][0]).endswith(
        f"<information>{FINDING}</information>\n\n"
    )
    assert len(trajectory.rows) == 1 and player.side[0]["max_tokens"] == 128


def test_an_endpoint_that_fails_fails_the_trajectory_and_is_named_before(tokenizer):
    player = Player({}, finding="")
    with serving(player.app) as url, pytest.raises(TrajectoryFailed, match="empty reply"):
        roll(tokenizer, [SEARCH, ANSWER], by="endpoint", endpoint=endpoint(url))
    config = SearchAgentConfig(condense=CondenseConfig(by="endpoint", endpoint=endpoint(url)))
    problems = SearchAgentLoop(config, tokenizer).preflight()
    assert any(p.startswith("agent.condense.endpoint.url: ") for p in problems)
    with pytest.raises(ValidationError, match=r"endpoint\.url and endpoint\.model"):
        CondenseConfig(by="endpoint")
