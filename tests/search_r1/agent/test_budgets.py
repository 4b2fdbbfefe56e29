"""How many turns may call: what the policy is told of it, and how it changes over the training."""

import asyncio

import pytest

from search_r1.agent.baselines import RagLoop, ReActLoop
from search_r1.agent.config import SearchAgentConfig
from search_r1.agent.loop import SearchAgentLoop
from search_r1.prompts import INVALID_ACTION, INVALID_MESSAGE, NATIVE_INVALID_MESSAGE
from search_r1.search.client import Passage
from tests.search_r1.agent.scripted import (
    ADA,
    ANSWER,
    BLOCK,
    SEARCH,
    Engine,
    Library,
    make_loop,
    shown,
)
from verl.agent import Source
from verl.rollout.agent_worker import AgentLoopWorker, Job

QUESTION = "Where was Ada Marin born?"
ROW = {
    "prompt": [{"role": "user", "content": "Where?"}],
    "extra_info": {"question": QUESTION},
    "data_source": "set",
    "reward_model": {"ground_truth": "Torvel"},
}
CALCULATOR = {"_target_": "tests.calculator.Calculator"}
CALL = '<tool_call>\n{"name": "search", "arguments": {"query": "Ada"}}\n</tool_call>'
SUM = '<tool_call>\n{"name": "calculator", "arguments": {"argument": "2 * 3"}}\n</tool_call>'
TOLD = "You have 4 searches in all, and what follows each of them says how many are left."


def roll(loop, turns, row=ROW):
    """A trajectory, of which only what the policy said is trained."""
    engine = Engine(loop.tokenizer, turns)
    trajectory = asyncio.run(loop.run([], row, engine))
    assert trajectory.context_violations == 0
    own = [int(s.source is Source.MODEL) for s in trajectory.segments for _ in s.token_ids]
    assert trajectory.response_mask == own
    return trajectory


def observed(trajectory, tokenizer):
    return [text for source, text in shown(trajectory, tokenizer) if source == "observation"]


def native(family, **config):
    keys = {"format": "auto", "template": "tools", "tools": [CALCULATOR], "show_remaining": True}
    loop = SearchAgentLoop(SearchAgentConfig(**(keys | config)), family("qwen3-tools"))
    loop.search.client = Library([ADA])
    return loop


# What is left, in tags


def test_the_prompt_and_every_observation_say_how_many_searches_are_left(tokenizer):
    loop = make_loop(tokenizer, show_remaining=True)
    trajectory = roll(loop, [SEARCH, "hm", SEARCH + "\n\n", SEARCH, ANSWER])
    assert observed(trajectory, tokenizer) == [
        f"\n\n{BLOCK}(3 searches left)\n\n",
        f"{INVALID_ACTION}(2 searches left)\n",
        f"{BLOCK}(1 search left)\n\n",
        f"\n\n{BLOCK}(0 searches left)\n\n",
    ]
    assert f"{TOLD} Where?" in tokenizer.decode(trajectory.prompt_ids)


def test_without_the_key_nothing_is_said(tokenizer):
    trajectory = roll(make_loop(tokenizer, template="short"), [SEARCH, "hm", ANSWER])
    assert observed(trajectory, tokenizer) == ["\n\n" + BLOCK, INVALID_ACTION]
    assert " in all" not in tokenizer.decode(trajectory.prompt_ids)
    assert "max_turns" not in trajectory.info


def test_a_prompt_of_a_template_begins_with_it_behind_the_tools(tokenizer):
    loop = make_loop(tokenizer, show_remaining=True, template="short", tools=[CALCULATOR])
    trajectory = roll(loop, [SEARCH, ANSWER])
    prompt = tokenizer.decode(trajectory.prompt_ids)
    assert "</calculate>. You have 4 tool calls in all, and" in prompt
    assert f"are left. Question: {QUESTION}" in prompt
    assert observed(trajectory, tokenizer) == [f"\n\n{BLOCK}(3 tool calls left)\n\n"]


def test_a_policy_that_ended_its_turn_reads_it_in_the_user_s_message(family):
    loop = make_loop(family("qwen2.5-instruct"), show_remaining=True)
    trajectory = roll(loop, ["hm<|im_end|>", SEARCH + "<|im_end|>", ANSWER])
    wrong, found = observed(trajectory, loop.tokenizer)
    assert f"user\n{INVALID_MESSAGE}\n(3 searches left)<|im_end|>\n" in wrong
    assert "</information>\n\n(2 searches left)\n\n<|im_end|>\n" in found


