"""A trajectory of several rows: split where its context was written anew, and trained as if it were
one where the contexts are what they would have been anyway."""

import math

import numpy as np
import pytest
import torch

from tests.distributed import run_ranks
from tests.verl.batches import VOCAB, make_model
from verl.agent import Completion, Rewrite, Segment, Source, Trajectory, context_digest
from verl.protocol import DataProto
from verl.rollout.agent_worker import Job
from verl.single_controller.decorator import Dispatch, dispatch
from verl.single_controller.worker import Worker
from verl.trainer.config import AlgorithmConfig, RolloutCorrectionConfig
from verl.trainer.ppo.advantage import apply_kl_penalty, build_kl_controller, compute_advantage
from verl.trainer.ppo.batching import build_batch
from verl.trainer.ppo.core_algos import ADVANTAGE_ESTIMATORS, LOSS_AGG_MODES, POLICY_LOSSES
from verl.trainer.ppo.filters import correct_rollout, filter_loss
from verl.trainer.ppo.joined import Joined, one_of_each, sum_of_trajectory, with_seq_tokens
from verl.trainer.ppo.metrics import compute_data_metrics
from verl.workers.actor import policy_loss
from verl.workers.config import ActorConfig, FSDPConfig, ModelConfig, PolicyLossConfig
from verl.workers.forward import forward_log_probs
from verl.workers.fsdp_model import TrainState, build_model
from verl.workers.update import Budget, update_mini_batches

OF_ROWS = ("prompt_length", "response_length/", "response_length_observation", "state_tokens/cover")
"""Metrics of rows, which leave out what nothing is said after."""
NUM = 6
"""Trajectories, in groups of two."""


def completion(ids, context):
    return Completion(ids, [-0.5] * len(ids), "stop", None, 0, context_digest(context))


def trajectories(split: bool) -> list[Trajectory]:
    """Trajectories of one to three turns.

    Where they are split, each turn is a row of its own, whose prompt is all that stood before it:
    the tokens of the policy then have the same contexts as if nothing were split.
    """
    rng = np.random.default_rng(0)
    made = []
    for number in range(NUM):
        trajectory = Trajectory([int(t) for t in rng.integers(0, VOCAB, 3)])
        trajectory.reward = {"score": float(rng.integers(1, 3)) + 0.25 * number}
        trajectory.greedy_score = 1.0 + number // 2
        for turn in range(1 + number % 3):
            said = [int(t) for t in rng.integers(0, VOCAB, int(rng.integers(1, 5)))]
            shown = [int(t) for t in rng.integers(0, VOCAB, 2)]
            context = trajectory.token_ids
            if split and turn:
                trajectory.rewrites.append(Rewrite(len(trajectory.segments), context))
            paid = 0.125 * (turn + number % 4)
            segment = Segment(Source.MODEL, said, [-0.5] * len(said), 0, reward=paid)
            trajectory.segments.append(segment)
            trajectory.add_observation(shown)
        made.append(trajectory)
    return made


def make_batch(split: bool, world_size: int = 1) -> DataProto:
    jobs = [
        Job(f"group {number // 2}", f"{number}", {"data_source": "set"}, [], tree=number % 4)
        for number in range(NUM)
    ]
    batch = build_batch(
        jobs,
        trajectories(split),
        pad_token_id=0,
        num_mini_batches={"mini_batch": 2, "critic_mini_batch": 1},
        world_size=world_size,
        state_masking=True,
    )
    return with_numbers(batch)


def with_numbers(batch: DataProto) -> DataProto:
    """Log-probs and values that depend on a token's trajectory and its place there alone."""
    mask = batch.batch["response_mask"]
    joined = Joined.of(batch, mask)
    shape = joined.joined_mask.shape
    generator = torch.Generator().manual_seed(0)
    whole = {
        name: torch.randn(NUM, 40, generator=generator, dtype=torch.float64)[:, : shape[1]] - 3
        for name in ("old_log_probs", "ref_log_prob", "values", "rollout_log_probs")
    }
    columns = {name: joined.split(w) for name, w in whole.items()}
    # a rewritten context is another state than an observation, so that states would differ
    return batch.with_tensors(states=batch.batch["turns"] % 2, **columns)


