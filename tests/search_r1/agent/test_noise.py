"""A schedule of noise, from the training step of a row to what the policy reads.

Loop, client, server and endpoint are real; the policy and the model behind the endpoint are played.
"""

import asyncio
import json
import math
import re
import sys

import pytest

from search_r1.agent.baselines import RagLoop
from search_r1.agent.config import SearchAgentConfig
from search_r1.agent.loop import SearchAgentLoop
from search_r1.launch import free_port
from search_r1.search.client.config import NoiseConfig, RetrieverConfig
from search_r1.search.engines.load import load
from search_r1.search.noise import Noise
from search_r1.search.retrieval_server import parse_arguments
from search_r1.search.server.app import create_app
from search_r1.search.server.service import ServerSettings
from search_r1.trajectory import read_passages
from search_r1.world.generate import WorldConfig, make_world
from tests.configs import composed
from tests.e2e.runs import ROOT
from tests.models import make_tokenizer
from tests.retrieval import serving, wait_until_ready, write_lines
from verl.agent import TRAINING_STEP, Completion, context_digest
from verl.trainer.config import validate
from verl.utils.tokenizer import encode_text

sys.path.insert(0, str(ROOT / "scripts" / "bench"))
import simulator_server

STEPS = 4
SCHEDULE = {"start": 0.1, "end": 0.9, "steps": STEPS}
EXPECTED = [0.1 + 0.8 * (4 ** (step / STEPS) - 1) / 3 for step in range(1, STEPS + 1)]
"""The equation of the paper, written out: about .21, .37, .59 and .9."""


