"""Real ranks are given what the driver sends them, and nothing else: the columns that each method
declares."""

import pickle
from typing import Any

import torch

from tests.distributed import run_ranks
from tests.verl.batches import make_model, ragged_batch
from verl.protocol import DataProto
from verl.single_controller.decorator import dispatch, registered
from verl.single_controller.worker import Worker
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
from verl.workers.reference import ReferenceWorker

FSDP = FSDPConfig(dtype="float32")


def sent(worker: Worker, method: str, batch: DataProto) -> DataProto:
    """What this rank receives of the batch."""
    call = registered(type(worker))[method]
    arguments = dispatch(call.mode, worker.world_size, call.select(method, (batch,)))
    (mine,) = pickle.loads(pickle.dumps(arguments[worker.rank]))
    return mine


def every_method(model_path: str) -> dict[str, Any]:
    """The result of each method that gets rows, called as the driver calls it."""
    model = ModelConfig(path=model_path, enable_gradient_checkpointing=False)
    config = ActorConfig(use_kl_loss=True, optim=OptimConfig(lr=1e-3), fsdp_config=FSDP)
    actor = ActorWorker(model, config, RolloutConfig(), 10)
    reference = ReferenceWorker(model, RefConfig(fsdp_config=FSDP), temperature=1.0)
    critic = CriticWorker(CriticConfig(model=model, fsdp_config=FSDP), 10)
    batch = ragged_batch(torch.float32)
    batch.meta_info["rank_sizes"] = [11, 5]
    ones = torch.ones_like(batch.batch["advantages"])
    more = {"turns": ones.int(), "values": ones, "returns": 2 * ones, "rollout_is_weights": ones}
    batch = batch.with_tensors(**more)
    whole = dispatch(registered(ActorWorker)["compute_log_prob"].mode, actor.world_size, (batch,))[
        actor.rank
    ][0]
    return {
        "columns": sorted(sent(actor, "compute_log_prob", batch).batch),
        "of all columns": actor.compute_log_prob(whole).batch["old_log_probs"],
        "log_prob": actor.compute_log_prob(sent(actor, "compute_log_prob", batch)).batch[
            "old_log_probs"
        ],
        "entropy": actor.compute_entropy(sent(actor, "compute_entropy", batch)).batch["entropy"],
        "ref": reference.compute_ref_log_prob(sent(reference, "compute_ref_log_prob", batch)).batch[
            "ref_log_prob"
        ],
        "values": critic.compute_values(sent(critic, "compute_values", batch)).batch["values"],
        "actor": actor.update_actor(sent(actor, "update_actor", batch)),
        "critic": critic.update_critic(sent(critic, "update_critic", batch)),
    }


def test_the_declared_columns_suffice(tmp_path):
    for result, rows in zip(run_ranks(2, every_method, make_model(tmp_path)), (11, 5), strict=True):
        assert result["columns"] == ["attention_mask", "prompts", "response_mask", "responses"]
        assert torch.equal(result["log_prob"], result["of all columns"])
        assert torch.equal(result["log_prob"], result["ref"])
        assert (result["entropy"] >= 0).all() and (result["entropy"] > 0).any()
        assert len(result["entropy"]) == len(result["log_prob"]) == len(result["values"]) == rows
        assert result["actor"]["optimizer_steps"] == 1 and result["critic"]["optimizer_steps"] == 2
