"""The real engine (vLLM on CPU) beside a transformers forward. One engine serves the whole
module."""

import asyncio
import itertools
import tempfile
from dataclasses import dataclass
from typing import Any

import psutil
import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, Qwen2ForCausalLM

from tests.models import make_tiny_qwen2, perturb, rig
from tests.processes import until
from tests.trained import edit_json
from verl.agent import Completion, context_digest
from verl.rollout.vllm_server import VLLMServer, stop_token_ids
from verl.rollout.weight_sync import write_engine_model, write_weights
from verl.workers.config import ModelConfig, RolloutConfig

pytestmark = pytest.mark.cpu_engine

torch.set_num_threads(1)
ATTENTION = [
    "q_proj.weight",
    "k_proj.weight",
    "v_proj.weight",
    "q_proj.bias",
    "k_proj.bias",
    "v_proj.bias",
    "o_proj",
]
OTHERS = [
    "gate_proj",
    "up_proj",
    "down_proj",
    "input_layernorm",
    "post_attention_layernorm",
    "model.norm",
    "lm_head",
]
ENDS_TOO = 321
"""Ends a turn as well, says generation_config.json alone."""
GROUPS = ["embed_tokens", *ATTENTION, *OTHERS]


@dataclass
class Lab:
    """An engine, the loop it lives in, and models of its shape."""

    server: VLLMServer
    loop: asyncio.AbstractEventLoop
    tied: str
    untied: str
    names: Any

    def run(self, *coroutines: Any) -> list[Any]:
        async def together():
            return await asyncio.gather(*coroutines)

        return self.loop.run_until_complete(together())

    def generate(self, prompt: list[int], **sampling: Any) -> Any:
        """A coroutine."""
        defaults = {
            "temperature": 1.0,
            "top_p": 1.0,
            "top_k": -1,
            "max_tokens": 16,
            "stop": [],
            "seed": None,
        }
        defaults["log_probs"] = True
        return self.server.generate(f"r{next(self.names)}", prompt, defaults | sampling)

    def unfinished(self) -> int:
        """Number of requests that were made and have not ended."""
        return self.server.engine.output_processor.get_num_unfinished_requests()

    def writing(self) -> int:
        """Number of them of which the engine has sampled a token."""
        states = self.server.engine.output_processor.request_states.values()
        return sum(not state.is_prefilling for state in states)

    def sync(self, model: Qwen2ForCausalLM, version: int = 0) -> None:
        async def run():
            await self.server.begin_weight_update()
            with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
                write_weights(model.state_dict().items(), folder)
                await self.server.load_weights(folder)
            await self.server.finish_weight_update_and_resume(version)

        self.run(run())


def load(path: str) -> Qwen2ForCausalLM:
    return Qwen2ForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    tied = make_tiny_qwen2(tmp_path_factory.mktemp("tied"), tied=True, seed=1)
    untied = make_tiny_qwen2(tmp_path_factory.mktemp("untied"), tied=False, seed=2)
    edit_json(
        tied / "generation_config.json",
        eos_token_id=[AutoTokenizer.from_pretrained(tied).eos_token_id, ENDS_TOO],
    )
    config = RolloutConfig(
        dtype="float32",
        enforce_eager=True,
        cpu_threads=1,
        cpu_kvcache_gb=0.25,
        max_num_batched_tokens=512,
    )
    server = VLLMServer(
        config,
        ModelConfig(path=str(tied)),
        max_model_len=512,
        device="cpu",
        replica_rank=0,
        num_replicas=1,
    )
    lab = Lab(server, asyncio.new_event_loop(), str(tied), str(untied), itertools.count())
    lab.run(server.start())
    engine = [
        p for p in psutil.Process().children(recursive=True) if "EngineCore" in "".join(p.cmdline())
    ]
    yield lab
    lab.run(server.shutdown())
    _, alive = psutil.wait_procs(engine, timeout=10)
    lab.loop.close()
    assert len(engine) == 1 and not alive, "the engine's process outlives it"


