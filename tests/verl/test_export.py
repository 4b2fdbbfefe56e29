"""The exported policy has the dtype that its source states, whatever it was trained in."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen2ForCausalLM

from tests.models import make_tiny_qwen2
from verl.utils import checkpoint
from verl.workers.config import ModelConfig


@pytest.mark.parametrize("stated", ["bfloat16", "float32", None])
def test_the_dtype_of_the_source_is_kept(tmp_path, monkeypatch, stated):
    monkeypatch.setattr(checkpoint.dist, "get_rank", lambda: 0)
    source, out = make_tiny_qwen2(tmp_path / "source", layers=1), tmp_path / "out"
    content = json.loads((source / "config.json").read_text())
    content["dtype"] = stated
    (source / "config.json").write_text(json.dumps(content))
    trained = Qwen2ForCausalLM.from_pretrained(source, dtype=torch.float32)
    checkpoint.save_pretrained(trained, trained.named_parameters(), ModelConfig(path=str(source)), str(out))
    expected = getattr(torch, stated or "float32")
    weights = load_file(out / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {expected}
    assert AutoModelForCausalLM.from_pretrained(out).dtype == expected
    name, tensor = next(iter(trained.named_parameters()))
    assert torch.equal(weights[name], tensor.to(expected))
