"""Every key of `reward` changes something that can be observed from outside: scores, or what a judge is asked.

A case names a key, another value than its default, and a probe: a function that lets a reward built from a
configuration score trajectories, and says what came of it. Only the network is replaced.
"""

import asyncio
import copy
from asyncio import sleep
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import httpx
import pytest

from search_r1.rewards.compose import SearchRewardConfig
from tests.keys import defaults_of
from tests.models import make_tokenizer
from tests.search_r1.rewards.test_rewards import trajectory_of
from tests.verl.test_config import composed
from verl.agent import Source, Trajectory, TrajectoryFailed
from verl.trainer.config import build_reward, validate

KEYS = defaults_of(SearchRewardConfig, "reward")
ROW = {
    "reward_model": {"ground_truth": {"target": ["Rome"]}},
    "extra_info": {"question": "Which city?"},
}


@dataclass
class Setting:
    """What a probe is given."""

    raw: dict[str, Any]
    """The composed configuration."""
    tokenizer: Any
    patch: pytest.MonkeyPatch

    @property
    def reward(self) -> Any:
        return build_reward(validate(self.raw), self.tokenizer)


Probe = Callable[[Setting], Any]


@dataclass
class Case:
    key: str
    other: Any
    """A value that is not the default."""
    probe: Probe
    also: dict[str, Any] = field(default_factory=dict)
    """Further keys, without which this one would show no effect; the same for both values."""

    @property
    def name(self) -> str:
        return f"{self.key}={self.other} {self.probe.__name__}"


@cache
def composed_once() -> dict[str, Any]:
    return composed("grpo")


def observe(case: Case, value: Any, tokenizer: Any) -> Any:
    """What the probe of a case sees with this value of its key."""
    raw = copy.deepcopy(composed_once())
    for key, given in (case.also | {case.key: value}).items():
        *sections, name = key.split(".")
        section = raw
        for part in sections:
            section = section[part]
        assert name in section, "no key that a user could set"
        section[name] = given
    with pytest.MonkeyPatch.context() as patch:
        return case.probe(Setting(raw, tokenizer, patch))


# Scores


def searching(query: str) -> str:
    return f"<think> t </think> <search> {query} </search>"


def answering(text: str) -> str:
    return f"<think> t </think> <answer> {text} </answer>"


def rolled(tokenizer: Any, queries: list[str], last: str, passage: str = "nothing") -> Trajectory:
    """A trajectory that asks these queries, finds the same passage every time, and ends with `last`."""
    segments: list[tuple[str, str]] = []
    for query in queries:
        segments += [("M", searching(query)), ("O", f"<information>{passage}</information>")]
    trajectory = trajectory_of(tokenizer, *segments, ("M", last))
    found = [segment for segment in trajectory.segments if segment.source is Source.OBSERVATION]
    for segment, query in zip(found, queries, strict=True):
        passages = [{"title": "A title", "text": passage}]
        segment.info = {"kind": "search", "query": query, "passages": passages}
    return trajectory


def trajectories(tokenizer: Any) -> list[Trajectory]:
    """Good and bad ones, each with something of its own."""
    return [
        rolled(tokenizer, [], answering("Rome")),
        rolled(tokenizer, ["a city"], answering("Rome")),
        rolled(tokenizer, ["a city", "a river", "a city"], answering("Rome")),
        rolled(tokenizer, ["a city"], answering("Oslo"), passage="Rome is a city."),
        rolled(tokenizer, [], "<think> <search> q </search> </think>" + answering("Oslo")),
        rolled(tokenizer, [], answering("Rome city")),
        rolled(tokenizer, ["a city"], "<answer> Rome </answer>"),
        rolled(tokenizer, [], "I do not know"),
        nested(tokenizer),
    ]


def nested(tokenizer: Any) -> Trajectory:
    """One that searches within its thought."""
    within = ("M", "<think> t <search> a city </search> </think>")
    return trajectory_of(tokenizer, within, ("O", "nothing"), ("M", answering("Oslo")))


