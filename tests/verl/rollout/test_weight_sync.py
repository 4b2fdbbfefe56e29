"""What the trainer's half of a sync puts into the memory file system."""

import os
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen2ForCausalLM

from tests.distributed import run_ranks
from tests.models import make_tiny_qwen2
from verl.rollout import weight_sync
from verl.rollout.weight_sync import write_engine_model
from verl.workers.config import FSDPConfig, ModelConfig
from verl.workers.fsdp_model import build_model


class FakeServer:
    """Answers `load_weights.remote(folder)` as the handle of an engine does."""

    def __init__(self) -> None:
        self.load_weights = self
        self.folders: list[str] = []
        self.weights: dict[str, torch.Tensor] = {}

    def remote(self, folder: str) -> None:
        self.folders.append(folder)
        self.weights = load_file(f"{folder}/model.safetensors")


def send_twice(path: str) -> tuple[dict[str, torch.Tensor], list[bool]]:
    """On each rank: what the engine read, and which of its folders are still there."""
    from verl.rollout import weight_sync

    weight_sync.get = lambda refs: refs
    mesh = torch.distributed.init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    model = build_model(ModelConfig(path=path), "lm", FSDPConfig(dtype="float32"), mesh)
    server: Any = FakeServer()
    sender = weight_sync.WeightSender(model, [server], "cpu")
    sender.send()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    sender.send()
    return server.weights, [os.path.exists(folder) for folder in server.folders]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_whole_tensors_arrive_with_a_head_and_leave_nothing_behind(tmp_path, tied):
    path = make_tiny_qwen2(tmp_path, tied=tied, layers=1)
    (weights, folders), (nothing, none) = run_ranks(2, send_twice, str(path))
    expected = {k: v + 1 for k, v in Qwen2ForCausalLM.from_pretrained(path).state_dict().items()}
    assert weights.keys() == expected.keys() and "lm_head.weight" in weights
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor)
    assert folders == [False, False]
    assert not nothing and not none, "only rank 0 talks to the engines"


def test_the_engine_gets_what_belongs_to_the_model_beside_its_weights(tmp_path):
    model = make_tiny_qwen2(tmp_path / "model", layers=1)
    copy = tmp_path / "copy"
    copy.mkdir()
    generation = b'{"eos_token_id": [5, 7], "temperature": 0.7, "do_sample": false}'
    (model / "generation_config.json").write_bytes(generation)
    write_engine_model(ModelConfig(path=str(model)), str(copy))
    assert (copy / "generation_config.json").read_bytes() == generation


@pytest.mark.parametrize(("rank", "dies"), [(0, False), (0, True), (1, False)])
def test_no_rank_goes_on_before_the_engines_have_the_weights(monkeypatch, rank, dies):
    """Also where an engine has died: the other ranks are at the barrier by then."""
    said = []

    def parameters(model):
        yield "weight", None
        said.append("gathered")

    def load(references):
        said.append("loaded")
        if dies:
            raise RuntimeError("the engine died")

    ranks = SimpleNamespace(get_rank=lambda: rank, barrier=lambda: said.append("barrier"))
    monkeypatch.setattr(weight_sync, "dist", ranks)
    monkeypatch.setattr(weight_sync, "full_parameters", parameters)
    monkeypatch.setattr(weight_sync, "write_weights", lambda gathered, folder, head: list(gathered))
    monkeypatch.setattr(weight_sync, "has_head", lambda config: True)
    monkeypatch.setattr(weight_sync, "get", load)
    sender = weight_sync.WeightSender.__new__(weight_sync.WeightSender)
    server = SimpleNamespace(load_weights=SimpleNamespace(remote=lambda folder: folder))
    sender.engine = None
    sender.model = SimpleNamespace(config=None)
    sender.servers = [server]
    with pytest.raises(RuntimeError, match="died") if dies else nullcontext():
        sender.send()
    assert said == ["gathered", *["loaded"] * (rank == 0), "barrier"]
