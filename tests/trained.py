"""Run folders with real checkpoints: sharded ranks, no driver."""

import json
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from tests.distributed import run_ranks
from tests.verl.batches import ragged_batch
from verl.single_controller.decorator import Dispatch, dispatch
from verl.utils.run_folder import complete, mark_best, pending_folder
from verl.workers.actor import ActorWorker
from verl.workers.config import ActorConfig, FSDPConfig, ModelConfig, OptimConfig, RolloutConfig


def make_run(root: Path, model: ModelConfig, ranks: int = 2, lr: float = 1e-2) -> torch.Tensor:
    """Writes a run of two steps: the first is the best, the second raised an alarm.

    `hf` is the trainer's own export of the last step. Returns the log-probs of `ragged_batch` after
    it.
    """
    root.mkdir(parents=True)
    section = {"actor_rollout_ref": {"model": model.model_dump()}}
    (root / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(section)))
    return run_ranks(ranks, _train, str(root), model, lr)[0]


def _train(root: str, model: ModelConfig, lr: float) -> torch.Tensor:
    optim = OptimConfig(lr=lr, weight_decay=0.0)
    actor = ActorWorker(
        model,
        ActorConfig(optim=optim, fsdp_config=FSDPConfig(dtype="float32")),
        RolloutConfig(),
        10,
    )
    batch = ragged_batch(torch.float32)
    (mine,) = dispatch(Dispatch.DP_COMPUTE_PROTO, actor.world_size, (batch,))[actor.rank]
    for step in (1, 2):
        actor.update_actor(mine)
        actor.save_checkpoint(f"{pending_folder(root, step)}/actor")
        if actor.rank == 0:
            complete(root, step)
            mark_best(root, step, "val/em", 1 / step)
        torch.distributed.barrier()
    actor.save_checkpoint(f"{root}/alarms/step_2/actor")
    actor.save_pretrained(f"{root}/hf", "global_step_2")
    return actor.compute_log_prob(batch).batch["old_log_probs"]


def edit_json(path: Path, **changes: Any) -> None:
    """Sets entries of a JSON file; None takes one out."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
