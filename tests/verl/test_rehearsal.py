"""A training step of the paper's recipes on eight cards that are not there (`tests/fake_card`).

Real: the composed configuration, the driver, the trainer's ranks on fake CUDA tensors of real
widths, `VLLMServer`, vLLM's weight transfer. Not there: numbers, kernels, NCCL, CUDA IPC, the
engine's model.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.fake_card import card
from tests.fake_card.rehearse import OBSERVATION, PROMPT, SHAPES, TURN, TURNS, WORLD

ROOT = Path(__file__).parents[2]
LAYERS = 2
"""Of real width; a layer more adds the same again to time and memory."""
ACTOR, REF, ROLLOUT = (f"actor_rollout_ref.{role}" for role in ("actor", "ref", "rollout"))
TENSOR_PARALLEL = f"{ROLLOUT}.tensor_model_parallel_size=2"
OFFLOAD = [f"{role}.fsdp_config.param_offload=true" for role in (ACTOR, REF)]
CASES: dict[str, dict[str, Any]] = {
    "3b-ppo": {"recipe": "qwen2.5-3b-ppo"},
    "3b-grpo, TP 2": {"recipe": "qwen2.5-3b-grpo", "overrides": [TENSOR_PARALLEL]},
    "7b-ppo, TP 2": {"recipe": "qwen2.5-7b-ppo", "overrides": [TENSOR_PARALLEL]},
    "7b-grpo": {"recipe": "qwen2.5-7b-grpo"},
    "offload": {"recipe": "qwen2.5-3b-grpo", "overrides": OFFLOAD},
    "own GPUs, offload, TP 2": {
        "recipe": "qwen2.5-3b-grpo",
        "separate": True,
        "overrides": [
            *OFFLOAD,
            TENSOR_PARALLEL,
            "actor_rollout_ref.hybrid_engine=false",
            f"{ROLLOUT}.n_gpus_per_node={WORLD}",
        ],
    },
    "an engine dies": {"recipe": "qwen2.5-3b-grpo", "dies_at": [1, "update"]},
}
RECIPES = ["3b-ppo", "3b-grpo, TP 2", "7b-ppo, TP 2", "7b-grpo"]
COLOCATED = [*RECIPES, "offload"]
pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None or torch.version.cuda is not None,
    reason="needs g++, and a torch without CUDA, whose place the stand-in takes",
)


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, Any]:
    """What happened in each case."""
    folder = tmp_path_factory.mktemp("rehearsal")
    command = [
        sys.executable,
        str(ROOT / "tests/fake_card/rehearse.py"),
        str(card.build(folder)),
        str(folder),
    ]
    command += [json.dumps({"layers": LAYERS, **case}) for case in CASES.values()]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {
        name: json.loads((folder / f"{number}.json").read_text())
        for number, name in enumerate(CASES)
    }


@pytest.fixture
def case(found, request) -> Any:
    result = found[request.param]
    assert "error" not in result, result["error"]
    return SimpleNamespace(name=request.param, **result)


def of(case: Any, *who: str) -> list[str]:
    return [what for by, what in case.events if by in who]


@pytest.mark.parametrize("case", COLOCATED, indirect=True)
def test_the_calls_of_a_step_are_in_order(case):
    happened = of(case, "rank", "engine 0")
    calls = [
        what
        for what in happened
        if not what.endswith(" done") and what not in ("barrier", "all_gather_object")
    ]
    chunks = calls[calls.index("start_update") : calls.index("finish_update")].count("update")
    sync = [
        "actor.free_cached_memory",
        "empty_cache",
        "wake weights",
        "pause",
        "actor.send_weights",
        "start_update",
    ]
    sync += ["update"] * chunks
    sync += ["finish_update", "actor.free_cached_memory", "empty_cache", "wake kv_cache"]
    sync += ["reset_prefix_cache", "resume"]
    ppo = "ppo" in case.name
    roles = ["build actor", "build ref", *["build critic"] * ppo]
    step = ["sleep 2", "actor.compute_log_prob", "ref.compute_ref_log_prob"]
    step += ["critic.compute_values", "critic.update_critic"] * ppo
    step += ["actor.update_actor"]
    assert calls == [*roles, "start", "actor.connect_engines", "init_transfer", *sync, *step, *sync]


@pytest.mark.parametrize("case", [*COLOCATED, "own GPUs, offload, TP 2"], indirect=True)
def test_all_engines_do_the_same(case):
    names = sorted({by for by, _ in case.events if by.startswith("engine")})
    assert len(names) == (WORLD // 2 if "TP 2" in case.name else WORLD)
    assert len({tuple(of(case, name)) for name in names}) == 1


@pytest.mark.parametrize("case", COLOCATED, indirect=True)
def test_every_message_of_the_training_is_on_the_card(case):
    """And of the dtypes that were meant. With offload the norm of the gradient is summed on the
    host: some bytes."""
    host = {key: size for key, size in case.collectives.items() if " cpu " in key}
    assert all(size < 2**20 for size in host.values()), host
    assert bool(host) == (case.name == "offload")
    gathered = {
        key.split()[2] for key in case.collectives if key.startswith("c10d::_allgather_base_")
    }
    reduced = {
        key.split()[2] for key in case.collectives if key.startswith("c10d::_reduce_scatter_base_")
    }
    assert gathered == {"bfloat16"} and reduced == {"float32"}


@pytest.mark.parametrize("case", COLOCATED, indirect=True)
def test_masters_are_float32_and_lie_where_the_recipe_says(case):
    place = "cpu" if case.name == "offload" else "cuda"
    trained = ["actor", *["critic"] * ("ppo" in case.name)]
    assert case.parameters == {"ref": [f"{place} bfloat16"]} | {
        role: [f"{place} float32"] for role in trained
    }
    # the recipe's optimizer_offload
    rests = "cpu" if case.name in ("offload", "7b-ppo, TP 2") else "cuda"
    assert case.moments == {role: [f"{rests} float32"] for role in trained}


def published(size: str) -> list[list[Any]]:
    """Names and shapes of the checkpoint of that size, as Qwen publishes it."""
    s = SHAPES[size]
    hidden = s["hidden_size"]
    wide = s["intermediate_size"]
    vocabulary = s["vocab_size"]
    keys = hidden // s["num_attention_heads"] * s["num_key_value_heads"]
    layer = {
        "input_layernorm.weight": [hidden],
        "post_attention_layernorm.weight": [hidden],
        "mlp.gate_proj.weight": [wide, hidden],
        "mlp.up_proj.weight": [wide, hidden],
        "mlp.down_proj.weight": [hidden, wide],
        "self_attn.q_proj.weight": [hidden, hidden],
        "self_attn.q_proj.bias": [hidden],
        "self_attn.k_proj.weight": [keys, hidden],
        "self_attn.k_proj.bias": [keys],
        "self_attn.v_proj.weight": [keys, hidden],
        "self_attn.v_proj.bias": [keys],
        "self_attn.o_proj.weight": [hidden, hidden],
    }
    whole = {"model.embed_tokens.weight": [vocabulary, hidden], "model.norm.weight": [hidden]}
    if not s["tie_word_embeddings"]:
        whole["lm_head.weight"] = [vocabulary, hidden]
    whole |= {
        f"model.layers.{i}.{name}": shape for i in range(LAYERS) for name, shape in layer.items()
    }
    return sorted([name, shape, "torch.bfloat16"] for name, shape in whole.items())


@pytest.mark.parametrize("case", list(CASES), indirect=True)
def test_every_engine_process_receives_every_weight_once(case):
    assert sorted(case.received) == [f"GPU-{gpu}" for gpu in range(WORLD)]
    expected = published(CASES[case.name]["recipe"].split("-")[1])
    for gpu, weights in case.received.items():
        assert weights == expected, gpu


@pytest.mark.parametrize("case", RECIPES, indirect=True)
def test_the_card_holds_what_the_estimate_says(case):
    """Peaks of the first rank, in GiB; the rehearsal raises where trainer, its cache and the engine
    exceed the card."""
    peaks = {
        what.removeprefix("rank ").removesuffix(" done"): peak
        for what, _, _, peak, _ in case.timeline
    }
    log_probs = max(value for name, value in peaks.items() if ".compute_" in name)
    assert 0.75 < log_probs / case.estimate["log-probs"] < 1.05
    for role in ("actor", *["critic"] * ("ppo" in case.name)):
        assert peaks[f"{role}.update_{role}"] == pytest.approx(
            case.estimate[f"{role} update"], rel=0.1
        )
    what, allocated, _, _, engine = case.timeline[-1]
    assert what.endswith("resume") and allocated + engine == pytest.approx(
        case.estimate["rollout"], rel=0.01
    )


@pytest.mark.parametrize("case", COLOCATED, indirect=True)
def test_engines_have_memory_only_while_they_are_awake(case):
    asleep = [
        engine for what, *_, engine in case.timeline if "compute_" in what or "update_" in what
    ]
    assert asleep and set(asleep) == {0.0}
    (start,) = (engine for what, *_, engine in case.timeline if what == "engine 0 start")
    assert start == pytest.approx(0.6 * 80, abs=0.01)


@pytest.mark.parametrize("case", ["an engine dies"], indirect=True)
def test_an_engine_that_dies_in_a_transfer_is_replaced_and_takes_the_weights(case):
    died = of(case, "engine 1").index("update")
    after = of(case, "engine 1")[died + 1 :]
    assert after[0] == "start" and after.index("pause") < after.index("start_update") < after.index(
        "resume"
    )
    assert of(case, "engine 0")[-1] == of(case, "engine 1")[-1] == "resume"


def test_what_torch_freed_is_not_an_engines_before_the_cache_is_emptied():
    memory = card.Memory(10, 1)
    memory.sizes = {1: 6}
    memory.allocated = 6
    memory.reserved = 6
    memory._forget(1)
    assert memory.allocated == 0 and memory.free == 3
    with pytest.raises(card.OutOfMemory, match="weights"):
        memory.take("weights", 4)
    memory.empty_cache()
    memory.take("weights", 4)
    with pytest.raises(card.OutOfMemory):
        memory.note(torch.empty(6, dtype=torch.uint8).untyped_storage())


def test_trajectories_fill_a_micro_batch():
    length = PROMPT + TURNS * TURN + (TURNS - 1) * OBSERVATION
    assert 0.9 * 16_384 < 3 * length <= 16_384 and 0.45 < TURNS * TURN / length < 0.55
