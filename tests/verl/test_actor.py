"""The configuration of actor and reference reaches losses, log-probs and engines.

The functions that compute them are tested in test_core_algos.py and test_forward.py.
"""

from types import SimpleNamespace

import pytest
import torch

from tests.verl.batches import normal, ragged_batch
from verl.protocol import DataProto
from verl.trainer.ppo.core_algos import (
    POLICY_LOSSES,
    LossInputs,
    agg_loss,
    kl_penalty,
    likelihood_losses,
)
from verl.workers import actor, reference
from verl.workers.actor import ActorWorker, policy_loss
from verl.workers.config import ActorConfig, PolicyLossConfig
from verl.workers.reference import ReferenceWorker
from verl.workers.update import Counts

COUNTS = Counts(num_tokens=200, num_seqs=40)
"""Of a whole mini-batch, more than the rows here."""
MODES = ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]
DIVISOR = 7.0


def log_probs() -> torch.Tensor:
    """Far enough from the old ones that all clips hold some tokens."""
    return -4 + 0.5 * normal(5)


def entropy() -> torch.Tensor:
    return normal(6).abs()


def loss_of(rows: DataProto | None = None, **settings) -> tuple[float, dict]:
    config = ActorConfig(**{"entropy_coeff": 0.0, "loss_scale_factor": DIVISOR, **settings})
    rows = ragged_batch(torch.float64) if rows is None else rows
    loss, metrics = policy_loss(config, log_probs(), entropy(), rows, COUNTS)
    return loss.item(), {name: float(value) for name, value in metrics.items()}


def aggregated(values: torch.Tensor, mode: str) -> float:
    mask = ragged_batch(torch.float64).batch["response_mask"]
    counts = {
        "num_tokens": COUNTS.num_tokens,
        "num_seqs": COUNTS.num_seqs,
        "loss_scale_factor": DIVISOR,
    }
    return agg_loss(values, mask, mode, **counts).item()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("loss_mode", POLICY_LOSSES)
def test_the_loss_of_the_policy_is_the_configured_one(loss_mode, mode):
    columns = ragged_batch(torch.float64).batch
    weights = normal(7).abs()
    rows = ragged_batch(torch.float64).with_tensors(rollout_is_weights=weights)
    clip = {"clip_ratio_low": 0.1, "clip_ratio_high": 0.3, "clip_ratio_c": 1.5}
    policy = PolicyLossConfig(loss_mode=loss_mode)
    loss, metrics = loss_of(rows, loss_agg_mode=mode, policy_loss=policy, **clip)
    inputs = LossInputs.masked(
        columns["old_log_probs"],
        log_probs(),
        columns["advantages"],
        columns["response_mask"],
        clip_ratio_low=0.1,
        clip_ratio_high=0.3,
        clip_ratio_c=1.5,
    )
    losses, counted = POLICY_LOSSES[loss_mode](inputs)
    counted["ppo_kl"] = columns["old_log_probs"] - log_probs()
    expected = aggregated(losses * weights, mode)
    assert loss == pytest.approx(expected) and metrics["pg_loss"] == pytest.approx(loss)
    assert {name: metrics[name] for name in counted} == pytest.approx(
        {name: aggregated(values, "token-mean") for name, values in counted.items()}
    )


def test_one_clip_ratio_is_both_sides():
    assert loss_of(clip_ratio=0.15)[0] == loss_of(clip_ratio_low=0.15, clip_ratio_high=0.15)[0]
    assert loss_of(clip_ratio=0.15)[0] != loss_of(clip_ratio=0.25)[0]


@pytest.mark.parametrize("mode", MODES)
def test_each_term_is_added_with_its_coefficient_and_told_as_a_mean_over_tokens(mode):
    columns = ragged_batch(torch.float64).batch
    divergence = kl_penalty(log_probs(), columns["ref_log_prob"], "low_var_kl")
    lost = likelihood_losses(
        columns["old_log_probs"], log_probs(), columns["advantages"], columns["response_mask"]
    )
    alone, metrics = loss_of(loss_agg_mode=mode)
    assert metrics["entropy"] == pytest.approx(aggregated(entropy(), "token-mean"))
    with_entropy, _ = loss_of(loss_agg_mode=mode, entropy_coeff=0.5)
    assert with_entropy == pytest.approx(alone - 0.5 * aggregated(entropy(), mode))
    with_kl, metrics = loss_of(
        loss_agg_mode=mode, use_kl_loss=True, kl_loss_coef=0.25, kl_loss_type="low_var_kl"
    )
    assert with_kl == pytest.approx(alone + 0.25 * aggregated(divergence, mode))
    assert metrics["kl_loss"] == pytest.approx(aggregated(divergence, "token-mean"))
    with_likelihood, metrics = loss_of(
        loss_agg_mode=mode, policy_loss=PolicyLossConfig(llds_coef=0.75)
    )
    assert with_likelihood == pytest.approx(alone + 0.75 * aggregated(lost, mode))
    assert metrics["likelihood_loss"] == pytest.approx(aggregated(lost, "token-mean"))


