"""The probe that decides whether rows share a forward pass, and what follows from it."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from tests.distributed import run_ranks
from tests.models import make_tokenizer, perturb
from tests.verl.batches import ragged_batch
from verl.trainer.packing import decide_packing
from verl.trainer.ppo.mismatch import mismatch_warning
from verl.utils.errors import ConfigError
from verl.workers.actor import ActorWorker
from verl.workers.checkpoint_names import checkpoint_format
from verl.workers.config import ActorConfig, FSDPConfig, ModelConfig, RolloutConfig
from verl.workers.fsdp_model import full_parameters, full_shapes
from verl.workers.packing import Packing, Probe
from verl.workers.shallow import shallow_config

FLOAT32 = FSDPConfig(model_dtype="float32", dtype="float32")
SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "vocab_size": 300,
}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
DYNAMIC: dict[str, Any] = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
CONVOLUTION: dict[str, Any] = {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]}
LONGROPE = DYNAMIC | {
    "rope_type": "longrope",
    "short_factor": [1.0] * 16,
    "long_factor": [4.0] * 16,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    ("config", "attention", "packs"),
    [
        (transformers.Qwen2Config(**SHAPE), "packed", True),
        (transformers.Gemma3TextConfig(**SHAPE), "packed", True),
        (transformers.Qwen3MoeConfig(**SHAPE, **EXPERTS), "packed", True),
        (transformers.Lfm2Config(**SHAPE, **CONVOLUTION), "packed", False),
        (transformers.Qwen3_5TextConfig(**SHAPE), "packed", False),
        (transformers.Qwen2Config(**SHAPE, rope_parameters=dict(DYNAMIC)), "packed", False),
        (transformers.Qwen2Config(**SHAPE, rope_parameters=dict(LONGROPE)), "packed", False),
        (transformers.GptOssConfig(**SHAPE, num_local_experts=4), "eager", False),
    ],
    ids=lambda value: (
        value.model_type if isinstance(value, transformers.PreTrainedConfig) else str(value)
    ),
)
def test_what_leaks_between_rows_passes_alone(config, attention, packs):
    found = Probe(config, "lm").decide("packed")
    assert isinstance(found, Packing) and found.gap <= 1e-3
    assert (found.attention, found.packs) == (attention, packs), found.reason


@pytest.mark.parametrize("layers", range(3, 18))
def test_what_is_as_long_as_there_are_layers_stays_a_word(layers):
    """ "silu" has four letters, "qwen2" five, "gelu_pytorch_tanh" seventeen."""
    for config in (transformers.Qwen2Config, transformers.Gemma3TextConfig):
        deep = config(**SHAPE, num_hidden_layers=layers)
        words = {key: value for key, value in deep.to_dict().items() if isinstance(value, str)}
        shrunk = shallow_config(deep, 2).to_dict()
        assert {key: shrunk[key] for key in words} == words
        assert len(shrunk["layer_types"]) == shrunk["num_hidden_layers"] == 2


def test_an_encoder_is_refused():
    config = transformers.BertConfig(
        hidden_size=64, num_attention_heads=2, intermediate_size=96, vocab_size=300
    )
    found = Probe(config, "lm").decide("packed")
    assert isinstance(found, str) and "not causal" in found


def run_config(path: str, longest: int, **override: Any) -> Any:
    """As much of a run's configuration as the decision reads; frozen models answer `model_copy`."""
    model = ModelConfig(path=path, override_config=override)
    section = SimpleNamespace(model=model, actor=SimpleNamespace(fsdp_config=FLOAT32))
    section.model_copy = lambda update: SimpleNamespace(**vars(section) | update)
    config = SimpleNamespace(
        actor_rollout_ref=section,
        use_critic=False,
        use_teacher=False,
        critic=None,
        device="cpu",
        max_model_len=longest,
    )
    config.model_copy = lambda update: SimpleNamespace(**vars(config) | update)
    return config