def scores(setting: Setting) -> Any:
    """The score of each trajectory, after it was compared with the others."""
    reward = setting.reward
    group = trajectories(setting.tokenizer)
    Network(setting.patch)

    async def score(trajectory: Trajectory) -> None:
        parts = reward(trajectory, ROW)
        trajectory.reward = await parts if asyncio.iscoroutine(parts) else parts

    async def score_all() -> None:
        for trajectory in group:
            await score(trajectory)

    asyncio.run(score_all())
    reward.score_groups([group])
    return [trajectory.reward["score"] for trajectory in group]


# The judge


class Network:
    """Stands in for the network and the clock: notes requests and waits; every judge says yes, or `status`."""

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
    reward = setting.reward
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
EM_FORMAT = {"reward.em_format": 1.0}
OVERLONG = {"reward.overlong": 1.0}

TABLE = [
    Case("reward.em", 0.5, scores),
    Case("reward.em", [[0, 0.0], [8, 1.0]], scores),
    Case("reward.sub_em", 1.0, scores),
    Case("reward.f1", 1.0, scores),
    Case("reward.f1_above", 1.0, scores),
    Case("reward.format", 1.0, scores),
    Case("reward.em_format", 1.0, scores),
    Case("reward.retrieval", 1.0, scores),
    Case("reward.no_search", -1.0, scores),
    Case("reward.no_answer", -1.0, scores),
    Case("reward.repeated_query", -1.0, scores),
    Case("reward.overlong", 1.0, scores, {"reward.overlong_limit": 20, "reward.overlong_buffer": 10}),
    Case("reward.ikea", 1.0, scores),
    Case("reward.otc_ppo", 1.0, scores),
    Case("reward.otc_grpo", 1.0, scores),
    Case("reward.judge", 1.0, scores),
    Case("reward.random", 1.0, scores),
    Case("reward.f1_threshold", 0.9, scores, {"reward.f1_above": 1.0}),
    Case("reward.structure_format_score", 0.3, scores, EM_FORMAT),
    Case("reward.final_format_score", 0.3, scores, EM_FORMAT),
    Case("reward.retrieval_score", 0.3, scores, EM_FORMAT),
    Case("reward.nested_search", True, scores, EM_FORMAT),
    Case("reward.nested_search", True, scores, {"reward.format": 1.0}),
    Case("reward.overlong_limit", 40, scores, OVERLONG),
    Case("reward.overlong_buffer", 30, scores, OVERLONG | {"reward.overlong_limit": 60}),
    Case("reward.otc_c", 1.0, scores, {"reward.otc_ppo": 1.0}),
    Case("reward.otc_c", 1.0, scores, {"reward.otc_grpo": 1.0}),
    Case("reward.judge_endpoint.url", "http://127.0.0.1:9/v2", judge_url, JUDGED),
    Case("reward.judge_endpoint.model", "other", judge_body, JUDGED),
    Case("reward.judge_endpoint.api_key_env", "OTHER_KEY", judge_key, JUDGED),
    Case("reward.judge_endpoint.timeout_s", 7.0, judge_timeout, JUDGED),
    Case("reward.judge_endpoint.max_retries", 1, attempts_at_a_broken_judge, JUDGED),
    Case("reward.judge_endpoint.backoff_s", 2.0, waits_for_a_broken_judge, JUDGED),
    Case("reward.judge_endpoint.max_concurrent", 3, requests_at_a_time, JUDGED),
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize("case", TABLE, ids=[case.name for case in TABLE])
def test_the_key_changes_what_its_probe_sees(case, tokenizer):
    with_default = observe(case, KEYS[case.key], tokenizer)
    once_more = observe(case, KEYS[case.key], tokenizer)
    assert with_default == once_more, "what the probe sees changes by itself, so it proves nothing"
    assert observe(case, case.other, tokenizer) != with_default


def test_every_key_has_a_case():
    assert {case.key for case in TABLE} == set(KEYS)
