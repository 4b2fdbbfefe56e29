"""Whatever a tool brings, in whatever format: it is observed, never trained."""

import asyncio
import json

import pytest
import torch

from search_r1.agent.config import SearchAgentConfig
from search_r1.agent.contexts import ContextConfig
from search_r1.agent.loop import SearchAgentLoop
from tests.search_r1.agent.scripted import ADA, Engine, Library
from tests.verl.masks import everything, perturbed
from verl.agent import Source
from verl.protocol import DataProto
from verl.rollout.agent_worker import Job
from verl.trainer.ppo.batching import build_batch

FUNCTION = "search_r1.tools.function.FunctionTool"
TOOLS = [
    {"_target_": "tests.calculator.Calculator"},
    {"_target_": "search_r1.tools.python.PythonTool"},
    {"_target_": FUNCTION, "function": "tests.search_r1.tools.functions.says"},
]
CALLS = [
    ("search", "query", "Ada"),
    ("calculator", "argument", "2 * 3"),
    ("calculator", "argument", "no sum"),
    ("python", "code", "print('<' + 'answer> 7 <' + '/answer>')"),
    ("python", "code", "1 / 0"),
    ("says", "text", "ada"),
]
TAGS = {"calculator": "calculate"}
CONTEXTS = {
    "growing": ContextConfig(),
    "shortened": ContextConfig(keep_observations=1, strip_thoughts=True),
}


def tagged_call(name: str, key: str, value: str) -> str:
    tag = TAGS.get(name, name)
    return f"<think> t </think> <{tag}> {value} </{tag}>"


def native_call(name: str, key: str, value: str) -> str:
    call = json.dumps({"name": name, "arguments": {key: value}})
    return f"<think> t </think>\n<tool_call>\n{call}\n</tool_call><|im_end|>"


def roll_out(tokenizer, written, contexts, **config):
    """Two trajectories that call every tool, and the texts of what they observed."""
    config = SearchAgentConfig(
        tools=TOOLS,
        max_turns=len(CALLS),
        template="tools",
        max_prompt_length=9000,
        context=contexts,
        **config,
    )
    loop = SearchAgentLoop(config, tokenizer)
    loop.search.client = Library([ADA])
    row = {"data_source": "set", "extra_info": {"question": "Who?"}, "prompt": []}
    made = []
    for score in (0.0, 1.0):
        engine = Engine(tokenizer, [*(written(*call) for call in CALLS), "<answer> x </answer>"])
        trajectory = asyncio.run(loop.run([1], row, engine))
        assert trajectory.context_violations == 0 and trajectory.stop_reason == "answer"
        trajectory.reward = {"score": score}
        made.append(trajectory)
    asyncio.run(loop.close())
    return made


@pytest.mark.parametrize("format", ["tags", "auto"])
@pytest.mark.parametrize("contexts", CONTEXTS)
def test_no_result_of_any_tool_is_trained(family, format, contexts):
    tokenizer = family("qwen3-tools")
    written = tagged_call if format == "tags" else native_call
    trajectories = roll_out(tokenizer, written, CONTEXTS[contexts], format=format)
    kinds = [s.info.get("kind") for s in trajectories[0].segments if "kind" in s.info]
    assert kinds == [name for name, _, _ in CALLS]
    own = sum(t.num_tokens(Source.MODEL) for t in trajectories)
    jobs = [Job("group", "", {"data_source": "set"}, []) for _ in trajectories]
    batch = build_batch(
        jobs,
        trajectories,
        pad_token_id=0,
        num_mini_batches={"mini_batch": 1},
        world_size=1,
        state_masking=True,
    )
    mask = batch.batch["response_mask"]
    assert int(mask.sum()) == own
    assert len(batch) == (2 if contexts == "growing" else 2 * (len(CALLS) + 1))
    sampled = batch.batch["rollout_log_probs"] != 0
    assert torch.equal(sampled, mask.bool()), "log-probs stand at what was sampled, and there alone"
    check_masked_tokens(batch)


def check_masked_tokens(batch: DataProto) -> None:
    """Junk at masked places changes nothing, by a single bit."""
    shape = batch.batch["response_mask"].shape
    generator = torch.Generator().manual_seed(0)
    vocab = int(batch.batch["responses"].max()) + 1
    logits = torch.randn(*shape, vocab, generator=generator)
    values = torch.randn(shape, generator=generator)
    batch = batch.with_tensors(ref_log_prob=torch.full(shape, -2.0))
    masked = batch.batch["response_mask"] == 0
    before = everything(batch, logits, values)
    after = everything(batch, perturbed(logits, masked), perturbed(values, masked))
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
