"""Adapters: only they learn, and what is exported and synced is the merged policy under plain
names."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tests.distributed import run_ranks
from tests.models import make_tiny_qwen2
from tests.verl.batches import ragged_batch
from verl.single_controller.decorator import Dispatch, dispatch
from verl.utils.errors import ConfigError
from verl.workers.actor import ActorWorker
from verl.workers.config import ActorConfig, FSDPConfig, ModelConfig, OptimConfig, RolloutConfig
from verl.workers.critic import CriticConfig, CriticWorker
from verl.workers.forward import forward_log_probs
from verl.workers.fsdp_model import full_parameters
from verl.workers.lora import add_adapters, merged

FLOAT32 = FSDPConfig(model_dtype="float32", dtype="float32")
OPTIM = OptimConfig(lr=1e-2, weight_decay=0.0)


def two_steps(path: str, out: str) -> dict:
    """What two updates of actor and critic on a share of the batch leave behind."""
    model = ModelConfig(path=path, lora_rank=4, lora_alpha=8)
    actor = ActorWorker(model, ActorConfig(optim=OPTIM, fsdp_config=FLOAT32), RolloutConfig(), 10)
    critic = CriticWorker(CriticConfig(model=model, optim=OPTIM, fsdp_config=FLOAT32), 10)
    batch = ragged_batch(torch.float32)
    batch = batch.with_tensors(
        returns=batch.batch["advantages"], values=torch.zeros_like(batch.batch["advantages"])
    )
    (mine,) = dispatch(Dispatch.DP_COMPUTE_PROTO, actor.world_size, (batch,))[actor.rank]
    values = [critic.update_critic(mine)["loss"] for _ in range(3)]
    before = actor.compute_log_prob(batch).batch["old_log_probs"]
    for _ in range(2):
        actor.update_actor(mine)
    actor.save_pretrained(out)
    actor.save_checkpoint(out + "/checkpoint")
    trained = {n.split(".")[-3] for n, p in actor.state.model.named_parameters() if p.requires_grad}
    log_probs = forward_log_probs(actor.state.model, batch, 1.0, with_entropy=False)[0].detach()
    restored = ActorWorker(
        model, ActorConfig(optim=OPTIM, fsdp_config=FLOAT32), RolloutConfig(), 10
    )
    restored.load_checkpoint(out + "/checkpoint")
    return {
        "before": before,
        "after": log_probs,
        "trained": trained,
        "values": values,
        "describe": actor.describe(),
        "plain": dict(full_parameters(actor.state.model)),
        "restored": dict(full_parameters(restored.state.model)),
    }


def test_only_adapters_learn_and_the_merged_policy_is_exported(tmp_path):
    path = make_tiny_qwen2(tmp_path / "model", tied=True, vocab=300)
    out = tmp_path / "out"
    found, _ = run_ranks(2, two_steps, str(path), str(out))
    assert (
        found["trained"] == {"lora_A", "lora_B"}
        and "trained, attention packed" in found["describe"]
    )
    assert found["values"][-1] < found["values"][0]
    assert (found["after"] - found["before"]).abs().max() > 0.01

    initial, exported = (AutoModelForCausalLM.from_pretrained(p) for p in (path, out))
    batch = ragged_batch(torch.float32)
    assert set(found["plain"]) == {name for name, _ in initial.named_parameters()}
    for name, tensor in exported.named_parameters():
        torch.testing.assert_close(tensor, found["plain"][name])
        torch.testing.assert_close(found["restored"][name], found["plain"][name])
        adapted = name.endswith("proj.weight")
        assert torch.equal(tensor, initial.get_parameter(name)) != adapted, name
    torch.testing.assert_close(alone(exported, batch), found["after"], atol=1e-4, rtol=1e-4)


def alone(model: torch.nn.Module, data) -> torch.Tensor:
    """Log-probs of a plain model."""
    return forward_log_probs(model.eval(), data, 1.0, with_entropy=False)[0].detach()  # pyright: ignore


def test_merging_is_what_peft_merges(tmp_path: Path):
    path = make_tiny_qwen2(tmp_path, vocab=300)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(path),
        LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=6, target_modules="all-linear"),
    )
    for name, parameter in model.named_parameters():
        if ".lora_B" in name:
            torch.nn.init.normal_(parameter)
    ours = {
        k: v.clone() for k, v in merged(dict(model.named_parameters()), 3.0, lambda x: x.detach())
    }
    theirs = dict(model.merge_and_unload().named_parameters())
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name].detach())


def test_adapters_that_cannot_be_merged_are_refused(tmp_path: Path):
    model = AutoModelForCausalLM.from_pretrained(make_tiny_qwen2(tmp_path, vocab=300))
    config = ModelConfig(path=str(tmp_path), lora_rank=2, target_modules=["q_proj", "lm_head"])
    with pytest.raises(ConfigError, match=r"target_modules=.*lm_head.*only layers"):
        add_adapters(model, config)