def by_trajectory(batch: DataProto, column: torch.Tensor) -> torch.Tensor:
    return Joined.of(batch, batch.batch["response_mask"]).join(column)


def test_rows_of_a_trajectory_and_their_turns():
    trajectory = Trajectory([1, 2])
    trajectory.add_completion(completion([3], [1, 2]))
    trajectory.add_observation([4])
    trajectory.rewrite([1, 2, 9])
    assert trajectory.token_ids == [1, 2, 9]
    trajectory.add_completion(completion([5, 6], [1, 2, 9]))
    assert trajectory.context_violations == 0
    trajectory.rewrite([1, 2, 9, 5, 6, 7])
    assert len(trajectory.rewrites) == 1, "what only adds to the context is an observation"
    assert trajectory.segments[-1].token_ids == [7]
    trajectory.rewrite([1, 8])
    trajectory.add_observation([9])
    rows = trajectory.rows
    assert [row.prompt_ids for row in rows] == [[1, 2], [1, 2, 9]], (
        "nothing was sampled in the third"
    )
    assert [row.first_turn for row in rows] == [0, 1]
    assert trajectory.response_ids == [3, 4, 5, 6, 7, 9]
    trajectory.add_completion(completion([1], [1, 2]))
    assert trajectory.context_violations == 1


def test_every_row_trains_its_own_tokens_once_and_has_what_its_turns_are_paid():
    whole = make_batch(split=False)
    split = make_batch(split=True)
    assert len(whole) == NUM and len(split) == 2 * (1 + 2 + 3)
    for column in ("responses", "turns", "policy_versions", "token_level_scores"):
        assert torch.equal(
            by_trajectory(whole, whole.batch[column]), by_trajectory(split, split.batch[column])
        ), column
    scores = sum_of_trajectory(split.batch["token_level_scores"].sum(-1), split)
    expected = [trajectory.reward["score"] for trajectory in trajectories(split=True)]
    assert scores[one_of_each(split)].tolist() == expected
    for name in ("mini_batch", "critic_mini_batch"):
        of = dict(zip(split.batch["trajectory"].tolist(), split.batch[name].tolist(), strict=True))
        pairs = zip(split.batch["trajectory"].tolist(), split.batch[name].tolist(), strict=True)
        assert all(of[trajectory] == index for trajectory, index in pairs)
        assert of == dict(
            zip(whole.batch["trajectory"].tolist(), whole.batch[name].tolist(), strict=True)
        )


