"""The gradient of a mini-batch depends on neither micro-batch size nor the number of ranks, nor on who holds what."""

from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from tests.distributed import run_ranks
from tests.verl.batches import VOCAB, ragged_batch
from verl.single_controller.decorator import Dispatch, dispatch
from verl.single_controller.worker import Worker
from verl.workers.actor import policy_loss
from verl.workers.config import ActorConfig, FSDPConfig, ModelConfig
from verl.workers.forward import forward_log_probs
from verl.workers.fsdp_model import TrainState, build_model
from verl.workers.update import Budget, update_mini_batches

ACTOR = ActorConfig(use_kl_loss=True, kl_loss_coef=0.1, entropy_coeff=0.01)


def make_model(path: Path) -> str:
    """Folder of a random Qwen2 with a tied head."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


class Recorder(torch.optim.SGD):
    """Keeps the whole gradients instead of stepping."""

    def step(self, closure=None):
        self.seen = [p.grad.full_tensor().clone() for g in self.param_groups for p in g["params"]]


def gradients(model_path: str, cases: list[tuple]) -> list[tuple[list[torch.Tensor], dict]]:
    return [gradient(model_path, *case) for case in cases]


def gradient(model_path: str, dtype: str, micro: int, sizes: list[int] | None) -> tuple[list[torch.Tensor], dict]:
    worker = Worker()
    fsdp = FSDPConfig.model_construct(model_dtype=dtype, dtype=dtype, param_offload=False, reshard_after_forward=True)
    model = build_model(ModelConfig(path=model_path, enable_gradient_checkpointing=False), "lm", fsdp, worker.mesh)
    optimizer = Recorder(model.parameters(), lr=1.0)
    state = TrainState(model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0))
    batch = ragged_batch(getattr(torch, dtype))
    if sizes is not None:
        batch.meta_info["rank_sizes"] = sizes
    (mine,) = dispatch(Dispatch.DP_COMPUTE_PROTO, worker.world_size, (batch,))[worker.rank]

    def loss_fn(rows, counts):
        log_probs, entropy = forward_log_probs(model, rows, 1.0, with_entropy=True)
        return policy_loss(ACTOR, log_probs, entropy, rows, counts)

    metrics = update_mini_batches(state, mine, loss_fn, epochs=1, budget=Budget(1000, micro), grad_clip=1e9)
    return optimizer.seen, metrics


@pytest.fixture(scope="module")
def all_gradients(model_path):
    """By dtype: one rank with micro-batches of 16, 4, 1; two ranks with equal and unequal shares."""
    one, two = [(16, None), (4, None), (1, None)], [(4, None), (4, [11, 5]), (1, [15, 1])]
    dtypes = ("float32", "float64")
    results = [
        run_ranks(ranks, gradients, model_path, [(dtype, *case) for dtype in dtypes for case in cases])[0]
        for ranks, cases in ((1, one), (2, two))
    ]
    return {dtype: [r for result in results for r in result[3 * i : 3 * i + 3]] for i, dtype in enumerate(dtypes)}


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-10)])
def test_gradient_ignores_micro_batches_and_ranks(all_gradients, dtype, tolerance):
    (reference, metrics), *others = all_gradients[dtype]
    scale = torch.stack([g.abs().max() for g in reference]).max()
    assert scale > 1e-3
    for grads, other_metrics in others:
        for a, b in zip(reference, grads, strict=True):
            assert float((a - b).abs().max() / scale) <= tolerance
        assert other_metrics == pytest.approx(metrics, rel=1e-4, abs=1e-6)


def diverging_step(model_path: str) -> tuple[float, bool]:
    worker = Worker()
    fsdp = FSDPConfig(model_dtype="float32", dtype="float32")
    model = build_model(ModelConfig(path=model_path, enable_gradient_checkpointing=True), "lm", fsdp, worker.mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    state = TrainState(model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0))
    before = [p.full_tensor().clone() for p in model.parameters()]
    batch = ragged_batch(torch.float32)
    batch.batch["advantages"][0, 0] = torch.nan  # on one rank only
    (mine,) = dispatch(Dispatch.DP_COMPUTE_PROTO, worker.world_size, (batch,))[worker.rank]

    def loss_fn(rows, counts):
        log_probs, entropy = forward_log_probs(model, rows, 1.0, with_entropy=True)
        return policy_loss(ACTOR, log_probs, entropy, rows, counts)

    metrics = update_mini_batches(state, mine, loss_fn, epochs=1, budget=Budget(24), grad_clip=1.0)
    same = all(torch.equal(a, p.full_tensor()) for a, p in zip(before, model.parameters(), strict=True))
    return metrics["skipped_steps"], same


def test_nan_on_one_rank_skips_the_step_on_all(model_path):
    assert run_ranks(2, diverging_step, model_path) == [(1.0, True), (1.0, True)]
