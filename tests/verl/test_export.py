"""Exports: what one process makes of a checkpoint is what its ranks held, and is told as their
source was."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2ForCausalLM

from tests.models import make_tiny_qwen2, perturb
from tests.trained import edit_json, make_run
from tests.verl.batches import ragged_batch
from verl.trainer.export import export
from verl.utils.checkpoint_storage import CheckpointError
from verl.utils.errors import ConfigError, ModelError
from verl.utils.model_names import find_checkpoint
from verl.utils.run_folder import INDEX, PICKLED_INDEX
from verl.workers.config import ModelConfig
from verl.workers.forward import forward_log_probs
from verl.workers.hf_folder import (
    exported_weights,
    on_host,
    saved_tensors,
    skeleton_of,
    source_dtype,
    write_folder,
)

GENERATION = {"eos_token_id": [5, 7], "temperature": 0.7, "do_sample": False}
"""Sampling that is not used: transformers reads it with a warning and refuses to write it."""


def make_source(folder: Path, dtype: torch.dtype, **shape: Any) -> Path:
    """A published model: weights of `dtype`, more than one id that ends a turn."""
    make_tiny_qwen2(folder, layers=2, width=32, vocab=300, **shape)
    Qwen2ForCausalLM.from_pretrained(folder, dtype=dtype).save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of all weights of a tied model in bfloat16, and one of adapters over float32; log-probs
    at their ends."""
    root = tmp_path_factory.mktemp("runs")
    published = make_source(root / "published", torch.bfloat16, tied=True)
    exact = make_source(root / "exact", torch.float32)
    plain = ModelConfig(path=str(published))
    adapters = ModelConfig(path=str(exact), lora_rank=4, lora_alpha=8)
    log_probs = {
        name: make_run(root / name, model)
        for name, model in (("plain", plain), ("adapters", adapters))
    }
    return root, log_probs


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def log_probs_of(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return forward_log_probs(model, ragged_batch(torch.float32), 1.0, with_entropy=False)[
        0
    ].detach()


def settings_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize(("run", "source"), [("plain", "published"), ("adapters", "exact")])
def test_one_process_exports_what_two_ranks_trained(tmp_path, runs, run, source):
    root, log_probs = runs
    export(root / run / "global_step_2", tmp_path / "last")
    export(root / run / "alarms" / "step_2", tmp_path / "alarm")
    export(root / run / "global_step_1", tmp_path / "first")
    expected = weights_of(root / run / "hf")
    initial = weights_of(root / source)
    first = weights_of(tmp_path / "first")
    for folder in ("last", "alarm"):
        found = weights_of(tmp_path / folder)
        assert found.keys() == expected.keys() == initial.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    trained = "layers.0.mlp.up_proj.weight"
    assert not torch.equal(first[f"model.{trained}"], expected[f"model.{trained}"])
    assert not torch.equal(first[f"model.{trained}"], initial[f"model.{trained}"])
    rounding = 1e-4 if source == "exact" else 0.2
    assert (log_probs_of(tmp_path / "last") - log_probs[run]).abs().max() < rounding
    assert (log_probs_of(root / source) - log_probs[run]).abs().max() > 5 * rounding, (
        "training moves it further"
    )


@pytest.mark.parametrize(("run", "source"), [("plain", "published"), ("adapters", "exact")])
def test_an_export_is_told_as_its_source_is(tmp_path, runs, run, source):
    """The dtype of the weights, every entry of the config, what ends a turn, the tokenizer and its
    chat template."""
    root, _ = runs
    export(root / run / "global_step_2", tmp_path / "model")
    for folder in (tmp_path / "model", root / run / "hf"):
        assert settings_of(folder) == settings_of(root / source)
        kept = {tensor.dtype for tensor in weights_of(folder).values()}
        assert kept == {tensor.dtype for tensor in weights_of(root / source).values()}
        assert AutoModelForCausalLM.from_pretrained(folder).config.use_cache is True
        assert json.loads((folder / "generation_config.json").read_text()) == GENERATION
        ours, theirs = (AutoTokenizer.from_pretrained(path) for path in (folder, root / source))
        messages = [{"role": "user", "content": "Where was Ada Marin born"}]
        assert ours.apply_chat_template(messages) == theirs.apply_chat_template(messages)
        assert (folder / "model.safetensors").stat().st_mode == (
            folder / "config.json"
        ).stat().st_mode
        origin = json.loads((folder / "training.json").read_text())
        assert origin == {"base_model": str(root / source), "checkpoint": "global_step_2"}


@pytest.mark.parametrize("stated", [True, False])
def test_the_dtype_is_what_the_config_states_or_else_what_the_weights_have(tmp_path, stated):
    source = make_source(tmp_path, torch.bfloat16)
    if not stated:
        edit_json(source / "config.json", dtype=None)
    assert source_dtype(ModelConfig(path=str(source))) == torch.bfloat16
    (source / "model.safetensors").unlink()
    assert source_dtype(ModelConfig(path=str(source))) == (torch.bfloat16 if stated else None)


def test_the_weights_of_the_source_are_not_needed_and_it_may_have_moved(tmp_path, runs):
    root, _ = runs
    run = tmp_path / "run"
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(root / "plain" / "global_step_2", run / "global_step_2")
    shutil.copy(root / "plain" / "config.yaml", run)
    text = (
        (run / "config.yaml").read_text().replace(str(root / "published"), str(tmp_path / "gone"))
    )
    (run / "config.yaml").write_text(text)
    with pytest.raises(
        ModelError, match=rf"(?s){tmp_path}/gone: the model that {run}/global_step_2 .*--base"
    ):
        export(run / "global_step_2", tmp_path / "out")
    shutil.copytree(root / "published", elsewhere)
    (elsewhere / "model.safetensors").unlink()
    edit_json(elsewhere / "config.json", tie_word_embeddings=True)
    export(run / "global_step_2", tmp_path / "out", base=str(elsewhere))
    expected = weights_of(root / "plain" / "hf")
    found = weights_of(tmp_path / "out")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_what_does_not_belong_together_is_named(tmp_path, runs):
    root, _ = runs
    wider = make_tiny_qwen2(tmp_path / "wider", layers=2, width=64, vocab=300, tied=True)
    checkpoint = root / "plain" / "global_step_2"
    with pytest.raises(
        ModelError,
        match=r"global_step_2: was not trained from .*wider \(model.embed_tokens.weight: \(",
    ):
        export(checkpoint, tmp_path / "out", base=str(wider))
    alone = shutil.copytree(checkpoint, tmp_path / "alone")
    with pytest.raises(ModelError, match=r"alone: no config.yaml in the folders above"):
        export(alone, tmp_path / "out")
    (tmp_path / "config.yaml").write_text("model: {}\n")
    with pytest.raises(ConfigError, match=r"config.yaml: no section actor_rollout_ref.model"):
        export(alone, tmp_path / "out")
    adapters = (root / "adapters" / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(adapters.replace("lora_rank: 4", "lora_rank: 0"))
    with pytest.raises(ModelError, match=r"adapters, and .*lora_rank is 0|was not trained from"):
        export(
            shutil.copytree(root / "adapters" / "global_step_1", tmp_path / "adapted"),
            tmp_path / "out",
        )
    assert not (tmp_path / "out").exists()


def test_a_damaged_checkpoint_is_named_and_leaves_no_model(tmp_path, runs):
    root, _ = runs
    run = tmp_path / "run"
    shutil.copytree(root / "plain" / "global_step_2", run / "global_step_2")
    shutil.copy(root / "plain" / "config.yaml", run)
    next((run / "global_step_2" / "actor").glob("*.distcp")).unlink()
    with pytest.raises(
        CheckpointError, match=r"global_step_2/actor: the checkpoint could not be read"
    ):
        export(run / "global_step_2", tmp_path / "out")
    (run / "global_step_2" / "actor" / INDEX).write_bytes(b"\x80")
    with pytest.raises(
        CheckpointError, match=r"global_step_2/actor/index.json: not the index of a checkpoint"
    ):
        export(run / "global_step_2", tmp_path / "out")
    (run / "global_step_2" / "actor" / INDEX).rename(
        run / "global_step_2" / "actor" / PICKLED_INDEX
    )
    with pytest.raises(
        CheckpointError, match=r"actor/.metadata: a pickle, from a version that saved"
    ):
        export(find_checkpoint(str(run)), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def written(model: ModelConfig, out: Path) -> None:
    """Loads the model that a training would, and writes it as the training does."""
    loaded = AutoModelForCausalLM.from_pretrained(
        model.path, dtype=torch.float32, trust_remote_code=model.trust_remote_code
    )
    skeleton = skeleton_of(model)
    weights = exported_weights(
        skeleton, saved_tensors(loaded), lambda tensor: tensor, source_dtype(model)
    )
    write_folder(skeleton, dict(on_host(weights)), model, out, {})


def test_the_language_model_of_a_model_for_images_becomes_one_of_its_own(tmp_path):
    """Its config is nested in that of the whole, which alone says the dtype, and its weights have a
    prefix there."""
    source = tmp_path / "source"
    out = tmp_path / "out"
    make_tiny_qwen2(source, vocab=300)  # its tokenizer
    text = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    }
    vision = {
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_heads": 2,
        "out_hidden_size": 32,
    }
    config = transformers.Qwen3_5Config(text_config=text, vision_config=vision)
    whole: Any = transformers.Qwen3_5ForConditionalGeneration(config)
    perturb(whole, seed=0, scale=0.1)
    whole.to(torch.bfloat16).save_pretrained(source)
    written(ModelConfig(path=str(source)), out)
    assert all(
        name.startswith(("model.layers.", "model.embed", "model.norm", "lm_head"))
        for name in weights_of(out)
    )
    assert (
        settings_of(out)["model_type"] == "qwen3_5_text" and settings_of(out)["dtype"] == "bfloat16"
    )
    assert settings_of(out)["architectures"] == ["Qwen3_5ForCausalLM"]
    ids = torch.arange(5, 25)[None]
    before, after = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(ids).logits
        for path in (source, out)
    )
    assert torch.equal(before, after)


OWN_CODE = """
from transformers import {base} as Base
class {name}(Base):
    {body}
"""


def test_code_of_its_own_travels_with_a_model(tmp_path):
    source = make_tiny_qwen2(tmp_path / "source", layers=1, vocab=300)
    out = tmp_path / "out"
    body = 'model_type = "tiny_own"'
    (source / "configuration_own.py").write_text(
        OWN_CODE.format(base="Qwen2Config", name="OwnConfig", body=body)
    )
    body = "from .configuration_own import OwnConfig as config_class"
    (source / "modeling_own.py").write_text(
        OWN_CODE.format(base="Qwen2ForCausalLM", name="OwnModel", body=body)
    )
    auto_map = {
        "AutoConfig": "configuration_own.OwnConfig",
        "AutoModelForCausalLM": "modeling_own.OwnModel",
    }
    edit_json(
        source / "config.json", model_type="tiny_own", architectures=["OwnModel"], auto_map=auto_map
    )
    tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast"}
    edit_json(source / "tokenizer_config.json", **tokenizer)
    written(ModelConfig(path=str(source), trust_remote_code=True), out)
    expected = load_file(source / "model.safetensors")
    shutil.rmtree(source)
    assert settings_of(out)["auto_map"] == auto_map
    model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    assert type(model).__name__ == "OwnModel"
    assert all(torch.equal(model.get_parameter(name), tensor) for name, tensor in expected.items())


class Routed(Qwen2ForCausalLM):
    """A model with a trained bias that is a buffer, as in routers of mixtures of experts."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model.layers[0].register_buffer(
            "correction_bias", torch.full((3,), 0.1), persistent=True
        )
        self.model.layers[0].register_buffer("scratch", torch.zeros(3), persistent=False)


def test_buffers_of_a_checkpoint_are_exported_and_keep_their_dtype(tmp_path):
    model = Routed.from_pretrained(make_tiny_qwen2(tmp_path, layers=1, vocab=300))
    weights = dict(
        exported_weights(model, saved_tensors(model), lambda tensor: tensor, torch.bfloat16)
    )
    assert weights["model.layers.0.correction_bias"].dtype == torch.float32
    assert weights["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert not any("scratch" in name for name in weights)
