"""The gradient of a mini-batch depends on neither micro-batch size nor the number of ranks, nor on
who holds what."""

from types import SimpleNamespace

import pytest
import torch

from tests.distributed import run_ranks
from tests.verl.batches import make_model, ragged_batch
from verl.protocol import DataProto
from verl.single_controller.decorator import Dispatch, dispatch
from verl.single_controller.worker import Worker
from verl.workers import update as update_module
from verl.workers.actor import policy_loss
from verl.workers.config import ActorConfig, FSDPConfig, ModelConfig, PolicyLossConfig
from verl.workers.forward import forward_log_probs
from verl.workers.fsdp_model import TrainState, build_model
from verl.workers.update import Budget, update_mini_batches

ACTOR = ActorConfig(use_kl_loss=True, kl_loss_coef=0.1, entropy_coeff=0.01)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


class Recorder(torch.optim.SGD):
    """Keeps the whole gradients instead of stepping."""

    def step(self, closure=None):
        self.seen = [p.grad.full_tensor().clone() for g in self.param_groups for p in g["params"]]


def gradients(model_path: str, cases: list[tuple]) -> list[tuple[list[torch.Tensor], dict]]:
    return [gradient(model_path, *case) for case in cases]


def gradient(
    model_path: str, dtype: str, micro: int, sizes: list[int] | None
) -> tuple[list[torch.Tensor], dict]:
    worker = Worker()
    fsdp = FSDPConfig.model_construct(
        model_dtype=dtype, dtype=dtype, param_offload=False, reshard_after_forward=True
    )
    model = build_model(
        ModelConfig(path=model_path, enable_gradient_checkpointing=False), "lm", fsdp, worker.mesh
    )
    optimizer = Recorder(model.parameters(), lr=1.0)
    state = TrainState(model, optimizer, peak_lr=1.0, schedule=lambda ticks: 1.0)
    batch = ragged_batch(getattr(torch, dtype))
    if sizes is not None:
        batch.meta_info["rank_sizes"] = sizes
    (mine,) = dispatch(Dispatch.DP_COMPUTE_PROTO, worker.world_size, (batch,))[worker.rank]

    def loss_fn(rows, counts):
        log_probs, entropy = forward_log_probs(model, rows, 1.0, with_entropy=True)
        return policy_loss(ACTOR, log_probs, entropy, rows, counts)

    metrics = update_mini_batches(
        state, mine, loss_fn, epochs=1, budget=Budget(1000, micro), grad_clip=1e9
    )
    return optimizer.seen, metrics


@pytest.fixture(scope="module")
def all_gradients(model_path):
    """By dtype: one rank with micro-batches of 16, 4, 1; two ranks with equal and unequal
    shares."""
    one = [(16, None), (4, None), (1, None)]
    two = [(4, None), (4, [11, 5]), (1, [15, 1])]
    dtypes = ("float32", "float64")
    results = [
        run_ranks(
            ranks, gradients, model_path, [(dtype, *case) for dtype in dtypes for case in cases]
        )[0]
        for ranks, cases in ((1, one), (2, two))
    ]
    return {
        dtype: [r for result in results for r in result[3 * i : 3 * i + 3]]
        for i, dtype in enumerate(dtypes)
    }


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-10)])
def test_gradient_ignores_micro_batches_and_ranks(all_gradients, dtype, tolerance):
    (reference, metrics), *others = all_gradients[dtype]
    scale = torch.stack([g.abs().max() for g in reference]).max()
    assert scale > 1e-3
    for grads, other_metrics in others:
        for a, b in zip(reference, grads, strict=True):
            assert float((a - b).abs().max() / scale) <= tolerance
        assert other_metrics == pytest.approx(metrics, rel=1e-4, abs=1e-6)


