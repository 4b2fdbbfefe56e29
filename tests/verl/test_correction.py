"""Correction for another sampler: weights and masks against loops over plain floats, by hand, and
on spoilt input."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.verl.drawn import JUNK, masks, normal, with_junk
from verl.protocol import DataProto
from verl.trainer.config import RolloutCorrectionConfig
from verl.trainer.ppo.core_algos import accepted, importance_weights, log_ratios, mismatch
from verl.trainer.ppo.filters import correct_rollout

LEVELS = ["token", "sequence", "geometric"]


def twin_ratios(row, level):
    """The ratio that each token of a sequence has at a level."""
    if level == "token":
        return [math.exp(x) for x in row]
    whole = sum(row) if level == "sequence" else sum(row) / max(1, len(row))
    return [math.exp(min(20.0, max(-20.0, whole)))] * len(row)


@pytest.mark.parametrize("level", LEVELS)
@given(
    mask=masks(),
    seed=st.integers(0, 99),
    junk=st.sampled_from(JUNK),
    veto=st.sampled_from([None, 0.1, 0.6]),
)
@settings(max_examples=40, deadline=None)
def test_weights_and_masks_twin(level, mask, seed, junk, veto):
    old = normal(mask, seed) - 3
    sampled = normal(mask, seed + 1) - 3
    log_ratio = log_ratios(with_junk(old, mask, junk), with_junk(sampled, mask, junk), mask)
    weights = importance_weights(log_ratio, mask, level, 1.5)
    keep = accepted(log_ratio, mask, level, 0.5, 1.5, veto)
    for row, bits in enumerate(mask.tolist()):
        at = [t for t, m in enumerate(bits) if m]
        gaps = [(old - sampled)[row, t].item() for t in at]
        vetoed = veto is not None and any(math.exp(gap) < veto for gap in gaps)
        for t, ratio in zip(at, twin_ratios(gaps, level), strict=True):
            assert weights[row, t].item() == pytest.approx(min(ratio, 1.5), rel=1e-9)
            assert bool(keep[row, t]) == (0.5 <= ratio <= 1.5 and not vetoed)
    assert not keep[~mask.bool()].any() and (weights[~mask.bool()] == 0).all()


def test_mismatch_by_hand():
    # ratios 1 and e^-.5 of trainer over sampler; a masked token holds anything
    old = torch.tensor([[-1.0, -2.5, math.nan]])
    sampled = torch.tensor([[-1.0, -2.0, math.inf]])
    found = mismatch(old, sampled, torch.tensor([[1, 1, 0]]))
    assert found["kl"] == pytest.approx(0.25) and found["diff_max"] == pytest.approx(0.5)
    assert found["k3_kl"] == pytest.approx((math.exp(-0.5) - 1 + 0.5) / 2)
    assert found["ratio/max"] == 1 and found["ratio/p50"] == pytest.approx((1 + math.exp(-0.5)) / 2)
    assert found["ppl_ratio"] == pytest.approx(math.exp(-0.25)) and found[
        "diff_mean"
    ] == pytest.approx(0.25)
    assert mismatch(old, sampled, torch.zeros(1, 3))["ratio/max"] == 1


def batch():
    return DataProto.from_dict(
        {
            "old_log_probs": torch.tensor([[-1.0, -9.0, -1.0], [-1.0, 0.0, -3.0]]),
            "rollout_log_probs": torch.tensor([[-1.0, -1.0, -1.0], [-1.5, 0.0, -3.0]]),
            "response_mask": torch.tensor(
                [[1, 1, 1], [1, 1, 1]]
            ),  # an observation is trained on: the ablation
            "turns": torch.tensor([[0, 0, 0], [0, -1, 1]]),
        }
    )


def test_what_the_loss_sees():
    plain, metrics = correct_rollout(batch(), RolloutCorrectionConfig())
    assert "rollout_is_weights" not in plain.batch and metrics["rollout_corr/diff_max"] == 8.0
    assert "rollout_corr/left_out" not in metrics
    weighed, metrics = correct_rollout(
        batch(), RolloutCorrectionConfig(rollout_is="token", rollout_is_threshold=1.2)
    )
    expected = torch.tensor([[1.0, math.exp(-8), 1.0], [1.2, 1.0, 1.0]])
    torch.testing.assert_close(weighed.batch["rollout_is_weights"], expected)
    assert metrics["rollout_corr/is_weight/max"] == pytest.approx(1.2)
    vetoed, metrics = correct_rollout(
        batch(), RolloutCorrectionConfig(rollout_token_veto_threshold=1e-3)
    )
    assert vetoed.batch["response_mask"].tolist() == [[0, 0, 0], [1, 1, 1]]
    assert metrics["rollout_corr/left_out"] == pytest.approx(3 / 5)
    masked, _ = correct_rollout(
        batch(), RolloutCorrectionConfig(rollout_rs="token", rollout_rs_threshold=1.5)
    )
    assert masked.batch["response_mask"].tolist() == [[1, 0, 1], [0, 1, 1]], (
        "e^.5 is above 1.5; the observation stays"
    )


def test_another_level_is_refused():
    with pytest.raises(ValueError, match="expected one of token, sequence, geometric"):
        importance_weights(torch.zeros(1, 1), torch.ones(1, 1), "paragraph", 2.0)
