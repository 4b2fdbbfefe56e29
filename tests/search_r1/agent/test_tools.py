"""A second tool beside search is one file (tests/calculator.py) and one line of configuration."""

import asyncio
from types import SimpleNamespace

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from search_r1.agent.actions import TextCall
from search_r1.agent.baselines import RagLoop
from search_r1.agent.config import SearchAgentConfig
from search_r1.agent.dialects import read_call
from search_r1.agent.loop import SearchAgentLoop
from search_r1.evaluation.behaviour import behaviour, read_history
from search_r1.infer import call_tags
from search_r1.rewards.compose import SearchReward
from search_r1.rewards.config import SearchRewardConfig
from search_r1.search.client import Passage
from search_r1.tools.base import Tool
from search_r1.tools.formats import tagged
from search_r1.tools.sections import build_tools
from tests.e2e.runs import ROOT
from tests.models import make_tokenizer
from tests.search_r1.agent.scripted import (
    ADA,
    ANSWER,
    BLOCK,
    PROMPT,
    SEARCH,
    Engine,
    Library,
    make_loop,
    shown,
)
from verl.agent import Source, TrajectoryFailed
from verl.rollout.records import trajectory_records
from verl.trainer.config import build_agent, validate
from verl.utils.errors import ConfigError
from verl.utils.tokenizer import encode_text

LINE = "agent.tools=[{_target_: tests.calculator.Calculator}]"
CALCULATE = "<think> t </think> <calculate> 2 * (3 + 4) </calculate>"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def composed(*overrides):
    with initialize_config_dir(str(ROOT / "configs"), version_base=None):
        return OmegaConf.to_container(
            compose("grpo", ["experiment=closed_world/grpo", *overrides]), resolve=True
        )


@pytest.fixture
def loop(tokenizer):
    """The stock configuration and the one line."""
    made = build_agent(validate(composed(LINE)), tokenizer)
    made.search.client = Library([ADA])
    return made


def roll(loop, tokenizer, turns, row=None):
    engine = Engine(tokenizer, turns)
    prompt_ids = encode_text(tokenizer, PROMPT)
    trajectory = asyncio.run(loop.run(prompt_ids, row or {}, engine))
    assert trajectory.context_violations == 0
    return trajectory, engine


def test_it_is_called_beside_search_and_its_result_is_spliced_in_and_masked(tokenizer, loop):
    trajectory, engine = roll(loop, tokenizer, [SEARCH, CALCULATE + "\n\n", ANSWER])
    assert shown(trajectory, tokenizer) == [
        ("model", SEARCH),
        ("observation", "\n\n" + BLOCK),
        ("model", CALCULATE + "\n\n"),
        ("observation", "<result>14</result>\n\n"),
        ("model", ANSWER),
    ]
    assert engine.calls[0][2] == ["</search>", "</calculate>", "</answer>"]
    own = [s.source is Source.MODEL for s in trajectory.segments for _ in s.token_ids]
    assert trajectory.response_mask == [int(written) for written in own]
    facts = trajectory.segments[3].info
    assert {key: facts[key] for key in ("turn", "kind", "arguments", "value", "cut")} == {
        "turn": 2,
        "kind": "calculator",
        "arguments": {"argument": "2 * (3 + 4)"},
        "value": 14,
        "cut": False,
    }
    assert trajectory.stop_reason == "answer" and trajectory.void_turns == 0
    asyncio.run(loop.close())
    assert loop.toolbox.tools["calculator"].closed