@torch.no_grad()
def reference(
    model: Qwen2ForCausalLM, prompt: list[int], out: Completion, temperature: float = 1.0
) -> torch.Tensor:
    """Log-probs of the sampled tokens under `model`: [number of tokens]."""
    ids = torch.tensor([prompt + out.token_ids])
    logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1] / (temperature or 1.0)
    return logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0]


def difference(
    model: Qwen2ForCausalLM, prompt: list[int], out: Completion, temperature: float = 1.0
) -> float:
    return float(
        (reference(model, prompt, out, temperature) - torch.tensor(out.log_probs)).abs().max()
    )


def prompts(n: int, length: int = 40) -> list[list[int]]:
    generator = torch.Generator().manual_seed(n)
    return torch.randint(0, 350, (n, length), generator=generator).tolist()


def test_tokens_in_tokens_out(lab):
    """Ids that no text would be tokenised to reach the engine untouched."""
    tokenizer = AutoTokenizer.from_pretrained(lab.tied)
    prompt = [*tokenizer.convert_tokens_to_ids(list("<search>")), tokenizer.eos_token_id, 5, 5]
    assert tokenizer(tokenizer.decode(prompt))["input_ids"] != prompt
    (out,) = lab.run(lab.generate(prompt, max_tokens=7, seed=3))
    assert out.context_digest == context_digest(prompt)
    assert (out.finish_reason, out.stop_reason) == ("length", None)
    assert len(out.token_ids) == len(out.log_probs) == 7


def test_every_id_that_ends_a_turn_ends_it(lab):
    model = load(lab.untied)
    rig(model, [20, 21, ENDS_TOO, 22])
    lab.sync(model)
    (out,) = lab.run(lab.generate([20], temperature=0))
    assert out.token_ids == [21, ENDS_TOO] and out.finish_reason == "stop"


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_log_probs_are_those_of_what_was_sampled_from(lab, temperature):
    model = load(lab.tied)
    lab.sync(model)
    batch = prompts(24)
    outs = lab.run(*(lab.generate(p, temperature=temperature) for p in batch))
    assert (
        max(difference(model, p, o, temperature) for p, o in zip(batch, outs, strict=True)) < 1e-4
    )
    if temperature == 0:
        logits = model(torch.tensor([batch[0]])).logits[0, -1]
        assert outs[0].token_ids[0] == int(logits.argmax())


def test_truncated_sampling_renormalises(lab):
    (out,) = lab.run(lab.generate(prompts(1)[0], top_k=1))
    assert out.log_probs == [0.0] * len(out.token_ids)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_every_parameter_group_reaches_the_engine(lab, tied):
    """Also proves that a sync empties the prefix cache: the prompts are the same each time."""
    batch = prompts(4, 150)
    model = load(lab.tied if tied else lab.untied)
    lab.sync(model)
    seen = set()
    for group in GROUPS[: -1 if tied else None]:
        stale = lab.run(*(lab.generate(p, max_tokens=6) for p in batch))
        touched = torch.nn.ParameterList(p for name, p in model.named_parameters() if group in name)
        seen |= {name for name, _ in model.named_parameters() if group in name}
        perturb(touched, seed=len(seen), scale=0.3)
        lab.sync(model)
        fresh = lab.run(*(lab.generate(p, max_tokens=6) for p in batch))
        for temperature, outs in (
            (1.0, fresh),
            (0.7, lab.run(*(lab.generate(p, temperature=0.7) for p in batch))),
        ):
            assert (
                max(difference(model, p, o, temperature) for p, o in zip(batch, outs, strict=True))
                < 1e-3
            ), group
        if group != "k_proj.bias":  # a shift of all keys alike moves attention little
            assert max(difference(model, p, o) for p, o in zip(batch, stale, strict=True)) > 1e-3, (
                group
            )
    assert seen == {name for name, _ in model.named_parameters()}


