"""An actor and a critic of one process, and their checkpoints."""

from collections.abc import Sequence
from typing import Any

from verl.workers.actor import ActorWorker
from verl.workers.config import ActorConfig, FSDPConfig, ModelConfig, OptimConfig, RolloutConfig
from verl.workers.critic import CriticConfig, CriticWorker

OPTIM = OptimConfig(lr=1e-2, lr_warmup_steps_ratio=0.5)
Workers = tuple[ActorWorker, CriticWorker]


def build(
    path: str, lora_rank: int = 0, offload: bool = False, optim: OptimConfig = OPTIM
) -> Workers:
    model = ModelConfig(path=path, lora_rank=lora_rank, enable_gradient_checkpointing=False)
    fsdp = FSDPConfig(dtype="float32", optimizer_offload=offload)
    actor = ActorWorker(model, ActorConfig(optim=optim, fsdp_config=fsdp), RolloutConfig(), 10)
    return actor, CriticWorker(CriticConfig(model=model, optim=optim, fsdp_config=fsdp), 10)


def save(workers: Sequence[Any], root: str, asynchronous: bool = False) -> None:
    for worker, role in zip(workers, ("actor", "critic"), strict=False):
        worker.save_checkpoint(f"{root}/{role}", asynchronous)
