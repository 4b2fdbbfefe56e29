"""One nccl rank: bfloat16 over float32 masters, checkpointing, compilation, offloading."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch.distributed.tensor import DTensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from tests.models import perturb
from verl.protocol import DataProto
from verl.single_controller.worker import Worker, init_process_group, seed_everything
from verl.workers.actor import ActorWorker
from verl.workers.config import ActorConfig, FSDPConfig, ModelConfig, OptimConfig, RolloutConfig
from verl.workers.forward import forward_log_probs
from verl.workers.fsdp_model import build_model

ROWS = 16
PROMPT = 32
RESPONSE = 480
VOCAB = 512
WIDTH = 256
LR = 1e-3
BFLOAT16 = 0.05
"""Largest share of a gradient that rounding may change. On the CPU bfloat16 changes .016 of it, and
the log-probs by .009 on average and .043 at most."""


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


def make_model(folder: Path) -> str:
    """A random Qwen2 that rounding does not throw off: its matrices shrink what they multiply."""
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    model = Qwen2ForCausalLM(config)
    perturb(model, seed=0, scale=0.03)
    model.save_pretrained(folder)
    return str(folder)


def on_rank(device: str, fn: Callable[..., Any], *args: Any) -> Any:
    """What `fn(*args)` returned in a process of its own, the only rank of its group."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (device, folder, fn, args))
        return torch.load(Path(folder) / "result.pt", weights_only=False)


