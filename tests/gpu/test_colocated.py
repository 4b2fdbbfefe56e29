"""The real command on one GPU that trainer and engine share: sleep, wake-up, weights through CUDA IPC."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.e2e.runs import arguments, metrics, train
from tests.models import make_tiny_qwen2

ACTOR, REF, ROLLOUT = (f"actor_rollout_ref__{role}" for role in ("actor", "ref", "rollout"))
MEAN_GAP = 0.05
"""Nats. Both round to bfloat16, in another order: .011 to .017 with the engine on the CPU. Weights one update old would
be .3 away, the random ones of the engine's start (`load_format=dummy`) further."""
LORA = {"actor_rollout_ref__model__lora_rank": 4, f"{ACTOR}__optim__lr": 1e-2}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_qwen2(tmp_path_factory.mktemp("model"), tied=True, width=128)


def two_steps(folder: Path, model: Path, retriever: str, device: str, **more: Any) -> list[dict[str, Any]]:
    """Metrics of two steps of GRPO in bfloat16."""
    reward = folder / "reward.py"  # varies even with random weights
    reward.write_text("def compute_score(solution_str, **_):\n    return len(solution_str) / 100\n")
    settings = {
        "retriever__url": retriever,
        "custom_reward_function__path": reward,
        "trainer__device": device,
        "trainer__total_training_steps": 2,
        "actor_rollout_ref__model__enable_gradient_checkpointing": "true",
        f"{ACTOR}__fsdp_config__dtype": "bfloat16",
        f"{ACTOR}__optim__lr": 1e-3,
        f"{REF}__fsdp_config__dtype": "bfloat16",
        f"{REF}__fsdp_config__model_dtype": "bfloat16",
        f"{ROLLOUT}__dtype": "bfloat16",
        f"{ROLLOUT}__gpu_memory_utilization": 0.2,
        f"+{ROLLOUT}__engine_kwargs__kv_cache_memory_bytes": 2**28,  # more would be millions of blocks of a tiny model
        f"{ROLLOUT}__enforce_eager": "true",
    }
    status, output = train("grpo", arguments(folder, model, **settings | more))
    assert status == 0, output[-3000:]
    return metrics(folder)


@pytest.mark.gpu("vllm")
@pytest.mark.parametrize("more", [{}, LORA], ids=["all weights", "lora"])
def test_the_engine_samples_from_the_policy_that_is_trained(tmp_path, model, retriever, more):
    lines = two_steps(tmp_path, model, retriever, "cuda", **more)
    assert [line["training/global_step"] for line in lines] == [0, 1, 2]
    for line in lines[1:]:
        assert line["training/policy_version"] == line["training/global_step"]
        assert line["rollout/context_violations"] == 0 and line["timing_s/sleep"] > 0
        assert line["actor/grad_norm"] > 0 and line["actor/skipped_steps"] == 0
        assert 0 < line["rollout/logprob_diff_mean"] < MEAN_GAP
    exported, initial = (AutoModelForCausalLM.from_pretrained(p) for p in (tmp_path / "run/hf", model))
    assert not torch.equal(exported.model.layers[0].mlp.up_proj.weight, initial.model.layers[0].mlp.up_proj.weight)
