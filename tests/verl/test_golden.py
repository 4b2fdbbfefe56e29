"""Five PPO steps on a fixed batch: their losses, committed. A change of them is a change of the
training."""

import json
from pathlib import Path

import pytest
import torch

from tests.distributed import run_ranks
from tests.verl.batches import make_model, ragged_batch
from verl.single_controller.worker import Worker
from verl.workers.actor import policy_loss
from verl.workers.config import ActorConfig, FSDPConfig, ModelConfig, OptimConfig
from verl.workers.forward import forward_log_probs
from verl.workers.fsdp_model import build_model, build_train_state
from verl.workers.update import Budget, map_micro_batches, update_mini_batches

GOLDEN = Path(__file__).parents[1] / "assets" / "five_steps.json"
KEYS = ("loss", "pg_loss", "kl_loss", "entropy", "grad_norm", "lr", "pg_clipfrac", "ppo_kl")
ACTOR = ActorConfig(use_kl_loss=True, kl_loss_coef=0.1, entropy_coeff=0.01)


def five_steps(model_path: str) -> list[dict[str, float]]:
    worker = Worker()
    fsdp = FSDPConfig(dtype="float32")
    model = build_model(
        ModelConfig(path=model_path, enable_gradient_checkpointing=False), "lm", fsdp, worker.mesh
    )
    state = build_train_state(model, OptimConfig(lr=1e-2, lr_warmup_steps_ratio=0.4), total_steps=5)
    batch = ragged_batch(torch.float32)
    batch = batch.with_tensors(mini_batch=torch.arange(len(batch)) % 2)
    batch.meta_info["num_mini_batches"] = {"mini_batch": 2}

    def loss_fn(rows, counts):
        log_probs, entropy = forward_log_probs(model, rows, 0.7, with_entropy=True)
        return policy_loss(ACTOR, log_probs, entropy, rows, counts)

    trace = []
    for _ in range(5):
        old = map_micro_batches(
            batch,
            Budget(1000, 4),
            worker.device,
            lambda rows: forward_log_probs(model, rows, 0.7, False)[0],
        )
        data = batch.with_tensors(old_log_probs=old)
        metrics = update_mini_batches(
            state, data, loss_fn, epochs=1, budget=Budget(1000, 4), grad_clip=1.0
        )
        trace.append({key: metrics[key] for key in KEYS})
    return trace


def test_five_steps(tmp_path):
    (trace,) = run_ranks(1, five_steps, make_model(tmp_path))
    assert len({step["loss"] for step in trace}) == 5
    for step, golden in zip(trace, json.loads(GOLDEN.read_text()), strict=True):
        assert step == pytest.approx(golden, rel=2e-3, abs=1e-5)