def test_engines_are_sent_what_they_compute_with(monkeypatch):
    sent = []

    class Sender:
        def __init__(self, *args, **kwargs):
            sent.append((args, kwargs))
            self.closed = False

        def close(self):
            self.closed = True

    monkeypatch.setattr(actor, "WeightSender", Sender)
    worker = ActorWorker.__new__(ActorWorker)
    worker.state = SimpleNamespace(model="model")
    worker.senders = {}
    worker.rollout = SimpleNamespace(dtype="bfloat16", tensor_model_parallel_size=2)
    worker.device = torch.device("cpu")
    worker.connect_engines("rollout", ["server"], colocated=False)
    first = worker.senders["rollout"]
    worker.connect_engines("rollout", ["another"], colocated=True)
    assert first.closed and not worker.senders["rollout"].closed
    assert sent == [
        (("model", ["server"], "cpu", torch.bfloat16), {"colocated": False, "ranks_per_server": 2}),
        (("model", ["another"], "cpu", torch.bfloat16), {"colocated": True, "ranks_per_server": 2}),
    ]


@pytest.mark.parametrize("coefficient", [0.0, 0.5, 1.0])
def test_an_update_is_given_what_is_configured(monkeypatch, coefficient):
    """Entropy has a gradient where it is in the loss, and costs no memory for one where it is
    not."""
    asked = []
    updated = []

    def forward(model, rows, temperature, with_entropy, entropy_grad):
        asked.append((model, temperature, with_entropy, entropy_grad))
        return log_probs(), entropy()

    def update(state, data, loss_fn, *, epochs, budget, grad_clip):
        updated.append((epochs, budget.max_tokens, budget.max_rows, grad_clip))
        loss_fn(data, COUNTS)
        return {}

    monkeypatch.setattr(actor, "forward_log_probs", forward)
    monkeypatch.setattr(actor, "update_mini_batches", update)
    worker = ActorWorker.__new__(ActorWorker)
    worker.state = SimpleNamespace(model="model")
    worker.device = torch.device("cpu")
    worker.rollout = SimpleNamespace(temperature=0.8)
    worker.config = ActorConfig(
        ppo_epochs=3,
        ppo_max_token_len_per_gpu=123,
        ppo_micro_batch_size_per_gpu=5,
        grad_clip=0.7,
        entropy_coeff=coefficient,
    )
    worker.update_actor(ragged_batch(torch.float64))
    assert updated == [(3, 123, 5, 0.7)]
    assert asked == [("model", 0.8, True, coefficient != 0)]


def recorded(monkeypatch, module) -> list:
    """What a worker of `module` asks of the forward pass: its budget, then its model and
    temperature."""
    asked = []

    def forward(model, rows, temperature):
        asked.append((model, temperature))
        return log_probs()

    def by_micro_batches(data, budget, device, forward):
        asked.append((budget.max_tokens, budget.max_rows))
        return forward(data)

    monkeypatch.setattr(module, "log_probs_of_rows", forward)
    monkeypatch.setattr(module, "map_micro_batches", by_micro_batches)
    return asked


def test_log_probs_are_those_at_the_temperature_of_sampling(monkeypatch):
    asked = recorded(monkeypatch, actor)
    worker = ActorWorker.__new__(ActorWorker)
    worker.state = SimpleNamespace(model="model")
    worker.device = torch.device("cpu")
    worker.rollout = SimpleNamespace(
        temperature=0.8, log_prob_max_token_len_per_gpu=123, log_prob_micro_batch_size_per_gpu=5
    )
    found = worker.compute_log_prob(ragged_batch(torch.float64))
    assert torch.equal(found.batch["old_log_probs"], log_probs())
    assert asked == [(123, 5), ("model", 0.8)]


def test_log_probs_of_the_reference_are_at_the_same_temperature(monkeypatch):
    asked = recorded(monkeypatch, reference)
    worker = ReferenceWorker.__new__(ReferenceWorker)
    worker.model = "model"
    worker.device = torch.device("cpu")
    worker.temperature = 0.8
    worker.config = SimpleNamespace(
        log_prob_max_token_len_per_gpu=123, log_prob_micro_batch_size_per_gpu=5
    )
    found = worker.compute_ref_log_prob(ragged_batch(torch.float64))
    assert torch.equal(found.batch["ref_log_prob"], log_probs())
    assert asked == [(123, 5), ("model", 0.8)]
