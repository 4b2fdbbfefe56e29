"""The estimate of GPU memory: hand-computed bytes, what each switch takes away, and the real code's
own count."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import Qwen2Config
from transformers.models.qwen2 import modeling_qwen2 as qwen2
from transformers.models.qwen3 import modeling_qwen3 as qwen3

from verl.estimate import engine_memory, memory
from verl.estimate.engine_memory import retriever_memory
from verl.estimate.memory import (
    GIB,
    Pass,
    Role,
    Sizes,
    infer_moments,
    layer_saved,
    peak,
    resident,
    update_moments,
)
from verl.estimate.report import main, verdict
from verl.estimate.sizing import load_shapes, longest_trajectory, read_model
from verl.utils.errors import ConfigError
from verl.utils.torch_functional import CHUNK_ELEMENTS
from verl.workers.config import FSDPConfig, ModelConfig, RolloutConfig

ROOT = Path(__file__).resolve().parents[2]
SIZES = Sizes(
    params=1_000, layer=200, layers=3, hidden=4, queries=4, keys=2, intermediate=8, vocab=50
)
ENGINE = ("engine", engine_memory.KV_CACHE)
ROLE = Role(
    "actor", SIZES, 1_000, FSDPConfig(), 2, Pass(30, 10, "infer.key"), Pass(20, 10, "update.key")
)
QWEN_7B = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "tie_word_embeddings": False,
    "max_position_embeddings": 32768,
}


def fsdp(role: Role, **changes) -> Role:
    return replace(role, fsdp=role.fsdp.model_copy(update=changes))


def test_what_a_layer_saves_by_hand():
    """Two norms: 2 x 4 float32, and 4 x 4 numbers; q and output 2 x 4, k and v 2 x 2; gate, act,
    up, product 4 x 8."""
    assert layer_saved(SIZES, 2) == 2 * 16 + 2 * (16 + 8 + 4 + 32)
    assert layer_saved(SIZES, 4) == 2 * 16 + 4 * (16 + 8 + 4 + 32)
    assert layer_saved(replace(SIZES, head_norms=True), 2) - layer_saved(SIZES, 2) == (4 + 2) * (
        4 + 2
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kv", [1, 4])
@pytest.mark.parametrize("family", [qwen2, qwen3])
def test_what_a_layer_saves_as_autograd_has_it(family, dtype, kv):
    name, heads = ("Qwen3", True) if family is qwen3 else ("Qwen2", False)
    config = getattr(family, f"{name}Config")(
        hidden_size=128,
        intermediate_size=320,
        num_attention_heads=4,
        num_key_value_heads=kv,
        head_dim=32,
    )
    config._attn_implementation = "sdpa"
    layer = getattr(family, f"{name}DecoderLayer")(config, 0).to(dtype)
    tokens = 64
    sizes = {}
    x = torch.randn(1, tokens, 128, dtype=dtype, requires_grad=True)
    rotary = getattr(family, f"{name}RotaryEmbedding")(config)(x, torch.arange(tokens)[None])
    others = {t.untyped_storage().data_ptr() for t in (*layer.parameters(), *rotary)}

    def pack(t):
        sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = layer(x, position_embeddings=rotary, attention_mask=None)
    saved = sum(size for at, size in sizes.items() if at not in others) / tokens
    expected = layer_saved(Sizes(0, 0, 1, 128, 128, 32 * kv, 320, 0, heads), dtype.itemsize)
    assert out.requires_grad and saved == pytest.approx(expected, rel=0.02)


def test_resident_by_hand():
    assert resident(ROLE, updates=False) == {
        memory.WEIGHTS: 1_000 * 4 / 2,
        memory.OPTIMIZER: 2 * 1_000 * 4 / 2,
    }
    assert resident(replace(ROLE, world=4), False) == {
        memory.WEIGHTS: 1_000,
        memory.OPTIMIZER: 2_000,
    }
    half = resident(fsdp(ROLE, model_dtype="bfloat16"), False)
    assert half == {memory.WEIGHTS: 1_000, memory.OPTIMIZER: 2_000}
    assert resident(replace(ROLE, trained=0), False)[memory.OPTIMIZER] == 0
    assert resident(fsdp(ROLE, param_offload=True), updates=True) == {}


def test_offloaded_averages_are_on_the_gpu_in_the_update_alone():
    role = fsdp(ROLE, optimizer_offload=True)
    assert resident(role, updates=False)[memory.OPTIMIZER] == 0
    assert resident(role, updates=True) == resident(ROLE, updates=True)


def test_adapters_have_gradients_and_averages_of_their_own_in_float32():
    role = fsdp(replace(ROLE, trained=60), model_dtype="bfloat16")
    assert resident(role, False) == {memory.WEIGHTS: 1_000, memory.OPTIMIZER: 2 * 60 * 4 / 2}
    moments = update_moments(role)
    assert moments["loss"][memory.GRADIENTS] == 60 * 4 / 2
    assert moments["backward, layer"][memory.REDUCED] == 20 * (4 + 2)
    assert (
        moments["backward, head"][memory.REDUCED]
        == moments["backward, reduction"][memory.REDUCED]
        == 0
    )


def test_gathered_by_hand():
    """Root 400, layers of 200; two ranks have the buffer of the next all-gather, one rank none;
    bfloat16."""
    assert ROLE.gathered(2) == 2 * (400 + 400)
    assert infer_moments(ROLE)["decoder layer"][memory.GATHERED] == 2 * (400 + 2 * 200)
    assert infer_moments(replace(ROLE, world=1))["decoder layer"][memory.GATHERED] == 2 * (
        400 + 200
    )
    assert infer_moments(ROLE)["gathering"][memory.GATHERED] == 2 * (400 + 200) + 2 * 400 * (
        1 + 1 / 2
    )
    assert fsdp(ROLE, reshard_after_forward=False).gathered(2) == 2 * 1_000


def test_log_probs_by_hand():
    moments = infer_moments(ROLE)
    assert moments["decoder layer"][memory.LAYER] == 2 * (max(3 * 8, 6 * 4) + 4 * 4) * 30
    assert moments["head"][memory.LOGITS] == moments["log-probs"][memory.LOGITS] == 10 * 50 * 2
    assert moments["log-probs"][memory.CHUNKS] == 2 * 10 * 50 * 4
    many = infer_moments(replace(ROLE, infer=Pass(1e9, 1e9, "")))
    assert many["log-probs"][memory.CHUNKS] == 2 * CHUNK_ELEMENTS * 4


def test_update_by_hand():
    """Untied: head and embedding have 200 parameters each, the root 400."""
    moments = update_moments(ROLE)
    saved = layer_saved(SIZES, 2)
    assert all(m[memory.GRADIENTS] == 1_000 * 4 / 2 for m in moments.values())
    assert moments["loss"][memory.KEPT] == 20 * (3 * 2 * 4 + (4 + 2 * 2) * 4)
    assert moments["loss"][memory.LOGITS] == 2 * 10 * 50 * 2
    assert moments["loss"][memory.CHUNKS] == 4 * 10 * 50 * 4
    assert moments["backward, head"][memory.REDUCED] == 2 * 200
    layer = moments["backward, layer"]
    assert layer[memory.KEPT] == 20 * 3 * 2 * 4 and layer[memory.LAYER] == 20 * (saved + 2 * 2 * 8)
    assert layer[memory.REDUCED] == 2 * 200 + 200 * (4 + 2)
    assert moments["backward, embedding"][memory.REDUCED] == 2 * 400 + 200 * 4
    assert moments["backward, reduction"] == {
        memory.GRADIENTS: 2_000,
        memory.GATHERED: 0,
        memory.REDUCED: 400 * 6,
    }


def test_tied_gradients_are_alive_beside_their_sum():
    tied = replace(ROLE, sizes=replace(SIZES, params=801), trained=801)
    assert (
        update_moments(tied)["backward, embedding"][memory.REDUCED]
        == 2 * 201 + 2 * 2 * 200 + 200 * 4
    )


def test_checkpointing_keeps_the_inputs_of_the_layers_and_recomputes_one():
    on = update_moments(ROLE)
    off = update_moments(replace(ROLE, checkpointing=False))
    saved = 20 * layer_saved(SIZES, 2)
    assert off["backward, layer"][memory.KEPT] == 3 * saved > on["backward, layer"][memory.KEPT]
    assert on["backward, layer"][memory.LAYER] - off["backward, layer"][memory.LAYER] == saved
    assert off["loss"][memory.LOGITS] == on["loss"][memory.LOGITS]


def test_a_value_head_has_no_logits():
    moments = update_moments(replace(ROLE, sizes=replace(SIZES, vocab=0)))
    assert moments["loss"][memory.LOGITS] == moments["loss"][memory.CHUNKS] == 0


def test_param_offload_takes_gradients_off_the_gpu():
    moments = update_moments(fsdp(ROLE, param_offload=True))
    assert all(m[memory.GRADIENTS] == 0 for m in moments.values())
    assert (
        moments["backward, layer"][memory.REDUCED]
        == update_moments(ROLE)["backward, layer"][memory.REDUCED]
    )


def test_phases():
    ref = replace(ROLE, name="ref", trained=0, update=None)
    critic = replace(ROLE, name="critic", sizes=replace(SIZES, vocab=0))
    roles = [ROLE, ref, critic]
    retriever = {("retriever", engine_memory.INDEX): 7.0}
    rollout, _ = peak("rollout", roles, retriever, {ENGINE: 5.0})
    assert rollout[ENGINE] == 5.0 and rollout["", memory.CONTEXTS] == memory.CONTEXTS_GIB * GIB
    assert rollout["ref", memory.WEIGHTS] == 2_000 and ("actor", memory.GATHERED) not in rollout
    update, moment = peak("actor update", roles, retriever, {ENGINE: 5.0})
    assert moment.startswith("actor") and ENGINE not in update
    assert (
        update["critic", memory.OPTIMIZER] == 4_000 and ("critic", memory.GRADIENTS) not in update
    )
    assert peak("critic update", roles, {}, {})[1].startswith("critic")
    fullest = max(sum(m.values()) for m in update_moments(ROLE).values())
    assert sum(update.values()) == pytest.approx(
        memory.CONTEXTS_GIB * GIB + 7 + 5 * 2_000 + 4_000 + fullest, rel=1e-12
    )


def test_without_resharding_parameters_stay_gathered():
    ref, actor = (
        fsdp(role, reshard_after_forward=False)
        for role in (replace(ROLE, name="ref", trained=0), ROLE)
    )
    assert peak("rollout", [actor, ref], {}, {})[0]["ref", memory.GATHERED] == 2_000
    assert ("actor", memory.GATHERED) not in peak("rollout", [actor, ref], {}, {})[0]
    assert peak("log-probs", [actor, ref], {}, {})[0]["actor", memory.GATHERED] >= 2_000


def budgets(agent, **actor):
    data = SimpleNamespace(
        max_start_length=2048, max_prompt_length=4096, max_response_length=500, max_obs_length=500
    )
    actor = SimpleNamespace(**{"state_masking": True, **actor})
    return SimpleNamespace(data=data, agent=agent, actor_rollout_ref=SimpleNamespace(actor=actor))


def test_longest_trajectory():
    assert longest_trajectory(budgets({"max_turns": 4}))[:2] == (5096, 2500 / 5096)
    assert longest_trajectory(budgets({"max_turns": 1}))[:2] == (2048 + 1000 + 500, 1000 / 3548)
    tokens, share, why, *_ = longest_trajectory(budgets({}))
    assert (tokens, share) == (5096, 1.0) and "unknown" in why
    tokens, share, why, *_ = longest_trajectory(budgets({"max_turns": 4}, state_masking=False))
    assert share == 1.0 and "state_masking=false" in why


def small_model(folder: Path, tied: bool) -> ModelConfig:
    Qwen2Config(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=100,
        tie_word_embeddings=tied,
    ).save_pretrained(folder)
    return ModelConfig(path=str(folder))


LAYER = 2 * 64 * 64 + 2 * 64 * 32 + 64 + 2 * 32 + 3 * 64 * 96 + 2 * 64
"""q and o, k and v, their biases, the MLP, the norms."""


@pytest.mark.parametrize("tied", [True, False])
def test_sizes_of_a_model(tmp_path, tied):
    sizes, trained = read_model(small_model(tmp_path, tied), "lm", {})
    root = 64 * 100 * (1 if tied else 2) + 64
    assert sizes == Sizes(3 * LAYER + root, LAYER, 3, 64, 64, 32, 96, 100)
    assert trained == sizes.params and sizes.root == root


def test_sizes_of_a_critic_and_of_adapters(tmp_path):
    config = small_model(tmp_path, False)
    assert read_model(config, "value", {})[0].root == 64 * 100 + 64 + 64 + 1
    _, trained = read_model(config.model_copy(update={"lora_rank": 8}), "lm", {})
    # rank times ins and outs
    assert trained == 3 * 8 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 96))


def test_only_what_is_accounted_for_is_estimated(tmp_path, capsys):
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "gemma2", "attn_logit_softcapping": 50.0})
    )
    with pytest.raises(SystemExit) as caught:
        main(["--config-name", "grpo", f"actor_rollout_ref.model.path={tmp_path}"])
    assert caught.value.code == 2 and "attention scores are capped" in capsys.readouterr().err


@pytest.fixture
def qwen(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(QWEN_7B))
    return tmp_path


def estimate(algorithm: str, path: Path, *further: str) -> int:
    recipe = f"experiment=nq_hotpotqa/qwen2.5-7b-{algorithm}"
    return main(
        ["--config-name", algorithm, recipe, f"actor_rollout_ref.model.path={path}", *further]
    )


@pytest.mark.parametrize(("algorithm", "rollout_gib"), [("grpo", 64.41), ("ppo", 60.62)])
def test_paper_recipes(algorithm, rollout_gib, qwen, capsys):
    assert estimate(algorithm, qwen) == 0
    out = capsys.readouterr().out
    assert (
        "7,615.6 M parameters" in out
        and "longest trajectory: 5,096 tokens, of which at most 49% are trained" in out
    )
    header = next(line for line in out.splitlines() if line.startswith("GiB per GPU"))
    assert ("critic update" in header) == (algorithm == "ppo") and "actor update" in header
    (total,) = (line.split()[1:] for line in out.splitlines() if line.startswith("total"))
    assert float(total[0]) == pytest.approx(rollout_gib, abs=0.02)
    assert (
        f"fits: {80 - rollout_gib:.1f} of 80 GiB are left at the peak (rollout); no retriever"
        in out
    )
    owners = ("actor:", "critic:", "ref:", "engine:", "contexts")
    rows = [line.split() for line in out.splitlines() if line.startswith(owners)]
    columns = zip(
        *([float(cell.replace("-", "0")) for cell in row[-len(total) :]] for row in rows),
        strict=True,
    )
    assert [sum(column) for column in columns] == pytest.approx([float(x) for x in total], abs=0.05)


def test_a_gpu_that_is_too_small(qwen, capsys):
    keep = "critic.fsdp_config.optimizer_offload=false"
    off = "actor_rollout_ref.model.enable_gradient_checkpointing=false"
    assert estimate("ppo", qwen, keep, off, "--gpu-memory-gb", "24") == 1
    out = capsys.readouterr().out
    assert "does not fit in 24 GiB: rollout" in out
    advice = out[out.index("does not fit") :]
    assert advice.index("actor: activations kept") < advice.index("engine: its share")
    for key in (
        "actor_rollout_ref.model.enable_gradient_checkpointing=true",
        "lower actor_rollout_ref.actor.ppo_max_token_len_per_gpu",
        "lower actor_rollout_ref.rollout.gpu_memory_utilization",
        "critic.fsdp_config.optimizer_offload=true",
    ):
        assert key in advice


def test_options_shrink_what_they_should(qwen, capsys):
    def row(name: str, *further: str) -> list[float]:
        estimate("grpo", qwen, *further)
        (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith(name))
        return [float(cell.replace("-", "0") or 0) for cell in line.rsplit(maxsplit=3)[1:]]

    weights = row("actor: weights")
    optimizer = row("actor: optimizer state")
    assert weights == pytest.approx([7.6156e9 * 4 / 8 / GIB] * 3, abs=0.01)
    assert optimizer == pytest.approx([2 * w for w in weights], abs=0.01)
    assert row("actor: weights", "trainer.nnodes=2") == pytest.approx(
        [w / 2 for w in weights], abs=0.01
    )
    offload = "actor_rollout_ref.actor.fsdp_config.optimizer_offload=true"
    assert row("actor: optimizer state", offload) == [0, 0, optimizer[2]]
    lora = row("actor: optimizer state", "actor_rollout_ref.model.lora_rank=64")
    assert lora[0] == pytest.approx(2 * 161.5e6 * 4 / 8 / GIB, abs=0.01)
    fewer = "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=8192"
    assert (
        row("total", fewer)[2] < row("total")[2] - 3
        and row("total", "--trained-share", "0.1")[1] < row("total")[1]
    )


SHARE = replace(SIZES, params=1_000_000, vocab=500)


def test_the_share_of_an_engine_by_hand():
    """3 layers, keys of 2 numbers: a token takes 2 x 3 x 2 x 2 bytes. MLP of 8, hidden 4."""
    config = RolloutConfig(
        max_num_batched_tokens=1_000, max_num_seqs=10, gpu_memory_utilization=0.5
    )
    share = engine_memory.engine_memory(SHARE, config, 10 * GIB)
    assert share.share == pytest.approx(5 * GIB)
    assert share.weights == 2_000_000 and share.profile == 2 * (3 * 8 + 4 * 4) * 1_000
    assert share.logits == (2 + 4) * 500 * 10 and share.graphs == 2 * GIB
    assert share.kv_bytes_per_token == 24 and share.kv_tokens == int(
        (3 * GIB - 2_000_000 - 80_000 - 30_000) / 24
    )
    eager = engine_memory.engine_memory(
        SHARE, config.model_copy(update={"enforce_eager": True}), 10 * GIB
    )
    assert eager.kv_cache - share.kv_cache == pytest.approx(GIB)
    two = engine_memory.engine_memory(
        SHARE, config.model_copy(update={"tensor_model_parallel_size": 2}), 10 * GIB
    )
    assert two.weights == 1_000_000 and two.kv_bytes_per_token == 12


def test_a_retriever_by_hand():
    """wiki-18 in float16 over 8 GPUs: 3.76 GiB a GPU, and FAISS's scratch and the encoder."""
    assert retriever_memory(21_015_324, 8) / GIB == pytest.approx(
        21_015_324 * 768 * 2 / 8 / GIB + 3.0
    )


