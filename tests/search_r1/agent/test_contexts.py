"""Contexts that are written anew: every row holds what the engine was given, trains what it said
once, and rewards and metrics see one trajectory."""

import asyncio

import pytest

from search_r1.agent.baselines import IRCoTLoop, RagLoop
from search_r1.agent.condense import CondenseConfig
from search_r1.agent.config import SearchAgentConfig
from search_r1.agent.contexts import ContextConfig, summary_of
from search_r1.agent.loop import SearchAgentLoop
from search_r1.prompts import FOLD_ACTION, LEFT_OUT
from search_r1.rewards.compose import SearchReward
from search_r1.rewards.config import SearchRewardConfig
from search_r1.session import answer_of
from tests.search_r1.agent.scripted import ADA, ANSWER, BLOCK, SEARCH, Engine, Library
from verl.agent import Source
from verl.protocol import collate_trajectories
from verl.rollout.records import trajectory_record
from verl.utils.reward import policy_text
from verl.utils.tokenizer import encode_text

ROW = {
    "data_source": "set",
    "extra_info": {"question": "Where was Ada Marin born?"},
    "reward_model": {"ground_truth": "Torvel"},
}
SUMMED_UP = "<summary> Ada lives in Torvel. </summary>"
CALL = '<tool_call>\n{"name": "search", "arguments": {"query": "Ada"}}\n</tool_call><|im_end|>'


def roll(tokenizer, turns, loop_class=SearchAgentLoop, **config):
    usual = {"template": "short", "max_prompt_length": 2000, "max_start_length": 60}
    context = ContextConfig(**config.pop("context", {}))
    loop = loop_class(SearchAgentConfig(**(usual | config), context=context), tokenizer)
    loop.search.client = Library([ADA])
    engine = Engine(tokenizer, turns)
    trajectory = asyncio.run(loop.run([1], ROW, engine))
    check_rows(trajectory, engine)
    return loop, trajectory, engine


def check_rows(trajectory, engine):
    """Every call of the engine begins with its row's prompt and goes on in what the row says."""
    assert trajectory.context_violations == 0
    rows = trajectory.rows
    contexts = []
    for row in rows:
        ids = list(row.prompt_ids)
        for segment in row.segments:
            if segment.source is Source.MODEL:
                contexts.append(list(ids))
            ids += segment.token_ids
    given = [ids for ids, _, _ in engine.calls]
    assert [ids for ids in given if ids in contexts] == contexts
    own = [s.token_ids for row in rows for s in row.segments if s.source is Source.MODEL]
    every = [s.token_ids for s in trajectory.segments if s.source is Source.MODEL]
    assert own == every, "each sampled token stands in one row"
    trajectory.reward = {"score": 1.0}
    batch = collate_trajectories([trajectory], 0).batch
    assert int(batch["response_mask"].sum()) == sum(map(len, every))
    assert float(batch["token_level_scores"].sum()) == 1.0


def test_without_an_option_contexts_only_grow(tokenizer):
    _, trajectory, _ = roll(tokenizer, [SEARCH, SEARCH, ANSWER])
    assert trajectory.rewrites == [] and len(trajectory.rows) == 1
    assert "folds" not in trajectory.info