def test_the_driver_decides_by_the_longest_row(tmp_path):
    transformers.Qwen2Config(**SHAPE).save_pretrained(tmp_path)
    rope = {"rope_parameters": DYNAMIC, "max_position_embeddings": 64}
    decided = decide_packing(run_config(str(tmp_path), 64, **rope))
    assert decided.actor_rollout_ref.model.pack_rows is True, "no row is long enough to stretch it"
    with pytest.raises(ConfigError, match=r"dynamic.*engine and trainer"):
        decide_packing(run_config(str(tmp_path), 65, **rope))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (transformers.Qwen3MoeConfig(**SHAPE, **EXPERTS, num_hidden_layers=2), "4 experts"),
        (transformers.Lfm2Config(**SHAPE, **CONVOLUTION), "lfm2 is computed wrongly"),
    ],
)
def test_what_an_engine_on_the_cpu_gets_wrong_is_refused(tmp_path, config, reason):
    config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=reason):
        decide_packing(run_config(str(tmp_path), 64))


def scored_twice(path: str) -> tuple[float, float]:
    """How far two calls on the same batch differ, and a batch from its rows alone, with gradient
    checkpointing."""
    actor = ActorWorker(
        ModelConfig(path=path), ActorConfig(fsdp_config=FLOAT32), RolloutConfig(dtype="float32"), 10
    )
    batch = ragged_batch(torch.float32)
    first, again = (actor.compute_log_prob(batch).batch["old_log_probs"] for _ in range(2))
    alone = torch.cat(
        [actor.compute_log_prob(batch[[row]]).batch["old_log_probs"] for row in range(len(batch))]
    )
    return float((first - again).abs().max()), float((first - alone).abs().max())


@pytest.mark.parametrize("family", ["opt", "lfm2"])
def test_log_probs_depend_neither_on_dropout_nor_on_neighbours(tmp_path, family):
    size = len(make_tokenizer(tmp_path))
    config = {
        "opt": transformers.OPTConfig(
            vocab_size=size,
            hidden_size=32,
            ffn_dim=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            word_embed_proj_dim=32,
            max_position_embeddings=64,
        ),
        "lfm2": transformers.Lfm2Config(**SHAPE | {"vocab_size": size}, **CONVOLUTION),
    }[family]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    perturb(model, seed=0, scale=0.1)
    model.save_pretrained(tmp_path)
    ((repeated, alone),) = run_ranks(1, scored_twice, str(tmp_path))
    assert repeated == 0 and alone < 1e-5


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (
            transformers.Qwen3MoeConfig(**SHAPE, **EXPERTS, num_hidden_layers=2),
            "model.layers.1.mlp.experts.3.down_proj.weight",
        ),
        (
            transformers.MixtralConfig(**SHAPE, num_local_experts=4, num_hidden_layers=2),
            "model.layers.1.block_sparse_moe.experts.3.w2.weight",
        ),
    ],
    ids=["qwen3-moe", "mixtral"],
)
def test_experts_travel_as_in_a_checkpoint(tmp_path, config, name):
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    sent = dict(full_parameters(model))
    assert written.keys() == sent.keys() and name in sent
    assert all(torch.equal(written[name], sent[name]) for name in written)
    assert full_shapes(model) == [(name, value.shape) for name, value in sent.items()]
    assert len(dict(checkpoint_format(model, model.named_parameters()))) == len(sent)


def mismatched(gap: float, corrected: bool = False, dtype: str = "bfloat16") -> str:
    ones = torch.ones(2, 3)
    batch = SimpleNamespace(
        batch={
            "response_mask": ones,
            "turns": ones,
            "old_log_probs": -ones,
            "rollout_log_probs": -ones - gap,
        }
    )
    return mismatch_warning(batch, dtype, dtype, corrected) or ""  # pyright: ignore


def test_a_mismatch_is_named_with_its_cure():
    assert not mismatched(0.01) and "not rounding" in mismatched(0.01, dtype="float32")
    assert "rollout_is=token" in mismatched(0.1) and not mismatched(0.1, corrected=True)
    assert "not rounding" in mismatched(1.0, corrected=True)