def diverging_step(model_path: str) -> tuple[float, bool]:
    worker = Worker()
    fsdp = FSDPConfig(model_dtype="float32", dtype="float32")
    model = build_model(
        ModelConfig(path=model_path, enable_gradient_checkpointing=True), "lm", fsdp, worker.mesh
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    state = TrainState(model, optimizer, peak_lr=1.0, schedule=lambda ticks: 1.0)
    before = [p.full_tensor().clone() for p in model.parameters()]
    batch = ragged_batch(torch.float32)
    batch.batch["advantages"][0, 0] = torch.nan  # on one rank only
    (mine,) = dispatch(Dispatch.DP_COMPUTE_PROTO, worker.world_size, (batch,))[worker.rank]

    def loss_fn(rows, counts):
        log_probs, entropy = forward_log_probs(model, rows, 1.0, with_entropy=True)
        return policy_loss(ACTOR, log_probs, entropy, rows, counts)

    metrics = update_mini_batches(state, mine, loss_fn, epochs=1, budget=Budget(24), grad_clip=1.0)
    same = all(
        torch.equal(a, p.full_tensor()) for a, p in zip(before, model.parameters(), strict=True)
    )
    return metrics["skipped_steps"], same


def test_nan_on_one_rank_skips_the_step_on_all(model_path):
    assert run_ranks(2, diverging_step, model_path) == [(1.0, True), (1.0, True)]


class CountingSGD(torch.optim.SGD):
    """Counts its steps and takes them."""

    taken = 0

    def step(self, closure=None):
        self.taken += 1
        return super().step(closure)


def update(
    model_path: str, batch: DataProto, config: ActorConfig
) -> tuple[dict, int, list[torch.Tensor]]:
    """Metrics, optimizer steps taken, and the weights after `update_mini_batches` on one of the
    ranks."""
    worker = Worker()
    fsdp = FSDPConfig(model_dtype="float32", dtype="float32")
    model = build_model(
        ModelConfig(path=model_path, enable_gradient_checkpointing=False), "lm", fsdp, worker.mesh
    )
    optimizer = CountingSGD(model.parameters(), lr=0.1)
    state = TrainState(model, optimizer, peak_lr=0.1, schedule=lambda ticks: 0.5**ticks)
    (mine,) = dispatch(Dispatch.DP_COMPUTE_PROTO, worker.world_size, (batch,))[worker.rank]

    def loss_fn(rows, counts):
        log_probs, entropy = forward_log_probs(model, rows, 1.0, with_entropy=True)
        return policy_loss(config, log_probs, entropy, rows, counts)

    metrics = update_mini_batches(
        state, mine, loss_fn, epochs=1, budget=Budget(1000, 2), grad_clip=1e9
    )
    return metrics, optimizer.taken, [p.full_tensor().detach().clone() for p in model.parameters()]


def updates(model_path: str, cases: list[tuple[DataProto, ActorConfig]]) -> list[tuple]:
    return [update(model_path, *case) for case in cases]


def emptied(rows: torch.Tensor) -> DataProto:
    """The ragged batch with the response masks of `rows` [B] emptied, as loss filters do."""
    batch = ragged_batch(torch.float32)
    return batch.with_tensors(response_mask=batch.batch["response_mask"] * ~rows.unsqueeze(1))


@pytest.mark.parametrize("ranks", [1, 2])
def test_emptied_rows_are_no_trajectories(model_path, ranks):
    """Half of the rows filtered is the same step as those rows never there, under every
    aggregation."""
    out = torch.arange(len(ragged_batch(torch.float32))) % 2 == 0
    filtered = emptied(out)
    cases = []
    for mode in (
        "token-mean",
        "token-sum",
        "seq-mean-token-mean",
        "seq-mean-token-sum",
        "seq-mean-token-sum-norm",
    ):
        config = ActorConfig(loss_agg_mode=mode, loss_scale_factor=9, use_kl_loss=True)
        cases += [(filtered, config), (filtered[~out], config)]
    found = run_ranks(ranks, updates, model_path, cases)[0]
    for (metrics, _, weights), (expected, _, others) in zip(found[::2], found[1::2], strict=True):
        assert metrics == pytest.approx(expected, rel=1e-5, abs=1e-7)
        for one, other in zip(weights, others, strict=True):
            assert torch.allclose(one, other, rtol=0, atol=1e-6)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_mini_batch_without_a_trained_token_takes_no_step_and_counts_nowhere(model_path, ranks):
    second = torch.arange(len(ragged_batch(torch.float32))) >= 8
    both = emptied(second).with_tensors(mini_batch=second.long())
    both.meta_info["num_mini_batches"] = {"mini_batch": 2}
    both.meta_info["rank_sizes"] = [16] if ranks == 1 else [9, 7]
    first = emptied(second)[~second]
    nothing = emptied(torch.ones(16, dtype=torch.bool))
    cases = [(both, ActorConfig()), (first, ActorConfig()), (nothing, ActorConfig())]
    with_empty, alone, empty = run_ranks(ranks, updates, model_path, cases)[0]
    assert with_empty[0] == pytest.approx(alone[0], rel=1e-5) and with_empty[1] == alone[1] == 1
    assert empty[0] == {"skipped_steps": 0, "optimizer_steps": 0, "lr": 0.1} and empty[1] == 0


def test_the_optimizer_is_loaded_while_it_steps_and_no_longer(monkeypatch):
    """Two mini-batches of the critic, twice; one row of the second has no trained token."""
    said = []
    last = torch.arange(len(ragged_batch(torch.float32))) == 15
    monkeypatch.setattr(update_module, "reduce_sum", lambda values, device: values)
    monkeypatch.setattr(update_module, "run_micro_batches", lambda rows, budget, device: [rows])
    monkeypatch.setattr(update_module, "dist", SimpleNamespace(get_world_size=lambda: 1))
    state = SimpleNamespace(
        load_optimizer=lambda device: said.append("load"),
        offload_optimizer=lambda: said.append("offload"),
        tick=lambda: said.append("tick"),
        lr=0.1,
    )

    def loss_fn(rows, counts):
        said.append(f"step on {len(rows)} rows")
        return torch.tensor(float(len(said)), requires_grad=True), {}

    def step(state, totals, grad_clip, device):
        return {**totals, "skipped_steps": 0.0}

    monkeypatch.setattr(update_module, "optimizer_step", step)
    metrics = update_mini_batches(
        state,
        emptied(last),
        loss_fn,
        epochs=2,
        budget=Budget(100),
        grad_clip=1.0,
        column="critic_mini_batch",
    )
    assert said == ["load", *["step on 8 rows", "step on 7 rows"] * 2, "offload", "tick"]
    assert metrics == {
        "loss": (2 + 3 + 4 + 5) / 4,
        "skipped_steps": 0,
        "optimizer_steps": 4,
        "lr": 0.1,
    }


@pytest.mark.parametrize(
    ("model", "rows"), [({}, 5), ({"packs_rows": True}, 5), ({"packs_rows": False}, 1)]
)
def test_rows_that_would_not_stay_apart_pass_alone(model, rows):
    assert Budget.of(SimpleNamespace(**model), 100, 5) == Budget(100, rows)


def test_the_rate_that_is_logged_is_that_of_the_steps(model_path):
    ((metrics, _, _),) = run_ranks(
        1, updates, model_path, [(ragged_batch(torch.float32), ActorConfig())]
    )[0]
    assert metrics["lr"] == 0.1, "the schedule has halved it since"


def test_entropy_and_kl_are_means_over_tokens_whatever_the_aggregation(model_path):
    """Bounds of the collapse watch must mean the same in every run."""
    modes = (
        "token-mean",
        "token-sum",
        "seq-mean-token-mean",
        "seq-mean-token-sum",
        "seq-mean-token-sum-norm",
    )
    configs = [
        ActorConfig(
            loss_agg_mode=mode,
            loss_scale_factor=9,
            use_kl_loss=True,
            policy_loss=PolicyLossConfig(llds_coef=0.1),
        )
        for mode in modes
    ]
    batch = ragged_batch(torch.float32)
    found = run_ranks(1, updates, model_path, [(batch, config) for config in configs])[0]
    per_token = ("entropy", "kl_loss", "likelihood_loss", "ppo_kl", "pg_clipfrac")
    means = [{name: metrics[name] for name in per_token} for metrics, _, _ in found]
    assert all(mean == pytest.approx(means[0], rel=1e-5) for mean in means)
    assert len({round(metrics["pg_loss"], 4) for metrics, _, _ in found}) > 1, (
        "the loss is aggregated as configured"
    )
