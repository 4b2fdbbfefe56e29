"""An engine and a trainer of the same small model in one process, and what the smoke asks of the
engine alone.

    python scripts/bench/gpu_engine.py --device cuda --dir FOLDER

asks one model runner, which VLLM_USE_V2_MODEL_RUNNER=0 or 1 chooses.
The engine's model runs in a process of its own, as in training; weights travel by CUDA IPC.
"""

import argparse
import asyncio
import itertools
import json
import os
import sys
import time
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, Qwen2ForCausalLM

from tests.models import make_tiny_qwen2, rig
from verl.agent import Completion
from verl.protocol import DataProto
from verl.rollout import weight_sync
from verl.rollout.manager import sleep_level
from verl.rollout.vllm_server import VLLMServer
from verl.rollout.weight_sync import WeightSender
from verl.single_controller.worker import Worker
from verl.trainer.sft import start_process_group
from verl.workers.config import FSDPConfig, ModelConfig, RolloutConfig
from verl.workers.forward import forward_log_probs
from verl.workers.fsdp_model import build_model

GROUPS = (
    "embed_tokens",
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
    "layernorm",
    "model.norm",
)
"""Parts of the names of a Qwen2's parameters, which together are all of them. The head is the
embedding."""
PROMPTS = 16
PROMPT_TOKENS = 60
NEW_TOKENS = 24
MEAN_GAP = 0.05


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 350, (PROMPTS, PROMPT_TOKENS), generator=generator).tolist()


def make_model(folder: Path, tied: bool = True) -> str:
    return str(make_tiny_qwen2(folder / ("tied" if tied else "untied"), tied=tied, width=128))


class Handle:
    """What a Ray handle of the engine would be: `method.remote(...)`, answered at once."""

    def __init__(self, lab: "Lab") -> None:
        self.lab = lab

    def __getattr__(self, method: str) -> Any:
        return _Method(self.lab, method)


class _Method:
    def __init__(self, lab: "Lab", name: str) -> None:
        self.lab = lab
        self.name = name

    def remote(self, *args: Any) -> Any:
        return self.lab.run(getattr(self.lab.server, self.name)(*args))


class Trainer:
    """The policy in bfloat16 over float32 masters, on the only rank of its group."""

    def __init__(self, folder: Path, device: str) -> None:
        start_process_group(threads=1)
        self.device = device
        self.sender = None
        self.path = make_model(folder)
        worker = Worker()
        self.at = worker.device
        config = ModelConfig(path=self.path, enable_gradient_checkpointing=False)
        self.model = build_model(config, "lm", FSDPConfig(dtype="bfloat16"), worker.mesh)

    def send(self, lab: "Lab") -> None:
        """Brings its weights to the engine."""
        if self.sender is None or self.sender.servers[0].lab is not lab:
            weight_sync.get = lambda refs: refs  # pyright: ignore[reportAttributeAccessIssue]
            self.sender = WeightSender(self.model, [Handle(lab)], self.device, torch.bfloat16)
        self.sender.send()

    @contextmanager
    def perturbed(self, group: str) -> Iterator[None]:
        """All parameters whose names hold `group` are other ones meanwhile."""
        named: Any = self.model.named_parameters()
        chosen = [p.data.to_local() for name, p in named if group in name]
        assert chosen, f"no parameter is called {group}"
        before = [local.clone() for local in chosen]
        for local in chosen:
            local.add_(torch.randn_like(local), alpha=0.1)
        yield
        for local, old in zip(chosen, before, strict=True):
            local.copy_(old)

    @torch.no_grad()
    def log_probs(self, contexts: list[list[int]], outs: list[Completion]) -> torch.Tensor:
        """Of the sampled tokens, at temperature 1: [prompts, tokens]."""
        data = batch_of(contexts, outs).to(self.at)
        return forward_log_probs(self.model, data, 1.0, with_entropy=False)[0].cpu()


