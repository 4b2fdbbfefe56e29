"""The configuration of the critic reaches its loss and its updates."""

from types import SimpleNamespace

import pytest
import torch

from tests.verl.batches import normal, ragged_batch
from verl.protocol import CRITIC_MINI_BATCH
from verl.trainer.ppo.core_algos import compute_value_loss
from verl.workers import critic
from verl.workers.config import CriticConfig
from verl.workers.critic import CriticWorker
from verl.workers.update import Counts

COUNTS = Counts(num_tokens=200, num_seqs=40)
"""Of a whole mini-batch, more than the rows here."""


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean"])
def test_an_update_is_given_what_is_configured(monkeypatch, mode):
    rows = ragged_batch(torch.float64).with_tensors(returns=normal(1), values=normal(2))
    updated = []

    def update(state, data, loss_fn, *, epochs, budget, grad_clip, column):
        updated.append((epochs, budget, grad_clip, column))
        loss, metrics = loss_fn(data, COUNTS)
        return {"loss": loss.item(), **{name: float(value) for name, value in metrics.items()}}

    monkeypatch.setattr(critic, "forward_values", lambda model, rows: normal(3))
    monkeypatch.setattr(critic, "update_mini_batches", update)
    worker = CriticWorker.__new__(CriticWorker)
    worker.state = SimpleNamespace(model="model")
    worker.device = torch.device("cpu")
    worker.budget = "budget"
    settings = {"ppo_epochs": 3, "grad_clip": 0.7, "cliprange_value": 0.3, "loss_agg_mode": mode}
    worker.config = CriticConfig.model_construct(**settings)
    found = worker.update_critic(rows)
    loss, metrics = compute_value_loss(
        normal(3),
        normal(1),
        normal(2),
        rows.batch["response_mask"],
        0.3,
        mode,
        num_tokens=COUNTS.num_tokens,
        num_seqs=COUNTS.num_seqs,
    )
    assert updated == [(3, "budget", 0.7, CRITIC_MINI_BATCH)]
    assert found == pytest.approx(
        {"loss": loss.item(), **{name: float(value) for name, value in metrics.items()}}
    )
