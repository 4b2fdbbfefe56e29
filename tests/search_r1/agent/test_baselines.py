"""What the transcripts of tests/e2e/test_endpoint.py do not reach: budgets, rows without a
question, training."""

import asyncio

import pytest

from search_r1.agent.baselines import IRCoTLoop, RagLoop, ReActLoop, SearchO1Loop
from search_r1.agent.config import SearchAgentConfig
from search_r1.agent.loop import SearchAgentLoop
from search_r1.search.client import Passage
from tests.search_r1.agent.scripted import ADA, Engine, Library
from verl.agent import Source
from verl.utils.errors import DataError

ROW = {"data_source": "set", "extra_info": {"question": "Where was Ada Marin born"}}
LONG = Passage("8", '"Long"', "A long story about nothing. " * 60, 1.0)
ASK = "<|begin_search_query|>Ada<|end_search_query|>"


def roll(loop_class, tokenizer, turns, passages=(ADA,), row=ROW, **config):
    budgets = {"max_start_length": 300, "max_prompt_length": 1200, "max_obs_length": 200} | config
    loop = loop_class(SearchAgentConfig(**budgets), tokenizer)
    loop.search.client = Library(list(passages))
    engine = Engine(tokenizer, turns)
    return asyncio.run(loop.run([1, 2, 3], row, engine)), engine


def test_contexts_keep_to_their_budgets_whatever_is_found_and_thought(tokenizer):
    thought = "I wonder about many things. " * 40
    o1, engine = roll(
        SearchO1Loop,
        tokenizer,
        [f"{thought}{ASK}", "found", f"{thought}{ASK}", "found", "x"],
        [LONG],
    )
    assert max(len(ids) for ids, _, _ in engine.calls) <= 1200 + 20, (
        "the side call is cut like all others"
    )
    assert o1.stop_reason in ("context", "max_turns") and o1.context_violations == 0
    passages = [Passage(str(i), f'"T{i}"', LONG.text, 1.0) for i in range(9)]
    ircot, engine = roll(IRCoTLoop, tokenizer, ["Short thought. More."] * 5, passages)
    assert max(len(ids) for ids, _, _ in engine.calls) <= 1200 and ircot.stop_reason == "max_turns"
    rag, engine = roll(RagLoop, tokenizer, ["<answer> Torvel </answer>"], [LONG])
    assert (
        rag.segments[0].info["cut"]
        and len(engine.calls[0][0]) < 600
        and rag.stop_reason == "answer"
    )
    crowded, engine = roll(
        IRCoTLoop, tokenizer, ["word " * 400] * 9, max_turns=8, max_response_length=500
    )
    assert crowded.stop_reason == "context" and max(len(ids) for ids, _, _ in engine.calls) <= 1200


@pytest.mark.parametrize("loop_class", [SearchO1Loop, RagLoop, ReActLoop])
def test_own_tokens_alone_are_trained_and_contexts_are_prefixes(loop_class, tokenizer):
    turns = [f"t {ASK}\nAction: Search[Ada]", "a finding", "<answer> Torvel </answer>"]
    trajectory, _ = roll(
        loop_class, tokenizer, turns if loop_class is SearchO1Loop else [turns[0], turns[2]]
    )
    own = [
        i for i, mask in zip(trajectory.response_ids, trajectory.response_mask, strict=True) if mask
    ]
    assert "finding" not in tokenizer.decode(own) and "was born" not in tokenizer.decode(own)
    assert trajectory.context_violations == 0
    assert any(s.source is Source.OBSERVATION for s in trajectory.segments)


def test_a_template_needs_the_question(tokenizer):
    with pytest.raises(DataError, match=r"set row has no extra_info.question"):
        roll(RagLoop, tokenizer, [], row={"data_source": "set", "extra_info": None})
    trajectory, engine = roll(
        SearchAgentLoop, tokenizer, ["<answer> x </answer>"], template="short"
    )
    assert "Question: Where was Ada Marin born?" in tokenizer.decode(engine.calls[0][0])
    assert trajectory.prompt_ids == engine.calls[0][0]
    with pytest.raises(ValueError, match="expected null or one of search, fast"):
        SearchAgentConfig(template="nope")


def test_ircot_searches_for_each_sentence_until_it_answers(tokenizer):
    turns = [
        "Ada was born in Torvel. And more.",
        "So it is. <answer> Torvel </answer>",
        "<answer> Torvel </answer> x",
    ]
    trajectory, _ = roll(IRCoTLoop, tokenizer, turns)
    queries = [s.info["query"] for s in trajectory.segments if s.source is Source.OBSERVATION]
    assert queries == [ROW["extra_info"]["question"], "Ada was born in Torvel.", "So it is."]
    own = [tokenizer.decode(s.token_ids) for s in trajectory.segments if s.source is Source.MODEL]
    assert own == ["Ada was born in Torvel.", "So it is.", "<answer> Torvel </answer>"]
    assert (
        trajectory.stop_reason == "answer"
        and trajectory.info["turns"] == trajectory.info["valid_actions"] == 3
    )


def test_the_last_turn_of_ircot_is_whole(tokenizer):
    trajectory, _ = roll(IRCoTLoop, tokenizer, ["I go on. And on."] * 3, max_turns=2)
    own = [tokenizer.decode(s.token_ids) for s in trajectory.segments if s.source is Source.MODEL]
    assert own == ["I go on.", "I go on.", "I go on. And on."]
    assert trajectory.stop_reason == "max_turns" and trajectory.info["valid_actions"] == 2
