"""The time of a step: FLOPs against torch's own count, verbs by hand, and the command."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen3Config, Qwen3ForCausalLM

from verl.estimate.assumptions import Gpu, default_assumptions
from verl.estimate.flops import forward_flops, update_flops
from verl.estimate.memory import GIB, Pass, Role, Sizes
from verl.estimate.sizing import Longest
from verl.estimate.step_time import (
    Batch,
    StepTime,
    main,
    num_validations,
)
from verl.workers.config import FSDPConfig, RolloutConfig

SHAPES = Path(__file__).resolve().parents[2] / "scripts" / "bench" / "model_shapes.json"
SIZES = Sizes(
    params=1_000, layer=200, layers=3, hidden=4, queries=4, keys=2, intermediate=8, vocab=50
)
ROLE = Role("actor", SIZES, 1_000, FSDPConfig(), 2, Pass(30, 10, ""), Pass(20, 10, ""))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_flops_as_torch_counts_them(checkpointing):
    """Torch counts the masked half of the attention too, which kernels for causal attention leave
    out."""
    config = Qwen3Config(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=500,
        attn_implementation="eager",
    )
    rows = 2
    length = 40
    trained = 10
    tokens = rows * length
    sizes = Sizes(0, 0, 3, hidden=64, queries=128, keys=64, intermediate=96, vocab=500)
    model = Qwen3ForCausalLM(config)
    ids = torch.zeros(rows, length, dtype=torch.long)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    with FlopCounterMode(display=False) as forward:
        logits = model(ids, use_cache=False, logits_to_keep=trained).logits
    masked_half = tokens * 3 * 2 * sizes.queries * length
    assert (
        forward.get_total_flops()
        == forward_flops(sizes, tokens, rows * trained, length) + masked_half
    )
    with FlopCounterMode(display=False) as backward:
        logits.sum().backward()
    role = replace(ROLE, sizes=sizes, trained=0, checkpointing=checkpointing)
    assert role.whole
    passes = 3 + checkpointing
    counted = forward.get_total_flops() + backward.get_total_flops()
    assert counted == update_flops(role, tokens, rows * trained, length) + passes * masked_half


def test_adapters_need_no_gradient_of_the_weights():
    whole, adapters = (update_flops(replace(ROLE, trained=n), 100, 10, 20) for n in (1_000, 60))
    assert whole - adapters == forward_flops(SIZES, 100, 10, 20)


def config(**trainer):
    actor = SimpleNamespace(
        state_masking=True, ppo_epochs=1, ppo_mini_batch_size=8, ppo_max_token_len_per_gpu=2_000
    )
    rollout = RolloutConfig(n=4, gpu_memory_utilization=0.5)
    return SimpleNamespace(
        data=SimpleNamespace(train_batch_size=4),
        actor_rollout_ref=SimpleNamespace(actor=actor, rollout=rollout, hybrid_engine=True),
        trainer=SimpleNamespace(nnodes=1, n_gpus_per_node=2, **trainer),
        uses_greedy=False,
    )


def step(role=ROLE, **assumptions):
    values = vars(default_assumptions()) | assumptions
    longest = Longest(5_000, 0.5, "", 4, 2_500)
    return StepTime(config(), [role], longest, Gpu(1e9, 1e9, 10 * GIB), SimpleNamespace(**values))


def test_tokens_by_hand():
    found = step()
    assert found.mean_tokens == 250 + 250 + 2 * 400
    assert (found.batch, found.tokens, found.trained_tokens) == (Batch(16, 4), 16 * 1_300, 16 * 250)


def test_a_greedy_trajectory_of_each_prompt_is_rolled_out_and_not_trained():
    found = step()
    assert found.rolled_out == found.batch
    found.config.uses_greedy = True
    assert found.batch == Batch(16, 4) and found.rolled_out == Batch(20, 4)


def test_a_forward_verb_by_hand():
    found = step(train_efficiency=0.5)
    flops = forward_flops(SIZES, 16 * 1_300, 16 * 250, 1_300)
    assert found.forward("ref", ROLE, 30_000).seconds == pytest.approx(flops / (2 * 1e9 * 0.5))


def test_offload_by_hand():
    """16 trajectories on 2 ranks in 2 mini-batches: 5,200 tokens of a rank in each, so 3
    micro-batches of 2,000."""
    offloaded = replace(ROLE, fsdp=FSDPConfig(param_offload=True))
    found = step(offloaded, pcie_gb_per_s=1e-6, host_adamw_gb_per_s=1e-6)
    flops = found.computing(update_flops(ROLE, 16 * 1_300, 16 * 250, 1_300))[0]
    shard = 4 * 1_000 / 2
    seconds = found.update("update_actor", offloaded, found.config.actor_rollout_ref.actor).seconds
    assert seconds == pytest.approx(flops + 6 * (2 * shard + shard) / 1e3 + 2 * 7 * shard / 1e3)
    resting = replace(ROLE, fsdp=FSDPConfig(optimizer_offload=True))
    found = step(resting, pageable_gb_per_s=1e-6)
    seconds = found.update("update_actor", resting, found.config.actor_rollout_ref.actor).seconds
    on_gpu = 2 * 7 * shard / (1e9 * 0.6)
    assert seconds == pytest.approx(flops + on_gpu + 4 * shard / 1e3)


def test_a_sync_by_hand():
    found = step(nvlink_gb_per_s=1e-6, sync_overhead_s=2.0)
    assert found.sync().seconds == pytest.approx(4 * 1_000 / 2 / 1e3 + 2.0)


def test_the_retriever_bounds_the_rollout():
    fast, slow = (
        step(retriever_queries_per_s=rate).rollout_seconds(Batch(16, 4))[0] for rate in (1e9, 1.0)
    )
    (decoding, faster) = (
        step(engine_tokens_per_s=rate).engine_rate(8, 1_300) for rate in (100.0, 200.0)
    )
    assert slow > 32 > fast and (decoding, faster) == (100.0, 200.0)


def test_an_engine_is_bound_by_memory_or_by_its_products():
    """A trajectory reads 2,000 bytes of weights and 24 bytes a token of its context in a step."""
    rate = step(bandwidth_efficiency=0.5, prefill_efficiency=1e3, engine_step_ms=0.0).engine_rate(
        4, 100
    )
    assert rate == pytest.approx(4 / ((2_000 + 4 * 100 * 24) / 5e8))
    rate = step(prefill_efficiency=1e-3, engine_step_ms=0.0).engine_rate(4, 100)
    assert rate == pytest.approx(4 / (forward_flops(SIZES, 4, 4, 100) / 1e6))


@pytest.mark.parametrize(
    ("test_freq", "before", "expected"),
    [(50, True, 22), (50, False, 21), (-1, True, 2), (201, True, 6)],
)
def test_validations_of_a_run(test_freq, before, expected):
    trainer = {"total_training_steps": 1_005, "test_freq": test_freq, "val_before_train": before}
    assert num_validations(config(**trainer)) == expected


def test_the_command(capsys):
    arguments = [
        "--config-name",
        "ppo",
        "experiment=nq_hotpotqa/qwen2.5-3b-ppo",
        "--shapes",
        str(SHAPES),
    ]
    assert main([*arguments, "--gpu", "h200", "--val-questions", "3125"]) == 0
    lines = capsys.readouterr().out.splitlines()
    seconds = {line[:16].strip(): float(line[16:24]) for line in lines[1:-1]}
    verbs = [
        "gen",
        "old_log_prob",
        "ref",
        "values",
        "update_critic",
        "update_actor",
        "update_weights",
        "sleep",
    ]
    assert list(seconds) == [*verbs, "prepare, adv", "step", "testing"]
    testing = seconds.pop("testing")
    assert (
        2 * seconds.pop("step") == pytest.approx(sum(seconds.values()) * 2, abs=1.0) and testing > 0
    )
    assert lines[0].startswith(
        "Qwen/Qwen2.5-3B on 8 GPUs: 512 trajectories of 1,300 tokens, 19% of them trained"
    )
    assert "1,005 steps" in lines[-1] and "22 validations" in lines[-1]


def test_overlapping_schedules_are_refused(capsys):
    with pytest.raises(SystemExit):
        main(["experiment=nq_hotpotqa/qwen2.5-3b-grpo", "actor_rollout_ref.hybrid_engine=false"])
    assert "hybrid_engine=true" in capsys.readouterr().err