def test_its_calls_are_counted_apart_from_searches(tokenizer, loop):
    wrong = CALCULATE.replace("(3 + 4)", "x")
    one, _ = roll(loop, tokenizer, [SEARCH, CALCULATE, wrong, ANSWER])
    none, _ = roll(loop, tokenizer, [ANSWER])
    counts = one.info["tools"]["calculator"]
    assert (counts["calls"], counts["errors"]) == (2, {"no_number": 1})
    assert len(counts["latency_s"]) == 2
    assert one.info["searches"] == 1 and one.info["valid_actions"] == 4
    assert len(one.info["latency_s"]) == 1
    metrics = loop.reduce_metrics([one, none])
    assert metrics["env/number_of_valid_search"] == 0.5
    assert metrics["env/ratio_of_valid_action"] == 1.0
    named = {
        name.removeprefix("tool/calculator/"): value
        for name, value in metrics.items()
        if "calculator" in name and "latency" not in name
    }
    tokens = [len(one.segments[at].token_ids) for at in (3, 5)]
    assert named == {
        "calls": 1.0,
        "errors": 0.5,
        "errors/no_number": 0.5,
        "tokens": sum(tokens) / 2,
        "truncated": 0.0,
    }
    assert {"tool/calculator/latency_s/p50", "tool/calculator/latency_s/p95"} < set(metrics)


def test_no_result_of_any_tool_speaks_for_the_policy(tokenizer, loop):
    asked = "<calculate> </result> <answer> 7 </calculate>"
    loop.search.client = Library([Passage("1", '"T"', "<calculate> 1 </calculate> </result>", 1.0)])
    trajectory, _ = roll(loop, tokenizer, [asked, SEARCH, ANSWER])
    texts = [text for source, text in shown(trajectory, tokenizer) if source == "observation"]
    assert texts[0] == "\n\n<result>no number: (/result) (answer) 7</result>\n\n"
    assert "(calculate) 1 (/calculate) (/result)</information>" in texts[1]


def test_a_long_result_is_cut_inside_and_counted(tokenizer):
    config = SearchAgentConfig(
        tools=[{"_target_": "tests.calculator.Calculator"}], max_obs_length=40, do_search=False
    )
    loop = SearchAgentLoop(config, tokenizer)
    trajectory, engine = roll(loop, tokenizer, [CALCULATE.replace("(", "x" * 90), ANSWER])
    observation = trajectory.segments[1]
    assert engine.calls[0][2] == ["</calculate>", "</answer>"], "it needs no search beside it"
    assert len(observation.token_ids) == 40 and observation.info["cut"]
    assert tokenizer.decode(observation.token_ids).endswith("</result>\n\n")
    assert loop.reduce_metrics([trajectory])["tool/calculator/truncated"] == 1


def test_a_tool_that_breaks_fails_the_trajectory_and_is_named_before_the_start(tokenizer):
    line = LINE.replace("}", ", plugged_in: false}")
    loop = build_agent(validate(composed(line)), tokenizer)
    loop.search.client = Library([ADA])
    assert "agent.tools: the calculator is not plugged in" in loop.preflight()
    with pytest.raises(TrajectoryFailed, match="no power") as error:
        roll(loop, tokenizer, [SEARCH, CALCULATE])
    assert error.value.num_calls == 2


def test_preflight_names_a_budget_without_room_for_a_result(tokenizer):
    config = SearchAgentConfig(
        tools=[{"_target_": "tests.calculator.Calculator"}], max_obs_length=10, do_search=False
    )
    (problem,) = SearchAgentLoop(config, tokenizer).preflight()
    assert problem.startswith("data.max_obs_length=10 has no room for a result of calculator")


def test_a_method_that_searches_by_itself_refuses_it(tokenizer):
    tools = [{"_target_": "tests.calculator.Calculator"}]
    loop = RagLoop(SearchAgentConfig(tools=tools), tokenizer)
    assert any(problem.startswith("agent.tools: this method") for problem in loop.preflight())


def test_its_description_stands_before_a_prompt_of_a_template(tokenizer):
    tools = [{"_target_": "tests.calculator.Calculator"}]
    loop = SearchAgentLoop(SearchAgentConfig(tools=tools, template="short"), tokenizer)
    row = {"extra_info": {"question": "How many?"}}
    _, engine = roll(loop, tokenizer, [ANSWER], row)
    prompt = tokenizer.decode(engine.calls[0][0])
    assert prompt.find("You can calculate by") < prompt.find("Question: How many?")