def test_a_method_with_a_format_of_its_own_says_it_too(tokenizer):
    loop = ReActLoop(SearchAgentConfig(show_remaining=True), tokenizer)
    loop.search.client = Library([ADA])
    trajectory = roll(loop, ["Action: Search[Ada]\nObservation:", ANSWER])
    (found,) = observed(trajectory, tokenizer)
    assert found.endswith("born in Torvel.\n(3 searches left)\n")


def test_it_stands_outside_of_the_block_and_is_never_cut(tokenizer):
    long = Passage("1", '"T"', "(9 searches left) " + "x y " * 200, 1.0)
    loop = make_loop(tokenizer, [long], show_remaining=True, max_obs_length=60)
    trajectory = roll(loop, [SEARCH, ANSWER])
    (found,) = observed(trajectory, tokenizer)
    assert len(trajectory.segments[1].token_ids) == 60 and trajectory.segments[1].info["cut"]
    assert found.endswith("</information>\n\n(3 searches left)\n\n")


def test_an_observation_without_room_for_it_is_refused_before_the_start(tokenizer, family):
    def problems(loop):
        return [problem for problem in loop.preflight() if "has no room for a" in problem]

    for limit in range(8, 80):
        quiet = problems(make_loop(tokenizer, max_obs_length=limit))
        if not quiet:
            break
    (problem,) = problems(make_loop(tokenizer, max_obs_length=limit, show_remaining=True))
    assert "(4 searches left)" in problem
    for limit in range(8, 80):
        if not problems(native(family, max_obs_length=limit, show_remaining=False)):
            break
    assert problems(native(family, max_obs_length=limit))


def test_a_folded_context_says_what_is_left(tokenizer, family):
    folding = {"context": {"fold_at": 60}, "show_remaining": True}
    turns = [SEARCH, "<summary> Ada lives. </summary>", ANSWER]
    trajectory = roll(make_loop(tokenizer, **folding), turns)
    prompt = tokenizer.decode(trajectory.rewrites[0].prompt_ids)
    assert f"{TOLD} Where?" in prompt
    assert prompt.endswith("<summary> Ada lives.\n(3 searches left) </summary>\n")
    loop = native(family, **folding)
    turns = [CALL + "<|im_end|>", "<summary> Ada lives. </summary>", "<answer> x </answer>"]
    context = loop.tokenizer.decode(roll(loop, turns).rewrites[0].prompt_ids)
    assert "Ada lives.\n(3 turns with tool calls left)" in context


# What is left, in native formats


def test_native_results_end_with_it_and_the_template_writes_them_so(family):
    loop = native(family)
    calls = f"{CALL}\n{SUM}<|im_end|>"
    trajectory = roll(loop, [calls, "hm<|im_end|>", CALL + "<|im_end|>", "<answer> x </answer>"])
    first, second, wrong, third = observed(trajectory, loop.tokenizer)
    assert "left" not in first, "the two calls of a turn use up one turn"
    assert "6\n(3 turns with tool calls left)\n</tool_response>" in second
    assert f"user\n{NATIVE_INVALID_MESSAGE}\n(2 turns with tool calls left)<|im_end|>" in wrong
    assert "born in Torvel.\n(1 turn with tool calls left)\n</tool_response>" in third
    prompt = loop.tokenizer.decode(trajectory.prompt_ids)
    assert "You have 4 turns with tool calls in all, and what follows" in prompt
    assert trajectory.info["template_departure"] == ""


def test_native_prompts_of_the_data_say_it(family):
    trajectory = roll(native(family, template=None), ["<answer> x </answer>"])
    prompt = family("qwen3-tools").decode(trajectory.prompt_ids)
    assert "how many are left. Where?<|im_end|>" in prompt and '"calculator"' in prompt


@pytest.mark.parametrize("name", ["qwen3-tools", "mistral-tools"])
def test_a_long_native_result_is_cut_before_it(family, name):
    keys = {"format": "auto", "template": "tools", "show_remaining": True, "max_obs_length": 120}
    loop = SearchAgentLoop(SearchAgentConfig(**keys), family(name))
    loop.search.client = Library([Passage("1", '"T"', "x y " * 400, 1.0)])
    call = '[TOOL_CALLS] [{"name": "search", "arguments": {"query": "Ada"}, "id": "call00000"}]</s>'
    turns = [call if name == "mistral-tools" else CALL + "<|im_end|>", "<answer> x </answer>"]
    trajectory = roll(loop, turns)
    found = trajectory.segments[1]
    assert found.info["cut"] and len(found.token_ids) in (119, 120)
    text = loop.tokenizer.decode(found.token_ids)
    assert "(3 turns with tool calls left)" in text and text.count(" left)") == 1