@pytest.mark.parametrize("train", [True, False])
def test_a_full_context_is_folded_into_a_summary(tokenizer, train):
    turns = [SEARCH, SUMMED_UP, SEARCH, SUMMED_UP, ANSWER]
    loop, trajectory, engine = roll(
        tokenizer, turns, context={"fold_at": 60, "train_summaries": train}
    )
    texts = [tokenizer.decode(ids) for ids, _, _ in engine.calls]
    assert texts[1].endswith(FOLD_ACTION) and "was born in Torvel" in texts[1]
    prompt = tokenizer.decode(trajectory.prompt_ids)
    assert texts[2] == texts[4] == f"{prompt}{SUMMED_UP}\n"
    assert engine.calls[1][2] == ["</summary>"] and engine.calls[1][1] == 256
    kinds = [s.info.get("kind") for s in trajectory.segments]
    assert kinds == [None, "search", "summary_request", "summary"] * 2 + [None]
    summaries = [s.source for s in trajectory.segments if s.info.get("kind") == "summary"]
    assert summaries == [Source.MODEL if train else Source.OBSERVATION] * 2
    assert len(trajectory.rows) == 3 and trajectory.info["folds"] == 2
    assert loop.reduce_metrics([trajectory])["env/folds"] == 2
    assert trajectory.info["searches"] == 2 and trajectory.info["turns"] == 3
    reward = SearchReward(SearchRewardConfig(), tokenizer)(trajectory, ROW)
    assert reward["format"] == 1 and reward["em"] == 1, "a summary is no malformed turn"


def test_a_row_that_nothing_was_said_in_is_no_row(tokenizer):
    _, trajectory, _ = roll(
        tokenizer, ["No action", SUMMED_UP, ANSWER], context={"fold_at": 61}, max_turns=1
    )
    assert trajectory.stop_reason == "answer"
    assert all(row.is_sampled for row in trajectory.rows)


def test_old_results_are_left_out_and_the_last_ones_stay(tokenizer):
    _, trajectory, engine = roll(
        tokenizer, [SEARCH, SEARCH, SEARCH, ANSWER], context={"keep_observations": 1}
    )
    texts = [tokenizer.decode(ids) for ids, _, _ in engine.calls]
    assert [text.count(BLOCK.strip()) for text in texts] == [0, 1, 1, 1]
    assert [text.count(f"<information>{LEFT_OUT}</information>") for text in texts] == [0, 0, 1, 2]
    assert all(text.count("</search>") == n for n, text in enumerate(texts))
    assert len(trajectory.rows) == 3 and trajectory.info["searches"] == 3


def test_thoughts_of_earlier_turns_are_left_out(tokenizer):
    _, trajectory, engine = roll(
        tokenizer, [SEARCH, SEARCH, ANSWER], context={"strip_thoughts": True}
    )
    texts = [tokenizer.decode(ids) for ids, _, _ in engine.calls]
    assert ["<think>" in text for text in texts] == [False] * 3
    assert texts[2].count("<search> Ada </search>") == 2
    assert len(trajectory.rows) == 3
    own = [tokenizer.decode(s.token_ids) for s in trajectory.segments[::2]]
    assert own == [SEARCH, SEARCH, ANSWER], "what was sampled is trained whole"


def test_what_changes_nothing_makes_no_row(tokenizer):
    plain = "<search> Ada </search>"
    _, trajectory, _ = roll(tokenizer, [plain, plain, ANSWER], context={"strip_thoughts": True})
    assert len(trajectory.rows) == 1


@pytest.mark.parametrize("name", ["qwen3-tools", "qwen3-thinking-tools"])
def test_native_contexts_are_folded_and_stripped_in_the_template_s_language(family, name):
    tokenizer = family(name)
    opened = name == "qwen3-thinking-tools"
    thought = "hm\n</think>\n\n" if opened else "<think>\nhm\n</think>\n\n"
    turns = [
        thought + CALL,
        thought + CALL,
        SUMMED_UP + "<|im_end|>",
        f"{thought}<answer> x </answer>",
    ]
    _, trajectory, engine = roll(
        tokenizer,
        turns,
        template="tools",
        format="auto",
        max_start_length=600,
        context={"fold_at": 680, "strip_thoughts": True, "keep_observations": 1},
    )
    texts = [tokenizer.decode(ids) for ids, _, _ in engine.calls]
    assert "hm" not in texts[1] and texts[1].count("<tool_call>\n{") == 1
    asked, folded = texts[-2:]
    assert LEFT_OUT in asked and asked.endswith(
        "<|im_start|>assistant\n" + ("<think>\n" if opened else "")
    )
    assert "What you have found so far: Ada lives in Torvel." in folded
    assert "<tool_response>" not in folded and trajectory.info["folds"] == 1