def batch_of(contexts: list[list[int]], outs: list[Completion]) -> DataProto:
    """Prompts and completions of equal lengths."""
    ids = torch.tensor([out.token_ids for out in outs])
    ones = torch.ones(len(outs), len(contexts[0]) + ids.shape[1], dtype=torch.long)
    return DataProto.from_dict(
        {
            "prompts": torch.tensor(contexts),
            "responses": ids,
            "attention_mask": ones,
            "response_mask": torch.ones_like(ids),
        }
    )


class Lab:
    """A running engine. Its calls are answered when they return: one loop, driven from here."""

    def __init__(self, folder: Path, device: str, path: str = "", **rollout: Any) -> None:
        config = RolloutConfig(
            gpu_memory_utilization=0.3,
            cpu_kvcache_gb=0.25,
            max_num_batched_tokens=512,
            load_format="auto" if path else "dummy",
            **rollout,
        )
        self.path = path or make_model(folder)
        self.server = VLLMServer(
            config,
            ModelConfig(path=self.path),
            max_model_len=512,
            device=device,
            replica_rank=0,
            num_replicas=1,
            visible_devices=[os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]],
        )
        self.loop = asyncio.new_event_loop()
        self.names = itertools.count()

    def __enter__(self) -> "Lab":
        self.run(self.server.start())
        return self

    def __exit__(self, *_: Any) -> None:
        self.run(self.server.shutdown())

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(coroutine)

    async def _all(self, contexts: list[list[int]], sampling: dict[str, Any]) -> list[Completion]:
        defaults = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "max_tokens": NEW_TOKENS}
        defaults |= {"stop": [], "seed": None, "log_probs": True}
        calls = [
            self.server.generate(f"r{next(self.names)}", context, defaults | sampling)
            for context in contexts
        ]
        return list(await asyncio.gather(*calls))

    def generate(self, contexts: list[list[int]], **sampling: Any) -> list[Completion]:
        """A completion of each context."""
        return self.run(self._all(contexts, sampling))

    def sync(self, trainer: Trainer) -> float:
        """Brings the trainer's weights; the seconds that it took."""
        began = time.monotonic()
        self.run(self.server.begin_weight_update())
        trainer.send(self)
        self.run(self.server.finish_weight_update_and_resume(0))
        return time.monotonic() - began

    def gap(self, trainer: Trainer) -> float:
        """Mean difference of the log-probs of what the engine samples, in nats."""
        pairs = zip(prompts(), self.generate(prompts()), strict=True)
        whole = [(context, out) for context, out in pairs if len(out.token_ids) == NEW_TOKENS]
        contexts = [context for context, _ in whole]
        outs = [out for _, out in whole]
        ours = trainer.log_probs(contexts, outs)
        return float((ours - torch.tensor([o.log_probs for o in outs])).abs().mean())

    def sleep_and_wake(self, trainer: Trainer) -> dict[str, float]:
        """Sleeps, wakes with the trainer's present weights; GiB and seconds."""
        if trainer.device == "cpu":
            self.sync(trainer)
            return {}
        before = free_gib()
        began = time.monotonic()
        self.run(self.server.sleep(sleep_level(self.server.config)))
        asleep = free_gib()
        slept = time.monotonic()
        self.run(self.server.wake_up(["weights"]))
        self.sync(trainer)
        self.run(self.server.wake_up(["kv_cache"]))
        self.run(self.server.finish_weight_update_and_resume(0))
        return {
            "freed GiB": round(asleep - before, 2),
            "taken again GiB": round(asleep - free_gib(), 2),
            "seconds of sleep": round(slept - began, 2),
            "seconds of wake-up and transfer": round(time.monotonic() - slept, 2),
        }


def free_gib() -> float:
    return torch.cuda.mem_get_info()[0] / 2**30