# Where there is nothing to count


@pytest.mark.parametrize("keys", [{"show_remaining": True}, {"max_turns_schedule": [(1, 2)]}])
def test_a_method_that_calls_nothing_refuses_the_keys(tokenizer, keys):
    (key,) = keys
    loops = [
        SearchAgentLoop(SearchAgentConfig(do_search=False, **keys), tokenizer),
        RagLoop(SearchAgentConfig(**keys), tokenizer),
    ]
    for loop in loops:
        assert any(problem.startswith(f"agent.{key}: the policy") for problem in loop.preflight())
    assert not [p for p in make_loop(tokenizer, **keys).preflight() if key in p]


# Schedules


@pytest.mark.parametrize(
    ("step", "turns"), [(None, 4), (1, 1), (9, 1), (14, 1), (15, 2), (20, 2), (29, 2), (30, 4)]
)
def test_turns_follow_their_schedule_and_validation_has_the_most(tokenizer, step, turns):
    schedule = [(10, 1), (20, 2), (29, 2), (30, 4)]
    loop = make_loop(tokenizer, max_turns_schedule=schedule, show_remaining=True)
    row = ROW if step is None else ROW | {"training_step": step}
    trajectory = roll(loop, [SEARCH] * 5, row)
    assert len(loop.search.client.queries) == turns and trajectory.stop_reason == "max_turns"
    unit = "search" if turns == 1 else "searches"
    assert f"You have {turns} {unit} in all" in tokenizer.decode(trajectory.prompt_ids)
    assert observed(trajectory, tokenizer)[-1].endswith("(0 searches left)\n\n")


def test_the_metric_is_the_mean_of_the_limits_in_force(tokenizer):
    loop = make_loop(tokenizer, max_turns_schedule=[(1, 1), (2, 4)])
    rolled = [roll(loop, [SEARCH, ANSWER], ROW | {"training_step": step}) for step in (1, 2)]
    assert loop.reduce_metrics(rolled)["env/max_turns"] == 2.5
    plain = make_loop(tokenizer)
    assert "env/max_turns" not in plain.reduce_metrics([roll(plain, [ANSWER])])


def test_a_trajectory_keeps_the_limit_that_it_began_with(tokenizer):
    """Although newer weights write its later turns, as with asynchronous rollouts."""
    loop = make_loop(tokenizer, max_turns_schedule=[(1, 1), (2, 4)])
    trajectory = roll(loop, [SEARCH, SEARCH, ANSWER], ROW | {"training_step": 1})
    assert [s.policy_version for s in trajectory.segments] == [1, -1, 2]
    assert trajectory.info["max_turns"] == 1 and trajectory.stop_reason == "max_turns"


def test_a_worker_hands_the_step_on_and_a_second_attempt_has_the_same(tokenizer):
    worker = object.__new__(AgentLoopWorker)
    worker.agent = make_loop(tokenizer, max_turns_schedule=[(1, 1), (2, 4)], fail_at=1)
    worker.engines = Engines(tokenizer, [SEARCH, SEARCH, SEARCH])
    worker.reward = lambda trajectory, row: {"score": 0.0}
    worker.limit(1)
    job = Job("u", "s", ROW | {"training_step": 1}, [1])
    (trajectory,) = asyncio.run(worker.run([job], {"log_probs": False}))
    assert trajectory.info["max_turns"] == 1 and worker.engines.sessions == {"s-0", "s-1"}


class Engines:
    """Engines that say these turns, whoever asks."""

    def __init__(self, tokenizer, turns):
        self.engine = Engine(tokenizer, turns)
        self.sessions = set()

    async def generate(self, session, prompt_ids, sampling):
        self.sessions.add(session)
        return await self.engine(prompt_ids, max_tokens=sampling["max_tokens"])

    def forget(self, session):
        pass


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ([], r"a schedule is \[\[step, turns\], ...\] with rising steps"),
        ([(5, 1), (5, 2)], "rising steps"),
        ([(1, 0)], "greater than 0"),
        ([(1, 1.5)], "valid integer"),
        ([(1, 2), (9, 6)], "goes up to 6 turns, more than max_turns=4: raise max_turns"),
    ],
)
def test_bad_schedules_are_refused(schedule, message):
    with pytest.raises(ValueError, match=message):
        SearchAgentConfig(max_turns_schedule=schedule)