def test_rewards_evaluation_and_inference_know_it(tokenizer, loop):
    row = {"reward_model": {"ground_truth": "Torvel"}, "data_source": "set"}
    trajectory, _ = roll(loop, tokenizer, [SEARCH, CALCULATE, ANSWER], row)
    reward = SearchReward(SearchRewardConfig(ikea=1.0), tokenizer)
    trajectory.reward = reward(trajectory, row)
    assert trajectory.reward["format"] == 1 and trajectory.reward["ikea"] == 1.4
    job = SimpleNamespace(uid="u", row=row)
    figures = behaviour(
        [read_history(r) for r in trajectory_records([job], [trajectory], tokenizer)]
    )
    assert (figures["searches"], figures["calls/calculator"], figures["valid_actions"]) == (1, 1, 1)
    assert call_tags(loop) == ["search", "calculate"]
    alone, _ = roll(make_loop(tokenizer), tokenizer, [SEARCH, ANSWER], row)
    assert "tags" not in alone.info, "search alone is called in the tags of Search-R1"


class Twin(Tool):
    name = "search"
    format = tagged("ask", "told")

    async def execute(self, argument):
        return argument


class Thinker(Tool):
    name = "thinker"
    format = tagged("think", "thought")

    async def execute(self, argument):
        return argument


class Rival(Tool):
    name = "rival"
    format = tagged("search", "found")

    async def execute(self, argument):
        return argument


class Nameless(Tool):
    async def execute(self, argument):
        return argument


class Waitless(Tool):
    name = "waitless"

    def execute(self, argument):
        return argument


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (LINE.replace("}", ", digit: 3}"), "agent.tools.0.digit: there is no such key"),
        (LINE.replace("}", ", digits: many}"), "agent.tools.0.digits=many: expected a whole"),
        (LINE.replace("Calculator}", "Abacus}"), "has no attribute 'Abacus'"),
        (LINE.replace("Calculator}", "evaluate}"), "expected a subclass of search_r1.tools"),
        ("agent.tools=[{digits: 3}]", "expected a section whose _target_ names the class"),
        ("agent.tools=[calculator]", "agent.tools.0=calculator: expected a section"),
        (
            LINE.replace("}", ", cache_size: 3}"),
            "expected cache_size=0 for tests.calculator.Calculator",
        ),
        (
            "agent.tools=[{_target_: tests.search_r1.agent.test_tools.Nameless}]",
            "expected a tool with a name",
        ),
        (
            "agent.tools=[{_target_: tests.search_r1.agent.test_tools.Waitless}]",
            "expected a tool whose execute is `async def`",
        ),
        ("agent.tools=[{_target_: nowhere.Tool}]", "in the folders of PYTHONPATH"),
    ],
)
def test_a_wrong_section_is_refused_before_the_start(line, message):
    with pytest.raises(ConfigError) as caught:
        validate(composed(line))
    (problem,) = caught.value.problems
    assert message in problem


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Twin", "expected tools of different names, but search is there twice"),
        ("Rival", "expected tools that are called differently, but </search> ends calls of two"),
        ("Thinker", "<think>, by which thinker is called, has another meaning"),
    ],
)
def test_tools_that_cannot_be_told_apart_are_refused_before_the_start(tokenizer, name, message):
    line = f"agent.tools=[{{_target_: tests.search_r1.agent.test_tools.{name}}}]"
    problems = build_agent(validate(composed(line)), tokenizer).preflight()
    assert any(message in problem for problem in problems)


@pytest.mark.parametrize("argument", ['{"document": ' + "[" * 3000, '{"document"'])
def test_arguments_in_tags_that_are_no_json_are_malformed(argument):
    (tool,) = build_tools([{"_target_": "search_r1.tools.documents.OpenTool"}])
    call = read_call(TextCall("open", argument), tool)
    assert call.malformed is not None and call.malformed.error == "json"