@pytest.mark.parametrize("name", ADVANTAGE_ESTIMATORS)
@pytest.mark.parametrize("kl", [False, True])
def test_advantages_are_those_of_whole_trajectories(name, kl):
    config = AlgorithmConfig(adv_estimator=name, gamma=0.9, lam=0.8, use_kl_in_reward=kl)
    found = []
    for batch in (make_batch(split=False), make_batch(split=True)):
        controller = build_kl_controller(config)
        rewarded, _ = apply_kl_penalty(batch, config, controller)
        done, metrics = compute_advantage(rewarded, config)
        tensors = [by_trajectory(done, done.batch[c]) for c in ("advantages", "returns")]
        figures = compute_data_metrics(done, max_length=100)
        figures = {k: v for k, v in figures.items() if not k.startswith(OF_ROWS)}
        found.append((tensors, metrics, figures))
    (whole, metrics, figures), (split, split_metrics, split_figures) = found
    for a, b in zip(whole, split, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert metrics == split_metrics
    assert split_figures.pop("rows/mean") == 2
    assert split_figures == pytest.approx(figures, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
def test_corrections_and_filters_are_those_of_whole_trajectories(level):
    config = RolloutCorrectionConfig(rollout_is=level, rollout_rs=level, rollout_rs_threshold=3.0)
    found = []
    for batch in (make_batch(split=False), make_batch(split=True)):
        weights, metrics = correct_rollout(batch, config)
        left, shares = filter_loss(batch, ["zero_variance", "truncated"])
        columns = (weights.batch["rollout_is_weights"], weights.batch["response_mask"])
        tensors = [by_trajectory(batch, column) for column in columns]
        tensors.append(by_trajectory(batch, left.batch["response_mask"]))
        found.append((tensors, metrics | shares))
    (whole, metrics), (split, split_metrics) = found
    for a, b in zip(whole, split, strict=True):
        torch.testing.assert_close(a, b)
    assert split_metrics == pytest.approx(metrics)


def test_nothing_that_is_left_to_train_is_no_error():
    batch = make_batch(split=True)
    nothing = torch.zeros_like(batch.batch["response_mask"])
    batch = batch.with_tensors(response_mask=nothing)
    config = RolloutCorrectionConfig(rollout_is="sequence", rollout_rs="geometric")
    corrected, _ = correct_rollout(batch, config)
    assert not corrected.batch["response_mask"].any()


def gradients(model_path: str, cases: list[tuple[bool, ActorConfig]]) -> list[torch.Tensor]:
    """The gradient of each mini-batch, all of them in one vector for each case."""
    worker = Worker()
    fsdp = FSDPConfig.model_construct(
        model_dtype="float64", dtype="float64", param_offload=False, reshard_after_forward=True
    )
    model = build_model(
        ModelConfig(path=model_path, enable_gradient_checkpointing=False), "lm", fsdp, worker.mesh
    )
    found = []
    for split, config in cases:
        seen: list[torch.Tensor] = []
        optimizer = Recorder(model.parameters(), seen)
        state = TrainState(model, optimizer, peak_lr=1.0, schedule=lambda ticks: 1.0)
        batch = make_batch(split, worker.world_size)
        batch, _ = apply_kl_penalty(
            batch, AlgorithmConfig(), build_kl_controller(AlgorithmConfig())
        )
        batch, _ = compute_advantage(batch, AlgorithmConfig(adv_estimator="grpo"))
        batch = with_seq_tokens(batch)
        (mine,) = dispatch(Dispatch.DP_COMPUTE_PROTO, worker.world_size, (batch,))[worker.rank]

        def loss_fn(rows, counts, config=config):
            log_probs, entropy = forward_log_probs(model, rows, 1.0, with_entropy=True)
            return policy_loss(config, log_probs, entropy, rows, counts)

        update_mini_batches(state, mine, loss_fn, epochs=1, budget=Budget(40), grad_clip=1e9)
        found.append(torch.cat(seen))
    return found


class Recorder(torch.optim.SGD):
    """Keeps the whole gradients instead of stepping."""

    def __init__(self, parameters, seen):
        super().__init__(parameters, lr=1.0)
        self.seen = seen

    def step(self, closure=None):
        self.seen += [
            p.grad.full_tensor().flatten() for g in self.param_groups for p in g["params"]
        ]


SETTINGS = [
    *(
        {"loss_agg_mode": mode}
        | ({"loss_scale_factor": 7.0} if mode == "seq-mean-token-sum-norm" else {})
        for mode in LOSS_AGG_MODES
    ),
    *(
        {"policy_loss": PolicyLossConfig(loss_mode=name)}
        for name in POLICY_LOSSES
        if name not in ("gspo", "geo_mean")  # their ratio is that of a row
    ),
    {"use_kl_loss": True, "kl_loss_coef": 0.1, "entropy_coeff": 0.01},
]


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_gradient_is_that_of_whole_trajectories(tmp_path, ranks):
    """The same contexts, in one row or in several. The model's norms compute in float32."""
    configs = [ActorConfig(**settings) for settings in SETTINGS]
    cases = [(split, config) for config in configs for split in (False, True)]
    found = run_ranks(ranks, gradients, make_model(tmp_path), cases)[0]
    for settings, whole, split in zip(SETTINGS, found[::2], found[1::2], strict=True):
        scale = whole.abs().max()
        assert scale > 1e-6 and math.isfinite(scale)
        assert float((whole - split).abs().max() / scale) <= 1e-6, settings