def answers(folder: Path, device: str) -> dict[str, Any]:
    """What one model runner says; under `problems` what is wrong with it."""
    path = make_model(folder, tied=False)
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = Qwen2ForCausalLM.from_pretrained(path, dtype=torch.float32)
    spoken = tokenizer("</search>\n\n")["input_ids"]
    chain = [tokenizer.eos_token_id, *spoken, *tokenizer("Ada was")["input_ids"]]
    rigged = folder / "rigged"
    rig(model, chain)
    model.save_pretrained(rigged)
    tokenizer.save_pretrained(rigged)
    problems: list[str] = []
    with Lab(folder, device, path, enforce_eager=True) as lab:
        found = sampled(lab, Qwen2ForCausalLM.from_pretrained(path, dtype=torch.float32), problems)
    with Lab(folder, device, str(rigged), enforce_eager=True) as lab:
        (out,) = lab.generate([chain[:1]], temperature=0.0, stop=["</answer>", "</search>"])
        if out.token_ids != spoken or out.stop_reason != "</search>":
            problems.append(f"a stop string ended on {out.token_ids}, not on {spoken}")
    return found | {"problems": problems}


def sampled(lab: Lab, model: Qwen2ForCausalLM, problems: list[str]) -> dict[str, Any]:
    """Log-probs, seeds, prefix cache and pauses of the engine beside the same model in float32."""
    contexts = prompts()
    figures = {}
    for temperature in (1.0, 0.7, 0.0):
        outs = lab.generate(contexts, temperature=temperature)
        gap = mean_gap(model, contexts, outs, temperature)
        figures[f"gap at {temperature}"] = gap
        if gap > MEAN_GAP:
            problems.append(f"log-probs at temperature {temperature} differ by {gap} nats")
    greedy = [list(zip(out.token_ids, out.log_probs, strict=True)) for out in outs]
    once, twice = (lab.generate(contexts[:4], seed=7) for _ in range(2))
    if [out.token_ids for out in once] != [out.token_ids for out in twice]:
        problems.append("the same seed gave other tokens")
    if len({tuple(out.token_ids) for out in lab.generate([contexts[0]] * 8)}) == 1:
        problems.append("without a seed all samples are the same")
    truncated = lab.generate(contexts[:2], top_k=1)
    if any(value != 0.0 for out in truncated for value in out.log_probs):
        problems.append("log-probs are not those after top_k")
    lab.run(pause(lab, contexts[0], problems))
    uses = lab.server.engine.vllm_config.use_v2_model_runner
    return {"v2": uses, "gap": max(figures.values()), "greedy": greedy}


async def pause(lab: Lab, context: list[int], problems: list[str]) -> None:
    """A call that comes during a pause waits; the prefix cache is empty after it."""
    await lab.server.begin_weight_update()
    call = asyncio.create_task(lab._all([context], {}))
    await asyncio.sleep(0.2)
    if call.done():
        problems.append("a call was answered during a pause")
    await lab.server.finish_weight_update_and_resume(1)
    (out,) = await call
    if out.policy_version != 1:
        problems.append("a call that waited has the old version")


@torch.no_grad()
def mean_gap(
    model: Qwen2ForCausalLM, contexts: list[list[int]], outs: list[Completion], temperature: float
) -> float:
    """Mean difference to the model's log-probs at this temperature, in nats."""
    gaps = []
    for context, out in zip(contexts, outs, strict=True):
        ids = torch.tensor([context + out.token_ids])
        logits = model(input_ids=ids).logits[0, len(context) - 1 : -1] / (temperature or 1.0)
        right = logits.log_softmax(-1).gather(1, ids[0, len(context) :, None])[:, 0]
        gaps.append((right - torch.tensor(out.log_probs)).abs())
    return round(float(torch.cat(gaps).mean()), 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--dir", type=Path, required=True)
    args = parser.parse_args()
    sys.stdout.write(f"\nRESULT {json.dumps(answers(args.dir, args.device))}\n")


if __name__ == "__main__":
    main()