def test_ircot_is_trained_a_row_for_each_sentence(tokenizer):
    turns = ["Ada was born in Torvel. And more.", "<answer> Torvel </answer>"]
    _, trajectory, engine = roll(tokenizer, turns, IRCoTLoop, max_prompt_length=1200)
    assert len(trajectory.rows) == 2
    for row, (given, _, _) in zip(trajectory.rows, engine.calls, strict=True):
        assert row.prompt_ids == given
    first = trajectory.rows[0].segments[0]
    assert tokenizer.decode(first.token_ids) == "Ada was born in Torvel."
    assert len(first.log_probs) == len(first.token_ids)


def test_a_record_says_where_contexts_were_written_anew(tokenizer):
    class Job:
        uid = "u"
        row = ROW

    _, trajectory, _ = roll(tokenizer, [SEARCH, SUMMED_UP, ANSWER], context={"fold_at": 60})
    record = trajectory_record(Job, trajectory, tokenizer, [None] * len(trajectory.segments))
    (rewrite,) = record["rewrites"]
    assert rewrite["at"] == 4 and rewrite["prompt"].endswith(f"{SUMMED_UP}\n")


def test_budgets_that_leave_no_room_for_folding_are_named(tokenizer):
    def problems(fold_at):
        config = SearchAgentConfig(
            max_start_length=60,
            max_prompt_length=1000,
            max_response_length=100,
            max_obs_length=500,
            context=ContextConfig(fold_at=fold_at, max_summary_length=40),
        )
        return [p for p in SearchAgentLoop(config, tokenizer).preflight() if "fold_at" in p]

    request = len(encode_text(tokenizer, FOLD_ACTION))
    assert problems(400 - request) == []
    assert "leaves a turn no room" in problems(401 - request)[0]
    assert "folded in every turn" in problems(100)[0]


def test_results_that_were_not_read_yet_stay(family):
    tokenizer = family("qwen3-tools")
    two = CALL.replace("<|im_end|>", "") + "\n" + CALL
    _, _, engine = roll(
        tokenizer,
        [two, CALL, "<answer> x </answer>"],
        template="tools",
        format="auto",
        context={"keep_observations": 1},
    )
    texts = [tokenizer.decode(ids) for ids, _, _ in engine.calls]
    assert [text.count("was born in Torvel") for text in texts] == [0, 2, 1]


def test_an_aside_is_no_answer_and_does_not_truncate(tokenizer):
    """The summary is cut at its limit and holds an answer."""
    summary = "<summary> <answer> Rome </answer> " + "Ada " * 60
    _, trajectory, _ = roll(
        tokenizer,
        [SEARCH, summary, "no"],
        context={"fold_at": 60, "max_summary_length": 50},
        max_turns=1,
    )
    assert trajectory.segments[3].is_aside
    assert "Rome" not in policy_text(trajectory, tokenizer)
    assert answer_of(trajectory, tokenizer) is None


@pytest.mark.parametrize("loop_class", [RagLoop, IRCoTLoop])
def test_methods_that_write_their_contexts_refuse_to_have_them_written(tokenizer, loop_class):
    config = SearchAgentConfig(
        context=ContextConfig(keep_observations=1), condense=CondenseConfig(by="policy")
    )
    problems = loop_class(config, tokenizer).preflight()
    assert sum("writes its contexts by itself" in p for p in problems) == 2


def test_a_summary_is_read_with_or_without_its_tags():
    assert summary_of("<summary> a </summary> b") == "a"
    assert summary_of("<summary> cut off") == "cut off"
    assert summary_of("<think> hm </think> bare") == "bare"
    assert summary_of("a <summary> of all. </think> <summary> Ada") == "Ada"