def _rank(
    rank: int, device: str, folder: str, fn: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    init_process_group(rank, 1, torch.distributed.HashStore(), device, threads=1)
    seed_everything(0)
    torch.save(fn(*args), Path(folder) / "result.pt")
    torch.distributed.destroy_process_group()


def batch() -> DataProto:
    """Ragged rows of which 40 tokens in every 160 are trained.

    The others of a response are observations.
    """
    generator = torch.Generator().manual_seed(2)
    lengths = torch.randint(RESPONSE // 4, RESPONSE + 1, (ROWS, 1), generator=generator)
    column = torch.arange(RESPONSE).expand(ROWS, -1)
    real = column < lengths
    return DataProto.from_dict(
        {
            "prompts": torch.randint(0, VOCAB, (ROWS, PROMPT), generator=generator),
            "responses": torch.randint(0, VOCAB, (ROWS, RESPONSE), generator=generator),
            "attention_mask": torch.cat(
                [torch.ones(ROWS, PROMPT, dtype=torch.bool), real], dim=1
            ).long(),
            "response_mask": (real & (column % 160 < 40)).long(),
            "advantages": torch.randn(ROWS, 1, generator=generator)
            .expand(ROWS, RESPONSE)
            .contiguous(),
            "mini_batch": torch.zeros(ROWS, dtype=torch.long),
        },
        meta_info={"num_mini_batches": {"mini_batch": 1}},
    )


TRAINED = batch().batch["response_mask"].bool()


def gradient(
    path: str, dtype: str, checkpointing: bool = False, compiled: bool = False
) -> dict[str, Any]:
    """Log-probs and whole gradient of a batch, and the largest rise of GPU memory in bytes."""
    worker = Worker()
    config = ModelConfig(
        path=path, enable_gradient_checkpointing=checkpointing, use_torch_compile=compiled
    )
    model = build_model(config, "lm", FSDPConfig(model_dtype="float32", dtype=dtype), worker.mesh)
    data = batch().to(worker.device)
    on_gpu = worker.device.type == "cuda"
    for _ in range(2):  # the first brings workspaces, and compiles
        model.zero_grad()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() if on_gpu else 0
        log_probs, _ = forward_log_probs(model, data, 0.7, with_entropy=False)
        (log_probs * data.batch["advantages"]).sum().backward()
        rise = torch.cuda.max_memory_allocated() - before if on_gpu else 0
    masters = list(model.parameters())
    return {
        "log_probs": log_probs.detach().cpu(),
        "gradient": torch.cat([whole(p.grad).flatten().cpu() for p in masters]),
        "dtypes": {str(x.dtype) for p in masters for x in (p, p.grad)},
        "rise": rise,
    }


def whole(x: Any) -> torch.Tensor:
    return x.full_tensor()


@pytest.fixture(scope="module")
def exact(path):
    """In float32, on the CPU."""
    return on_rank("cpu", gradient, path, "float32")


@pytest.fixture(scope="module")
def plain(path):
    return on_rank("cuda", gradient, path, "bfloat16")


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Share of the norm."""
    return float((found - expected).norm() / expected.norm())


@pytest.mark.gpu
def test_half_precision_over_float32_masters_agrees_with_float32(exact, plain):
    assert plain["dtypes"] == {"torch.float32"}
    gap = (plain["log_probs"] - exact["log_probs"]).abs()[TRAINED]
    assert gap.mean() < 0.02 and gap.max() < 0.2
    assert distance(plain["gradient"], exact["gradient"]) < BFLOAT16


@pytest.mark.gpu
def test_checkpointing_takes_less_memory_and_leaves_the_gradient(path, exact, plain):
    found = on_rank("cuda", gradient, path, "bfloat16", True)
    assert found["rise"] < 0.6 * plain["rise"]
    assert distance(found["gradient"], plain["gradient"]) < 0.01
    assert distance(found["gradient"], exact["gradient"]) < BFLOAT16


@pytest.mark.gpu
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiling_leaves_the_gradient(path, exact, checkpointing):
    found = on_rank("cuda", gradient, path, "bfloat16", checkpointing, True)
    assert distance(found["gradient"], exact["gradient"]) < BFLOAT16


def updates(path: str, offload: dict[str, bool]) -> dict[str, Any]:
    """What two updates leave, and log-probs before and after them."""
    fsdp = FSDPConfig.model_validate(offload)
    config = ActorConfig(optim=OptimConfig(lr=LR), fsdp_config=fsdp, ppo_max_token_len_per_gpu=2048)
    actor = ActorWorker(ModelConfig(path=path), config, RolloutConfig(), 10)
    before = actor.compute_log_prob(batch())
    steps = [actor.update_actor(batch().union(before))["optimizer_steps"] for _ in range(2)]
    parameters = list(actor.state.model.parameters())
    moments = [
        value
        for state in actor.state.optimizer.state.values()
        for value in state.values()
        if value.dim()
    ]
    found = {
        "steps": steps,
        "parameters": places(parameters),
        "moments": places(moments),
        "moment_bytes": sum(m.numel() * m.element_size() for m in moments),
        "allocated": torch.cuda.memory_allocated() if actor.device.type == "cuda" else 0,
    }
    after = actor.compute_log_prob(batch())
    return found | {"before": before.batch["old_log_probs"], "after": after.batch["old_log_probs"]}


def places(tensors: list[torch.Tensor]) -> set[str]:
    """Where the shards are."""
    return {(t.to_local() if isinstance(t, DTensor) else t).device.type for t in tensors}


@pytest.fixture(scope="module")
def resident(path):
    return on_rank("cuda", updates, path, {})


@pytest.mark.gpu
def test_nothing_leaves_the_gpu_unasked(resident):
    assert resident["steps"] == [1, 1] and resident["parameters"] == resident["moments"] == {"cuda"}
    assert (resident["after"] - resident["before"])[TRAINED].abs().mean() > 0.3


@pytest.mark.gpu
@pytest.mark.parametrize("option", ["optimizer_offload", "param_offload"])
def test_what_is_offloaded_waits_on_the_host_and_learns_the_same(path, resident, option):
    found = on_rank("cuda", updates, path, {option: True})
    assert found["steps"] == [1, 1] and found["moments"] == {"cpu"}
    assert found["parameters"] == {"cuda" if option == "optimizer_offload" else "cpu"}
    assert found["allocated"] < resident["allocated"] - 0.9 * found["moment_bytes"]
    assert (found["after"] - resident["after"])[TRAINED].abs().mean() < 0.03
