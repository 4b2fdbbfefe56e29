"""Every key of `reward` changes something: scores, or what a judge is asked.

The rewards are built from configurations as training builds them. Only the network is replaced.
"""

import asyncio
from asyncio import sleep
from collections.abc import Callable
from functools import partial
from typing import Any

import httpx
import pytest

from search_r1.rewards.config import SearchRewardConfig
from tests.keys import Bench, Case, Probe, Setting, defaults_of
from tests.search_r1.rewards.trajectories import trajectory_of
from verl.agent import Source, Trajectory, TrajectoryFailed
from verl.trainer.config import build_reward

ROW = {
    "reward_model": {"ground_truth": {"target": ["Rome"]}},
    "extra_info": {"question": "Which city?", "gold_titles": ["A title"]},
}


BENCH = Bench(defaults_of(SearchRewardConfig, "reward"), ("grpo",))

# Scores


def searching(query: str) -> str:
    return f"<think> t </think> <search> {query} </search>"


def answering(text: str) -> str:
    return f"<think> t </think> <answer> {text} </answer>"


def searching_in_thought(query: str) -> str:
    return f"<think> t <search> {query} </search> </think>"


def rolled(
    tokenizer: Any,
    queries: list[str],
    last: str,
    passage: str = "nothing",
    asking: Callable[[str], str] = searching,
) -> Trajectory:
    """One that asks these queries, each of which finds the passage, and ends with `last`."""
    segments: list[tuple[str, str]] = []
    for query in queries:
        segments += [("M", asking(query)), ("O", f"<information>{passage}</information>")]
    trajectory = trajectory_of(tokenizer, *segments, ("M", last))
    found = [segment for segment in trajectory.segments if segment.source is Source.OBSERVATION]
    for segment, query in zip(found, queries, strict=True):
        passages = [{"title": "A title", "text": passage}]
        segment.info = {"kind": "search", "query": query, "passages": passages}
    return trajectory


def misled(trajectory: Trajectory) -> Trajectory:
    """The trajectory, whose first call was wrong."""
    trajectory.segments[1].info["error"] = "arguments"
    return trajectory


def trajectories(tokenizer: Any) -> dict[str, Trajectory]:
    """Good and bad ones by what they are."""
    roll = partial(rolled, tokenizer)
    thinking = partial(roll, asking=searching_in_thought)
    return {
        "right at once": roll([], answering("Rome")),
        "right after a search": roll(["a city"], answering("Rome")),
        "right after repeating itself": roll(["a city", "a city"], answering("Rome")),
        "right but malformed": roll(["a city"], "<answer> Rome </answer>"),
        "half right": roll([], answering("Rome city")),
        "wrong": roll(["a city"], answering("Oslo")),
        "wrong despite the passage": roll(["a city"], answering("Oslo"), "Rome is a city."),
        "wrong and malformed": roll(["a city"], "<answer> Oslo </answer>"),
        "wrong, searching in its thought": thinking(["a city"], answering("Oslo")),
        "wrong after an error": misled(roll(["a city"], answering("Oslo"))),
        "silent": roll([], "I do not know"),
    }


def scores(setting: Setting) -> Any:
    """The score of each trajectory, by what it is."""
    Network(setting.patch)
    reward = build_reward(setting.config, setting.tokenizer)
    group = trajectories(setting.tokenizer)
    asyncio.run(score_all(reward, group))
    reward.score_groups([list(group.values())])
    return {what: trajectory.reward["score"] for what, trajectory in group.items()}


def score_of(what: str) -> Probe:
    """The probe that says how the trajectory that is `what` scores among all of them."""

    def probe(setting: Setting) -> Any:
        return scores(setting)[what]

    return probe


async def score_all(reward: Any, group: dict[str, Trajectory]) -> None:
    for trajectory in group.values():
        parts = reward(trajectory, ROW)
        trajectory.reward = await parts if asyncio.iscoroutine(parts) else parts


# The judge