def test_turns_reuse_the_cache_and_agree(lab):
    """Contexts that grow by turns, as an agent's do: cached and recomputed prefixes give the same
    log-probs."""
    model = load(lab.untied)
    lab.sync(model)

    async def talk(context):
        for turn in range(4):
            out = await lab.generate(context, max_tokens=20)
            assert out.context_digest == context_digest(context)
            assert difference(model, context, out) < 1e-4, turn
            context = context + out.token_ids + context[:60]

    lab.run(*(talk(p) for p in prompts(8, 70)))


def test_a_stop_string_ends_on_the_token_that_completes_it(lab):
    """`>\\n\\n` is one token: it is kept whole, nothing is added, and the log-prob is there."""
    tokenizer = AutoTokenizer.from_pretrained(lab.untied)
    start, *chain = [tokenizer.eos_token_id, *tokenizer("</search>\n\nAda was")["input_ids"]]
    spoken = tokenizer("</search>\n\n")["input_ids"]
    assert chain[: len(spoken)] == spoken and tokenizer.decode(spoken[-1:]) == ">\n\n"
    model = load(lab.untied)
    rig(model, [start, *chain])
    lab.sync(model)
    (out,) = lab.run(
        lab.generate([start], temperature=0.0, max_tokens=50, stop=["</answer>", "</search>"])
    )
    assert out.token_ids == spoken
    assert (out.finish_reason, out.stop_reason) == ("stop", "</search>")
    assert difference(model, [start], out) < 1e-4
    (short,) = lab.run(lab.generate([start], temperature=0.0, max_tokens=2, stop=["</search>"]))
    assert (short.token_ids, short.finish_reason) == (spoken[:2], "length")


def test_a_sampled_end_of_text_is_kept(lab):
    tokenizer = AutoTokenizer.from_pretrained(lab.untied)
    first, last = tokenizer("hello")["input_ids"][:2]
    model = load(lab.untied)
    rig(model, [first, last, tokenizer.eos_token_id])
    lab.sync(model)
    (out,) = lab.run(lab.generate([first], temperature=0.0, stop=["</search>"]))
    assert out.token_ids == [last, tokenizer.eos_token_id] and len(out.log_probs) == 2
    assert (out.finish_reason, out.stop_reason) == ("stop", None)


def test_every_token_that_ends_a_turn_stops_the_engine_and_is_kept(lab, tmp_path, monkeypatch):
    """EOS of the tokenizer, further EOS of the generation configuration, the end of a turn in the
    chat template."""
    tokenizer = AutoTokenizer.from_pretrained(lab.untied)
    assert lab.server.stop_token_ids == sorted([tokenizer.eos_token_id, ENDS_TOO])
    first, last, other = tokenizer("hello")["input_ids"][:3]
    ends = {
        "eos": tokenizer.eos_token_id,
        "generation": other,
        "template": tokenizer.convert_tokens_to_ids("<|endoftext|>"),
    }
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "<|endoftext|>")
    tokenizer.save_pretrained(tmp_path)
    GenerationConfig(eos_token_id=[ends["eos"], ends["generation"]]).save_pretrained(tmp_path)
    monkeypatch.setattr(
        lab.server, "stop_token_ids", stop_token_ids(ModelConfig(path=str(tmp_path)))
    )
    assert lab.server.stop_token_ids == sorted(set(ends.values()))
    for name, end in ends.items():
        model = load(lab.untied)
        rig(model, [first, last, end])
        lab.sync(model)
        (out,) = lab.run(lab.generate([first], temperature=0.0, stop=["</search>"]))
        assert out.token_ids == [last, end] and len(out.log_probs) == 2, name
        assert (out.finish_reason, out.stop_reason) == ("stop", None if name == "eos" else end)
        assert difference(model, [first], out) < 1e-4


