"""Where the parameters are gathered whose shards rest on the host."""

from types import SimpleNamespace

import pytest
import torch

from verl.workers import fsdp_model


class Sharded:
    """A DTensor whose shards are on the host while its mesh is one of GPUs."""

    device_mesh = SimpleNamespace(device_type="cuda")

    def __init__(self, at: str = "cpu") -> None:
        self.at = at

    def to(self, device: str) -> "Sharded":
        return Sharded(device)

    def full_tensor(self) -> torch.Tensor:
        assert self.at == "cuda", "gathered over TCP, into a tensor that NCCL refuses"
        return torch.ones(2, requires_grad=True)


@pytest.fixture(autouse=True)
def sharded(monkeypatch):
    monkeypatch.setattr(fsdp_model, "DTensor", Sharded)


def test_shards_on_the_host_are_gathered_on_the_gpu():
    assert torch.equal(fsdp_model.whole(Sharded()), torch.ones(2))  # pyright: ignore[reportArgumentType]
    assert not fsdp_model.whole(Sharded()).requires_grad  # pyright: ignore[reportArgumentType]


def test_what_is_not_sharded_stays():
    value = torch.nn.Parameter(torch.ones(2))
    assert torch.equal(fsdp_model.whole(value), torch.ones(2))