def test_a_retriever_on_the_same_gpus(qwen, capsys):
    away = [f"actor_rollout_ref.{role}.fsdp_config.param_offload=true" for role in ("actor", "ref")]
    assert estimate("grpo", qwen, *away, "--retriever-gb-per-gpu", "7") == 0
    out = capsys.readouterr().out
    assert (
        "fits: 21.0 of 80 GiB are left at the peak (rollout), with 7.0 GiB of a retriever on each "
        "GPU" in out
    )
    (row,) = (line.split() for line in out.splitlines() if line.startswith("retriever:"))
    assert row[-3:] == ["7.00"] * 3
    greedy = "actor_rollout_ref.rollout.gpu_memory_utilization=0.88"
    assert estimate("grpo", qwen, *away, greedy) == 0
    assert "engine start: asks for 70.4 GiB, finds 76.0 free" in capsys.readouterr().out
    assert estimate("grpo", qwen, *away, greedy, "--retriever-passages", "21015324") == 1
    out = capsys.readouterr().out
    assert (
        "the engine refuses to start: it asks for 70.4 GiB, and the trainer and retriever leave "
        "69.2" in out
    )


def test_an_engine_without_room_for_a_sequence(qwen, capsys):
    assert estimate("grpo", qwen, "actor_rollout_ref.rollout.gpu_memory_utilization=0.2") == 1
    assert (
        "KV cache has room for 0 tokens and not for one sequence of 4,596"
        in capsys.readouterr().out
    )


