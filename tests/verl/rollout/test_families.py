"""Every model family goes the whole way: rollout, actor, reference, critic, update, weight sync,
rollout again."""

import asyncio
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForTokenClassification

from tests.distributed import run_ranks
from tests.models import make_tokenizer, perturb
from verl.agent import Completion
from verl.protocol import DataProto
from verl.rollout.vllm_server import VLLMServer
from verl.rollout.weight_sync import has_head, write_weights
from verl.workers.actor import ActorWorker
from verl.workers.config import (
    ActorConfig,
    CriticConfig,
    FSDPConfig,
    ModelConfig,
    OptimConfig,
    RefConfig,
    RolloutConfig,
)
from verl.workers.critic import CriticWorker
from verl.workers.fsdp_model import full_parameters
from verl.workers.reference import ReferenceWorker

pytestmark = pytest.mark.cpu_engine

torch.set_num_threads(1)
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 256,
}
SLIDING = {"sliding_window": 16}
Family = tuple[type[transformers.PreTrainedConfig], dict[str, Any]]
FAMILIES: dict[str, Family] = {
    "qwen2.5": (transformers.Qwen2Config, {}),
    "qwen3": (transformers.Qwen3Config, {}),
    "llama3": (transformers.LlamaConfig, {}),
    "gemma2": (transformers.Gemma2Config, SLIDING),
    "gemma3": (transformers.Gemma3TextConfig, SLIDING),
}
"""Configuration class, and what is set beside `SHAPE`."""
TEMPERATURE = 0.7
FLOAT32 = FSDPConfig(model_dtype="float32", dtype="float32")
ROLLOUT = RolloutConfig(
    dtype="float32",
    enforce_eager=True,
    cpu_threads=1,
    cpu_kvcache_gb=0.1,
    max_num_batched_tokens=256,
    temperature=TEMPERATURE,
)


def make_model(folder: Path, family: Family) -> str:
    """A random model of the family, its head tied where the family ties it, with a window shorter
    than its rows."""
    tokenizer = make_tokenizer(folder, vocab=300)
    config_class, extra = family
    tokens: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
    }
    config = config_class(**tokens | SHAPE | extra)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    perturb(model, seed=0, scale=0.1)
    model.save_pretrained(folder)
    return str(folder)


def to_batch(prompts: list[list[int]], outs: list[Completion]) -> DataProto:
    width = max(len(out.token_ids) for out in outs)

    def column(values: list[list[Any]]) -> torch.Tensor:
        return torch.tensor([v + [0] * (width - len(v)) for v in values])

    mask = column([[1] * len(out.token_ids) for out in outs])
    return DataProto.from_dict(
        {
            "prompts": torch.tensor(prompts),
            "responses": column([out.token_ids for out in outs]),
            "attention_mask": torch.cat(
                [torch.ones(len(prompts), len(prompts[0]), dtype=torch.long), mask], dim=1
            ),
            "response_mask": mask,
            "rollout_log_probs": column([out.log_probs for out in outs]),
            "advantages": torch.linspace(-1, 1, len(outs))[:, None].expand(-1, width) * mask,
            "mini_batch": torch.zeros(len(outs), dtype=torch.long),
            "critic_mini_batch": torch.zeros(len(outs), dtype=torch.long),
        },
        meta_info={"num_mini_batches": {"mini_batch": 1, "critic_mini_batch": 1}},
    )


def train(path: str, batch: DataProto, folder: str) -> dict[str, Any]:
    """One step of everything; the updated weights are in `folder`, as an engine reads them and as a
    model."""
    model = ModelConfig(path=path)
    optim = OptimConfig(lr=1e-2)
    actor = ActorWorker(model, ActorConfig(optim=optim, fsdp_config=FLOAT32), ROLLOUT, 10)
    reference = ReferenceWorker(model, RefConfig(fsdp_config=FLOAT32), TEMPERATURE)
    batch = batch.union(actor.compute_log_prob(batch)).union(reference.compute_ref_log_prob(batch))
    norms = [actor.update_actor(batch)["grad_norm"]]
    if (
        type(transformers.AutoConfig.from_pretrained(path))
        in AutoModelForTokenClassification._model_mapping
    ):
        critic = CriticWorker(CriticConfig(model=model, optim=optim, fsdp_config=FLOAT32), 10)
        batch = batch.union(critic.compute_values(batch)).with_tensors(
            returns=batch.batch["advantages"]
        )
        assert batch.batch["values"].abs().max() > 0
        norms.append(critic.update_critic(batch)["grad_norm"])
    write_weights(full_parameters(actor.state.model), folder, has_head(actor.state.model.config))
    actor.save_pretrained(f"{folder}/hf")
    return {**batch.batch, "grad_norms": norms}


def log_probs(path: str, batch: DataProto) -> torch.Tensor:
    actor = ActorWorker(ModelConfig(path=path), ActorConfig(fsdp_config=FLOAT32), ROLLOUT, 10)
    return actor.compute_log_prob(batch).batch["old_log_probs"]


async def sample(server: VLLMServer, prompts: list[list[int]]) -> DataProto:
    sampling = {
        "temperature": TEMPERATURE,
        "top_p": 1.0,
        "top_k": -1,
        "max_tokens": 24,
        "stop": [],
        "seed": 5,
        "log_probs": True,
    }
    requests = [
        server.generate(f"{server.version}-{i}", prompt, sampling)
        for i, prompt in enumerate(prompts)
    ]
    return to_batch(prompts, await asyncio.gather(*requests))


async def whole_way(
    path: str, rollout: RolloutConfig = ROLLOUT
) -> tuple[DataProto, dict[str, Any], DataProto, torch.Tensor]:
    """A batch and what training on it gave; a batch of the synced engine and the updated policy's
    log-probs of it."""
    prompts = torch.randint(5, 250, (4, 12), generator=torch.Generator().manual_seed(1)).tolist()
    server = VLLMServer(
        rollout,
        ModelConfig(path=path),
        max_model_len=128,
        device="cpu",
        replica_rank=0,
        num_replicas=1,
    )
    await server.start()
    try:
        before = await sample(server, prompts)
        with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
            (trained,) = await asyncio.to_thread(run_ranks, 1, train, path, before, folder)
            await server.begin_weight_update()
            await server.load_weights(folder)
            await server.finish_weight_update_and_resume(1)
            after = await sample(server, prompts)
            (scored,) = await asyncio.to_thread(run_ranks, 1, log_probs, f"{folder}/hf", after)
    finally:
        await server.shutdown()
    return before, trained, after, scored


def gap(batch: DataProto, log_probs: torch.Tensor) -> float:
    mask = batch.batch["response_mask"].bool()
    return float((batch.batch["rollout_log_probs"] - log_probs)[mask].abs().max())


@pytest.mark.parametrize(
    "family",
    [
        # every whole run of tests/e2e is of this family
        pytest.param(name, marks=pytest.mark.slow if name == "qwen2.5" else ())
        for name in FAMILIES
    ],
)
def test_family(tmp_path, family):
    before, trained, after, scored = asyncio.run(whole_way(make_model(tmp_path, FAMILIES[family])))
    assert (
        gap(before, trained["old_log_probs"]) < 1e-3 and gap(before, trained["ref_log_prob"]) < 1e-3
    )
    assert min(trained["grad_norms"]) > 0
    assert gap(after, scored) < 1e-3
    same = before.batch["responses"].shape == after.batch["responses"].shape
    assert not same or not torch.equal(before.batch["responses"], after.batch["responses"]), (
        "the policy has moved"
    )