class Network:
    """Stands in for the network and the clock: notes requests and waits; the judge says yes."""

    def __init__(self, patch: pytest.MonkeyPatch, status: int = 200) -> None:
        self.status = status
        self.requests: list[httpx.Request] = []
        self.waits: list[float] = []
        self.under_way = self.most_under_way = 0
        patch.setattr("httpx.AsyncHTTPTransport.handle_async_request", self.answer)
        patch.setattr("asyncio.sleep", self.wait)
        patch.setattr("random.uniform", lambda low, high: high)

    async def answer(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        await sleep(0)
        self.under_way -= 1
        message = {"role": "assistant", "content": "Yes."}
        return httpx.Response(self.status, json={"choices": [{"message": message}]})

    async def wait(self, seconds: float) -> None:
        self.waits.append(seconds)


def judge(setting: Setting, status: int = 200, count: int = 1) -> Network:
    """The network after so many answers were judged side by side."""
    network = Network(setting.patch, status)
    setting.patch.delenv("OPENAI_API_KEY", raising=False)
    setting.patch.setenv("OTHER_KEY", "secret")
    reward = build_reward(setting.config, setting.tokenizer)
    answers = [rolled(setting.tokenizer, [], answering("Roma")) for _ in range(count)]

    async def ask() -> None:
        judged = [reward(answer, ROW) for answer in answers]
        await asyncio.gather(*judged)

    try:
        asyncio.run(ask())
    except TrajectoryFailed:
        assert status != 200
    return network


def judge_url(setting: Setting) -> Any:
    (request,) = judge(setting).requests
    return request.url


def judge_body(setting: Setting) -> Any:
    (request,) = judge(setting).requests
    return request.content


def judge_key(setting: Setting) -> Any:
    (request,) = judge(setting).requests
    return request.headers.get("Authorization")


def judge_timeout(setting: Setting) -> Any:
    (request,) = judge(setting).requests
    return request.extensions["timeout"]


def attempts_at_a_broken_judge(setting: Setting) -> Any:
    return len(judge(setting, status=500).requests)


def waits_for_a_broken_judge(setting: Setting) -> Any:
    return judge(setting, status=500).waits


def requests_at_a_time(setting: Setting) -> Any:
    return judge(setting, count=40).most_under_way


# The table

JUDGED = {"reward.judge": 1.0}
FORMAT = {"reward.format": 1.0}
EM_FORMAT = {"reward.em_format": 1.0}
OVERLONG = {"reward.overlong": 1.0}

TABLE = [
    Case("reward.em", 0.5, score_of("right at once")),
    Case("reward.em", [[0, 0.0], [8, 1.0]], score_of("right at once")),
    Case("reward.sub_em", 1.0, score_of("half right")),
    Case("reward.f1", 1.0, score_of("half right")),
    Case("reward.f1_above", 1.0, score_of("half right")),
    Case("reward.soft_em", 1.0, score_of("half right")),
    Case("reward.balanced_f1", 1.0, score_of("silent")),
    Case("reward.format", 1.0, score_of("wrong")),
    Case("reward.em_format", 1.0, score_of("wrong")),
    Case("reward.retrieval", 1.0, score_of("wrong despite the passage")),
    Case("reward.no_search", -1.0, score_of("right at once")),
    Case("reward.no_answer", -1.0, score_of("silent")),
    Case("reward.repeated_query", -1.0, score_of("right after repeating itself")),
    Case("reward.new_evidence", 1.0, score_of("wrong")),
    Case("reward.path", 1.0, score_of("wrong")),
    Case("reward.redundancy", -1.0, score_of("right after repeating itself")),
    Case("reward.repeated_search", -1.0, score_of("right after repeating itself")),
    Case("reward.random_turn", 1.0, scores),
    Case("reward.overlong", 1.0, score_of("wrong"), {"reward.overlong_limit": 20}),
    Case("reward.ikea", 1.0, score_of("right after a search")),
    Case("reward.otc_ppo", 1.0, score_of("right after a search")),
    Case("reward.otc_grpo", 1.0, score_of("right after a search")),
    Case("reward.judge", 1.0, score_of("wrong")),
    Case("reward.random", 1.0, scores),
    Case("reward.call_price", {"search": 0.1}, score_of("right after a search")),
    Case("reward.token_price", {"search": 0.1}, score_of("right after a search")),
    Case("reward.price_when", "always", score_of("wrong"), {"reward.call_price": {"search": 0.1}}),
    Case("reward.tool_used", {"search": 0.1}, score_of("wrong")),
    Case("reward.tool_errors", {"search": -0.1}, score_of("wrong after an error")),
    Case("reward.f1_threshold", 0.9, score_of("half right"), {"reward.f1_above": 1.0}),
    Case("reward.structure_format_score", 0.3, score_of("right but malformed"), EM_FORMAT),
    Case("reward.structure_format_score", 0.3, score_of("wrong"), EM_FORMAT),
    Case("reward.final_format_score", 0.3, score_of("wrong and malformed"), EM_FORMAT),
    Case("reward.retrieval_score", 0.3, score_of("wrong despite the passage"), EM_FORMAT),
    Case("reward.nested_search", True, score_of("wrong, searching in its thought"), EM_FORMAT),
    Case("reward.nested_search", True, score_of("wrong, searching in its thought"), FORMAT),
    Case("reward.overlong_limit", 40, score_of("wrong"), OVERLONG),
    Case("reward.overlong_buffer", 50, score_of("wrong"), OVERLONG | {"reward.overlong_limit": 60}),
    Case("reward.otc_c", 1.0, score_of("right after a search"), {"reward.otc_ppo": 1.0}),
    Case("reward.otc_c", 1.0, score_of("right after a search"), {"reward.otc_grpo": 1.0}),
    Case("reward.judge_endpoint.url", "http://127.0.0.1:9/v2", judge_url, JUDGED),
    Case("reward.judge_endpoint.model", "other", judge_body, JUDGED),
    Case("reward.judge_endpoint.api_key_env", "OTHER_KEY", judge_key, JUDGED),
    Case("reward.judge_endpoint.timeout_s", 7.0, judge_timeout, JUDGED),
    Case("reward.judge_endpoint.max_retries", 1, attempts_at_a_broken_judge, JUDGED),
    Case("reward.judge_endpoint.backoff_s", 2.0, waits_for_a_broken_judge, JUDGED),
    Case("reward.judge_endpoint.max_concurrent", 3, requests_at_a_time, JUDGED),
]


@pytest.mark.parametrize("case", TABLE, ids=[f"{case.key}={case.other}" for case in TABLE])
def test_the_key_changes_what_its_probe_sees(case, tokenizer, tmp_path):
    BENCH.check(case, tokenizer, tmp_path)


def test_every_key_has_a_case():
    assert {case.key for case in TABLE} == set(BENCH.defaults)
