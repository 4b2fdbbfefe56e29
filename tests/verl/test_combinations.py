"""Every advantage with every loss and aggregation, each of these with every correction, on tensors;
and which the configuration refuses."""

from itertools import product

import numpy as np
import pytest
import torch

from tests.configs import composed
from tests.verl.batches import RESPONSE, ROWS, ragged_batch
from verl.protocol import DataProto
from verl.trainer.checks import combination_problems
from verl.trainer.config import AlgorithmConfig, PPOConfig, RolloutCorrectionConfig
from verl.trainer.ppo.advantage import compute_advantage
from verl.trainer.ppo.core_algos import ADVANTAGE_ESTIMATORS, LOSS_AGG_MODES, POLICY_LOSSES
from verl.trainer.ppo.filters import FILTERS, correct_rollout, filter_loss
from verl.workers.actor import policy_loss
from verl.workers.config import ActorConfig, PolicyLossConfig
from verl.workers.update import Counts

CORRECTIONS = [
    RolloutCorrectionConfig(),
    *(RolloutCorrectionConfig(rollout_is=level) for level in ("token", "sequence", "geometric")),
    *(
        RolloutCorrectionConfig(rollout_rs=s, rollout_rs_threshold=1.1)
        for s in ("token", "sequence", "geometric")
    ),
    RolloutCorrectionConfig(
        rollout_is="token", rollout_rs="geometric", rollout_token_veto_threshold=0.7
    ),
]


def batch() -> DataProto:
    """Ragged trajectories in groups of four with a reward each, one row without a token of the
    policy."""
    data = ragged_batch(torch.float64)
    g = torch.Generator().manual_seed(3)
    mask = data.batch["response_mask"].clone()
    mask[5] = 0
    rewards = torch.zeros(ROWS, RESPONSE, dtype=torch.float64)
    last = torch.where(mask.bool(), torch.arange(RESPONSE), -1).amax(1)
    for row in range(ROWS):
        if last[row] >= 0:
            rewards[row, last[row]] = float(torch.rand(1, generator=g) < 0.5)
    turns = torch.where(mask.bool(), (torch.arange(RESPONSE) > 2).int().expand_as(mask), -1)
    junk = torch.where(mask.bool(), 0.0, torch.nan)
    noise = 0.1 * torch.randn(ROWS, RESPONSE, generator=g, dtype=torch.float64)
    return DataProto.from_dict(
        {
            **data.batch,
            "response_mask": mask,
            "token_level_scores": rewards + junk,
            "token_level_rewards": rewards + junk,
            "values": noise + junk,
            "rollout_log_probs": data.batch["old_log_probs"] + noise + junk,
            "turns": turns,
            "states": torch.where(mask.bool(), turns % 2, -1).long(),
            "trees": torch.arange(ROWS) // 2 % 2,
            "greedy_scores": torch.linspace(0, 1, ROWS // 4).double().repeat_interleave(4),
            "truncated": torch.arange(ROWS) == 3,
            "void_turns": torch.zeros(ROWS, dtype=torch.long),
        },
        {"uid": np.repeat(np.arange(ROWS // 4), 4).astype(object)},
        {"num_mini_batches": {"mini_batch": 1}},
    )


def test_there_are_enough_estimators_for_every_loss_to_meet_every_correction():
    assert len(ADVANTAGE_ESTIMATORS) >= len(CORRECTIONS)


@pytest.mark.parametrize("estimator", ADVANTAGE_ESTIMATORS)
def test_finite_losses_and_no_gradient_where_masked(estimator):
    data, _ = compute_advantage(batch(), AlgorithmConfig(adv_estimator=estimator))
    policy = data.batch["response_mask"].bool()
    assert (
        data.batch["advantages"].isfinite().all() and (data.batch["advantages"][~policy] == 0).all()
    )
    data, _ = filter_loss(data, list(FILTERS))
    moved = torch.randn(
        ROWS, RESPONSE, generator=torch.Generator().manual_seed(4), dtype=torch.float64
    )
    # a loss knows of the estimator by the advantages alone, so corrections take turns among them
    turn = list(ADVANTAGE_ESTIMATORS).index(estimator)
    for place, (mode, agg) in enumerate(product(POLICY_LOSSES, LOSS_AGG_MODES)):
        correction = CORRECTIONS[(place + turn) % len(CORRECTIONS)]
        rows, metrics = correct_rollout(data, correction)
        log_probs = (data.batch["old_log_probs"] + 0.1 * moved).requires_grad_()
        config = ActorConfig(
            policy_loss=PolicyLossConfig(loss_mode=mode, llds_coef=0.1),
            loss_agg_mode=agg,
            loss_scale_factor=10,
            use_kl_loss=True,
            entropy_coeff=0.01,
        )
        mask = rows.batch["response_mask"].bool()
        counts = Counts(int(mask.sum()), int(mask.any(1).sum()))
        loss, figures = policy_loss(config, log_probs, torch.ones_like(moved), rows, counts)
        loss.backward()
        what = (estimator, mode, agg, correction)
        assert loss.isfinite() and log_probs.grad is not None and log_probs.grad.isfinite().all(), (
            what
        )
        assert (log_probs.grad[~mask] == 0).all() and mask.any(), what
        assert all(
            torch.as_tensor(x).isfinite().all() for x in [*figures.values(), *metrics.values()]
        ), what


def test_the_configuration_says_why_it_refuses():
    raw = composed("grpo")
    raw = {key: raw[key] for key in PPOConfig.model_fields}
    refused = 0
    for estimator, mode, agg in product(ADVANTAGE_ESTIMATORS, POLICY_LOSSES, LOSS_AGG_MODES):
        raw["algorithm"]["adv_estimator"] = estimator
        actor = raw["actor_rollout_ref"]["actor"]
        actor["policy_loss"]["loss_mode"] = mode
        actor["loss_agg_mode"] = agg
        actor["loss_scale_factor"] = 100 if agg == "seq-mean-token-sum-norm" else None
        raw["critic"]["loss_agg_mode"] = "token-mean"
        # the group of five is one tree
        rounds = 4 if estimator == "tree_grpo" else 0
        raw["actor_rollout_ref"]["rollout"]["branches"]["rounds"] = rounds
        is_taught = estimator == "none"
        raw["teacher"]["weight"] = 1.0 if is_taught else 0.0
        policy = raw["actor_rollout_ref"]["model"]["path"]
        raw["teacher"]["model"]["path"] = "/teacher" if is_taught else policy
        problems = combination_problems(PPOConfig.model_validate(raw))
        wrong = (mode in ("gspo", "geo_mean") and agg != "seq-mean-token-mean") + (
            estimator == "dr_grpo" and agg not in ("token-sum", "seq-mean-token-sum-norm")
        )
        by_token = ("gae", "turn_level", "gigpo", "igpo", "none")
        wrong += mode == "geo_mean" and estimator in by_token
        assert len(problems) == wrong
        assert all(agg in problem or mode in problem for problem in problems)
        assert all(":" in problem for problem in problems)
        refused += bool(problems)
    assert 0 < refused < len(ADVANTAGE_ESTIMATORS) * len(POLICY_LOSSES) * len(LOSS_AGG_MODES)