PUBLISHED = {
    "Qwen/Qwen2.5-3B": 3_085_938_688,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "Qwen/Qwen3-1.7B": 1_720_574_976,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
}


@pytest.mark.parametrize("path", PUBLISHED)
def test_shapes_have_the_published_number_of_parameters(path):
    shapes = load_shapes(str(ROOT / "scripts/bench/model_shapes.json"))
    assert read_model(ModelConfig(path=path), "lm", shapes)[0].params == PUBLISHED[path]


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [("qwen3_moe", "experts"), ("mixtral", "experts"), ("qwen3_5_text", "linear attention")],
)
def test_models_of_other_layers_are_refused_with_the_reason(model_type, reason):
    with pytest.raises(ConfigError, match=reason):
        read_model(ModelConfig(path="it"), "lm", {"it": {"model_type": model_type}})


def test_without_a_config_the_way_out_is_named(capsys):
    with pytest.raises(SystemExit):
        main(["experiment=nq_hotpotqa/qwen2.5-3b-grpo", "--shapes", "/no/file.json"])
    assert "--shapes /no/file.json: no JSON" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["actor_rollout_ref.model.path=/nowhere"], "model.path=/nowhere"),
        (
            ["data.train_batch_size=47"],
            "actor_rollout_ref.actor.ppo_mini_batch_size=240 does not divide",
        ),
        (["experiment=nowhere"], "nowhere"),
        (["no.such.key=1"], "no"),
    ],
)
def test_a_configuration_that_cannot_work(overrides, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main(overrides)
    err = capsys.readouterr().err
    assert caught.value.code == 2 and err.startswith("error: ") and message in err


def test_verdict_names_each_phase_that_exceeds(qwen):
    peaks = {
        phase: peak(phase, [ROLE], {}, {ENGINE: 5.0 * GIB})
        for phase in ("rollout", "log-probs", "actor update")
    }
    assert verdict(peaks, [ROLE], 10 * GIB).startswith("fits: 1.0 of 10 GiB")
    text = verdict(peaks, [ROLE], 4.5 * GIB)
    assert text.splitlines()[:2] == [
        "does not fit in 4.5 GiB: rollout 9.0",
        "  5.0 GiB of engine: its share",
    ]


@pytest.mark.parametrize("change", [{}, {"checkpointing": False, "lora_rank": 16}])
def test_the_code_agrees(tmp_path, change):
    """FSDP2's own calls on fake tensors, first of 8 ranks, counted (scripts/bench/estimate.py
    --ranks)."""
    script = ROOT / "scripts" / "bench" / "estimate.py"
    sys.path.insert(0, str(script.parent))
    import estimate as bench

    shape = "131M, untied"
    bench.hf_config(shape).save_pretrained(tmp_path)
    case = {"fake": True, "shape": shape, "world": 8, "tokens": 4_000, "trained": 1_500, **change}
    command = [sys.executable, str(script), "--case", json.dumps([{shape: str(tmp_path)}, case])]
    done = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    for what, expected in found["predicted"].items():
        assert expected == pytest.approx(found["measured"][what], rel=0.1), what