class Policy:
    """Searches for the name that it is asked about, then answers."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    async def __call__(self, prompt_ids, *, max_tokens, stop=(), images=()):
        text = self.tokenizer.decode(prompt_ids)
        name = text.split("?")[0].split()[-1]
        is_found = "<information>" in text
        ids = encode_text(
            self.tokenizer, "<answer> x </answer>" if is_found else f"<search> {name} </search>"
        )
        return Completion(ids, [-0.5] * len(ids), "stop", None, 1, context_digest(prompt_ids))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    world = make_world(WorldConfig(train_people=150, train_questions=10, test_questions=10))
    return write_lines(tmp_path_factory.mktemp("world") / "corpus.jsonl", world.passages)


@pytest.fixture(scope="module")
def names(corpus):
    rows = map(json.loads, corpus.read_text().splitlines())
    return [row["contents"].partition("\n")[0].strip('"') for row in rows][:300]


@pytest.fixture(scope="module")
def model(corpus):
    with serving(simulator_server.app_of(simulator_server.World(corpus))) as base:
        yield f"{base}/v1"


@pytest.fixture(scope="module")
def retriever(model):
    flags = ["--retriever_name", "simulated", "--simulated_url", model]
    args = parse_arguments([*flags, "--simulated_model", simulator_server.MODEL])
    with serving(create_app(lambda: load(args), ServerSettings())) as base:
        wait_until_ready(f"{base}/health")
        yield f"{base}/retrieve"


def make_loop(tokenizer, url, noise, loop=SearchAgentLoop, **keys):
    return loop(
        SearchAgentConfig(retriever=RetrieverConfig(url=url, noise=noise), **keys), tokenizer
    )


def row_of(name, step):
    """A question about a name, in a training step or outside of training."""
    question = {"extra_info": {"question": f"Who is {name}?"}}
    return question if step is None else question | {TRAINING_STEP: step}


def rolled_out(loop, names, *steps):
    """The trajectories of questions about these names, for each step all at the same time."""

    async def roll():
        rows = [row_of(name, step) for step in steps for name in names]
        prompts = [encode_text(loop.tokenizer, row["extra_info"]["question"]) for row in rows]
        policy = Policy(loop.tokenizer)
        trajectories = await asyncio.gather(
            *(loop.run(ids, row, policy) for ids, row in zip(prompts, rows, strict=True))
        )
        await loop.close()
        return trajectories

    trajectories = asyncio.run(roll())
    return [trajectories[i : i + len(names)] for i in range(0, len(trajectories), len(names))]


def has_noise(trajectory, name):
    """Whether none of the passages that were found mentions the name."""
    passages = read_passages(trajectory)
    assert len(passages) == 3
    words = {word for p in passages for word in re.findall(r"\w+", f"{p['title']} {p['text']}")}
    return name not in words


def test_the_share_of_noise_follows_the_schedule_and_validation_gets_none(
    tokenizer, retriever, names
):
    loop = make_loop(tokenizer, retriever, SCHEDULE)
    assert loop.preflight() == []
    groups = rolled_out(loop, names, *range(1, STEPS + 1), None)
    noisy = [
        [has_noise(trajectory, name) for trajectory, name in zip(group, names, strict=True)]
        for group in groups
    ]
    for step, (found, share) in enumerate(zip(noisy, EXPECTED, strict=False), 1):
        deviation = math.sqrt(share * (1 - share) * len(names))
        assert abs(sum(found) - share * len(names)) < 4 * deviation, f"step {step}"
        assert found == [Noise(share, step).falls_on(name) for name in names]
    assert not any(noisy[-1]), "validation"
    metrics = [loop.reduce_metrics(group)["env/noise"] for group in groups]
    assert metrics == pytest.approx([*EXPECTED, 0.0])


@pytest.mark.parametrize("method", [SearchAgentLoop, RagLoop])
def test_validation_may_be_given_noise_beside_a_training_without(
    tokenizer, retriever, names, method
):
    loop = make_loop(tokenizer, retriever, {"validation": 1.0}, method)
    trained, validated = rolled_out(loop, names[:20], 1, None)
    assert not any(map(has_noise, trained, names)) and all(map(has_noise, validated, names))


def test_without_a_schedule_nothing_is_asked_or_counted(tokenizer, retriever, names):
    loop = make_loop(tokenizer, retriever, {})
    (group,) = rolled_out(loop, names[:20], 3)
    assert not any(map(has_noise, group, names))
    assert "env/noise" not in loop.reduce_metrics(group)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"do_search": False}, "no effect beside do_search=false: nothing is searched; remove it"),
        ({"replay_calls": "calls"}, "no effect beside agent.replay_calls: no server is asked"),
    ],
)
def test_noise_of_searches_that_no_server_is_asked_is_refused(tokenizer, keys, message):
    url = f"http://127.0.0.1:{free_port()}/retrieve"
    problems = make_loop(tokenizer, url, SCHEDULE, **keys).preflight()
    assert any(f"retriever.noise has {message}" in problem for problem in problems)
    assert not any("noise" in p for p in make_loop(tokenizer, url, {}, **keys).preflight())


def test_a_server_without_noise_is_found_before_the_training(tokenizer):
    url = f"http://127.0.0.1:{free_port()}/retrieve"
    problems = make_loop(tokenizer, url, SCHEDULE).preflight()
    assert any(p.startswith(f"retriever.url: {url} gives no noise") for p in problems)


def test_the_played_model_knows_only_the_prompts_of_the_engine():
    with pytest.raises(Exception, match="expected one of the prompts"):
        simulator_server.read_prompt("Write something.")


@pytest.mark.parametrize("recipe", ["closed_world/zerosearch_grpo", "zerosearch/qwen2.5-3b-grpo"])
def test_the_recipes_have_the_schedule_over_their_steps(recipe):
    config = validate(composed("grpo", f"experiment={recipe}"))
    noise = NoiseConfig.model_validate(config.agent["retriever"]["noise"])
    steps = config.trainer.total_training_steps
    assert noise.steps == steps and noise.share_at(steps) == 0.5
    assert noise.share_at(None) == 0.0 and noise.share_at(1) < 0.01
    assert composed("grpo", f"experiment={recipe}")["setup"]["index_dir"] is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("retriever.noise.steps=0", "noise.steps"),
        ("retriever.noise.base=1", "must not be 1"),
        ("retriever.noise.steps=null", "name the number of training steps"),
    ],
)
def test_a_bad_schedule_is_named_before_anything_starts(override, message):
    with pytest.raises(ValueError, match=message):
        validate(composed("grpo", "experiment=closed_world/zerosearch_grpo", override))
