"""The real command on GPUs, with engines beside the trainer and on GPUs of their own.

The former sleep and use CUDA IPC, the latter NCCL.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.e2e.runs import arguments, metrics, train
from tests.models import make_tiny_qwen2

ACTOR, REF, ROLLOUT = (f"actor_rollout_ref__{role}" for role in ("actor", "ref", "rollout"))
MEAN_GAP = 0.05
"""Nats. Both round to bfloat16, in another order: .011 to .017 with the engine on the CPU. Weights
one update old would be .3 away, the random ones of the engine's start (`load_format=dummy`)
further."""
LORA = {"actor_rollout_ref__model__lora_rank": 4, f"{ACTOR}__optim__lr": 1e-2}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_qwen2(tmp_path_factory.mktemp("model"), tied=True, width=128)


def few_steps(
    folder: Path, model: Path, retriever: str, device: str, **more: Any
) -> list[dict[str, Any]]:
    """Metrics of two steps of GRPO in bfloat16, or as many as `more` says."""
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
        f"+{ROLLOUT}__engine_kwargs__kv_cache_memory_bytes": 2
        ** 28,  # more would be millions of blocks of a tiny model
        f"{ROLLOUT}__enforce_eager": "true",
    }
    status, output = train("grpo", arguments(folder, model, **settings | more))
    assert status == 0, output[-3000:]
    return metrics(folder)


@pytest.mark.gpu("vllm")
@pytest.mark.parametrize("more", [{}, LORA], ids=["all weights", "lora"])
def test_the_engine_samples_from_the_policy_that_is_trained(tmp_path, model, retriever, more):
    lines = few_steps(tmp_path, model, retriever, "cuda", **more)
    assert [line["training/global_step"] for line in lines] == [0, 1, 2]
    for line in lines[1:]:
        assert line["training/policy_version"] == line["training/global_step"]
        assert line["rollout/context_violations"] == 0 and line["timing_s/sleep"] > 0
        assert line["actor/grad_norm"] > 0 and line["actor/skipped_steps"] == 0
        assert 0 < line["rollout/logprob_diff_mean"] < MEAN_GAP
    exported, initial = (
        AutoModelForCausalLM.from_pretrained(p) for p in (tmp_path / "run/hf", model)
    )
    assert not torch.equal(
        exported.model.layers[0].mlp.up_proj.weight, initial.model.layers[0].mlp.up_proj.weight
    )


def separate(val_replicas: int) -> dict[str, Any]:
    """Engines on GPUs of their own, batches rolled out two steps ahead."""
    return {
        "actor_rollout_ref__hybrid_engine": "false",
        f"{ROLLOUT}__n_gpus_per_node": 1 + val_replicas,
        f"{ROLLOUT}__num_val_replicas": val_replicas,
        "async_training__max_staleness": 2,
        "algorithm__rollout_correction__rollout_is": "token",
        "trainer__total_training_steps": 6,
        "trainer__test_freq": 2,
    }


@pytest.mark.gpu("vllm")
@pytest.mark.parametrize("val_replicas", [0, 1])
def test_engines_on_gpus_of_their_own_roll_out_while_the_policy_is_trained(
    tmp_path, model, retriever, val_replicas
):
    if torch.cuda.device_count() < 2 + val_replicas:
        pytest.skip(f"needs {2 + val_replicas} CUDA devices")
    lines = few_steps(tmp_path, model, retriever, "cuda", **separate(val_replicas))
    trained = [line for line in lines if "actor/grad_norm" in line]
    assert [line["training/global_step"] for line in trained] == list(range(1, 7))
    # no update in between: only the transfer counts
    assert trained[0]["rollout/logprob_diff_mean"] < MEAN_GAP
    assert max(line["training/staleness/max"] for line in trained) == 2
    assert sorted(
        line["training/global_step"] for line in lines if "val/test_score/all" in line
    ) == [0, 2, 4, 6]