def test_seeds(lab):
    """The same tokens whatever runs beside, also when the prompts exceed the tokens of one engine
    step."""
    lab.sync(load(lab.untied))
    prompt, *others = prompts(30)
    (alone,) = lab.run(lab.generate(prompt, seed=11))
    beside = lab.run(lab.generate(prompt, seed=11), *(lab.generate(p, seed=1) for p in others))
    assert alone.token_ids == beside[0].token_ids
    different = lab.run(
        *(lab.generate(prompt, seed=s) for s in range(5)),
        lab.generate(prompt),
        lab.generate(prompt),
    )
    assert len({tuple(o.token_ids) for o in different}) == 7


def test_samples_follow_the_distribution(lab):
    """Chi-square of 4,000 seeded first tokens against the softmax, tokens expected less than 5
    times pooled."""
    model = load(lab.untied)
    lab.sync(model)
    (prompt,) = prompts(1)
    probs = model(torch.tensor([prompt])).logits[0, -1].detach().double().softmax(-1)
    outs = lab.run(*(lab.generate(prompt, max_tokens=1, seed=s) for s in range(4000)))
    counts = torch.bincount(torch.tensor([o.token_ids[0] for o in outs]), minlength=len(probs))
    often = probs * 4000 >= 5
    expected = torch.cat([probs[often], probs[~often].sum()[None]]) * 4000
    observed = torch.cat([counts[often], counts[~often].sum()[None]])
    degrees = len(expected) - 1
    chi2 = float(((observed - expected) ** 2 / expected).sum())
    assert abs(chi2 - degrees) < 4 * (2 * degrees) ** 0.5


def test_versions_and_requests_around_a_sync(lab):
    """Running requests finish under the old weights, those that come during the sync wait for the
    new ones."""
    old = load(lab.tied)
    new = load(lab.untied)
    lab.sync(old, version=3)
    prompt = prompts(1)[0]

    async def scene():
        running = asyncio.create_task(lab.generate(prompt, max_tokens=60, seed=1))
        await until(lambda: lab.writing() == 1 or running.done())
        await lab.server.begin_weight_update()
        waiting = asyncio.create_task(lab.generate(prompt, max_tokens=10))
        with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
            write_weights(new.state_dict().items(), folder)
            await lab.server.load_weights(folder)
        assert not waiting.done()
        await lab.server.finish_weight_update_and_resume(4)
        return await running, await waiting

    ((first, second),) = lab.run(scene())
    assert (first.policy_version, second.policy_version) == (3, 4)
    assert difference(old, prompt, first) < 1e-4 and difference(new, prompt, second) < 1e-4


def test_cancelled_requests_leave_the_others_alone(lab):
    lab.sync(load(lab.tied))

    async def scene():
        tasks = [asyncio.create_task(lab.generate(p, max_tokens=200)) for p in prompts(20)]
        await until(lambda: lab.unfinished() == 20)
        for task in tasks[::2]:
            task.cancel()
        return await asyncio.gather(*tasks, return_exceptions=True)

    (results,) = lab.run(scene())
    assert any(isinstance(r, asyncio.CancelledError) for r in results[::2])
    assert all(isinstance(r, Completion) for r in results[1::2])
    assert lab.unfinished() == 0


def test_a_prompt_beyond_the_context_is_an_error(lab):
    with pytest.raises(Exception, match="maximum context length is 512"):
        lab.run(lab.generate(prompts(1, 513)[0]))


@pytest.mark.parametrize("tied", [True, False])
def test_the_engines_model_has_a_head_of_its_own(tmp_path, tied):
    source = make_tiny_qwen2(tmp_path / "model", tied=tied)
    (tmp_path / "engine").mkdir()
    write_engine_model(ModelConfig(path=str(source)), str(tmp_path / "engine"))
    assert AutoConfig.from_pretrained(tmp_path / "engine").tie_word_embeddings is False
    a = load(str(source))
    b = load(str(tmp_path / "engine"))
    ids = torch.tensor(prompts(1))
    torch.testing.assert_close(a(ids).logits, b(ids).logits)
