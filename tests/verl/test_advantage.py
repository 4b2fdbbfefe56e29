"""The configuration reaches the functions that make advantages; each of those is tested in
test_core_algos.py."""

import numpy as np
import pytest
import torch

from verl.protocol import DataProto
from verl.trainer.config import AlgorithmConfig
from verl.trainer.ppo import core_algos
from verl.trainer.ppo.advantage import (
    add_distillation,
    apply_kl_penalty,
    build_kl_controller,
    compute_advantage,
)

ROWS = 5
RESPONSE = 5
GAMMA = 0.9
LAM = 0.7
MASK = torch.tensor(
    [[1, 1, 0, 1, 1], [1, 1, 1, 0, 0], [1, 0, 1, 1, 0], [1, 1, 1, 1, 1], [1, 1, 0, 0, 1]]
)
TURNS = torch.where(MASK.bool(), torch.tensor([0, 0, 0, 1, 1]), -1)
STATES = torch.where(MASK.bool(), torch.tensor([[7, 7, 7, k, k] for k in (1, 1, 1, 1, 2)]), -1)
"""All began with 7; before turn 1 all but the last row read 1."""
STEP_W = 0.5
TREES = torch.tensor([0, 0, 0, 0, 1])
GREEDY = torch.tensor([0.3, 0.3, -0.2, -0.2, -0.2])
GROUPS = np.array(["a", "a", "b", "b", "b"], dtype=object)
"""One of two and one of three: of two scores the median, too, is the mean."""


def rewards() -> torch.Tensor:
    """Numbers [B, R] that differ everywhere, 0 where masked."""
    values = torch.randn(ROWS, RESPONSE, generator=torch.Generator().manual_seed(0))
    return torch.where(MASK.bool(), values, 0.0)


def batch() -> DataProto:
    columns = {
        "response_mask": MASK,
        "token_level_scores": rewards(),
        "token_level_rewards": rewards(),
        "old_log_probs": torch.full((ROWS, RESPONSE), -1.0),
        "ref_log_prob": torch.full((ROWS, RESPONSE), -1.5),
        "values": rewards().flip(0),
        "turns": TURNS,
        "states": STATES,
        "greedy_scores": GREEDY,
        "trees": TREES,
    }
    return DataProto.from_dict(columns, {"uid": GROUPS})


EXPECTED = {
    "gae": lambda: core_algos.compute_gae_advantage_return(
        rewards(), rewards().flip(0), MASK, GAMMA, LAM
    ),
    "grpo": lambda: core_algos.compute_grpo_outcome_advantage(rewards(), MASK, GROUPS),
    "dr_grpo": lambda: core_algos.compute_grpo_outcome_advantage(
        rewards(), MASK, GROUPS, norm_adv_by_std_in_grpo=False
    ),
    "rloo": lambda: core_algos.compute_rloo_outcome_advantage(rewards(), MASK, GROUPS),
    "opo": lambda: core_algos.compute_opo_outcome_advantage(rewards(), MASK, GROUPS),
    "grpo_passk": lambda: core_algos.compute_grpo_passk_outcome_advantage(rewards(), MASK, GROUPS),
    "maxrl": lambda: core_algos.compute_maxrl_outcome_advantage(rewards(), MASK, GROUPS),
    "tree_grpo": lambda: core_algos.compute_tree_grpo_outcome_advantage(
        rewards(), MASK, GROUPS, TREES
    ),
    "reinforce": lambda: core_algos.compute_reinforce_advantage(rewards(), MASK, GAMMA),
    "remax": lambda: core_algos.compute_remax_outcome_advantage(rewards(), MASK, GREEDY),
    "reinforce_plus_plus": lambda: core_algos.compute_reinforce_plus_plus_outcome_advantage(
        rewards(), MASK, GAMMA
    ),
    "reinforce_plus_plus_baseline": lambda: (
        core_algos.compute_reinforce_plus_plus_baseline_outcome_advantage(rewards(), MASK, GROUPS)
    ),
    "turn_level": lambda: core_algos.compute_turn_level_advantage(rewards(), MASK, GROUPS, TURNS),
    "gigpo": lambda: core_algos.compute_gigpo_advantage(
        rewards(), MASK, GROUPS, TURNS, STATES, GAMMA, STEP_W
    ),
    "igpo": lambda: core_algos.compute_igpo_advantage(rewards(), MASK, GROUPS, TURNS, GAMMA),
    "none": lambda: (torch.zeros(ROWS, RESPONSE), torch.zeros(ROWS, RESPONSE)),
}


def configured(name: str) -> AlgorithmConfig:
    return AlgorithmConfig(adv_estimator=name, gamma=GAMMA, lam=LAM, step_advantage_w=STEP_W)


def test_every_estimator_is_among_these():
    assert list(EXPECTED) == list(core_algos.ADVANTAGE_ESTIMATORS)


@pytest.mark.parametrize("name", EXPECTED)
@pytest.mark.parametrize("column", ["uid", "values"])
def test_an_estimator_says_what_it_needs(name, column):
    """Without groups or values it fails where it uses them, and gives the same where not."""
    data = batch()
    (data.non_tensor_batch if column == "uid" else data.batch).pop(column)
    estimator = core_algos.ADVANTAGE_ESTIMATORS[name]
    config = configured(name)
    if estimator.uses_groups if column == "uid" else estimator.uses_critic:
        with pytest.raises(TypeError, match="index" if column == "uid" else column):
            compute_advantage(data, config)
    else:
        found, _ = compute_advantage(data, config)
        assert torch.equal(found.batch["advantages"], EXPECTED[name]()[0])


@pytest.mark.parametrize("name", EXPECTED)
def test_each_estimator_is_given_what_is_configured(name):
    data, _ = compute_advantage(batch(), configured(name))
    advantages, returns = EXPECTED[name]()
    assert torch.equal(data.batch["advantages"], advantages)
    assert torch.equal(data.batch["returns"], returns)


def test_the_estimators_tell_each_other_apart():
    """Otherwise the test above would not see one in the place of another."""
    advantages = [make()[0] for make in EXPECTED.values()]
    for place, one in enumerate(advantages):
        assert not any(torch.allclose(one, other) for other in advantages[place + 1 :])


def test_grpo_without_the_standard_deviation_is_dr_grpo():
    data, _ = compute_advantage(
        batch(), AlgorithmConfig(adv_estimator="grpo", norm_adv_by_std_in_grpo=False)
    )
    assert torch.equal(data.batch["advantages"], EXPECTED["dr_grpo"]()[0])


def test_the_share_of_trajectories_that_teach():
    data = batch()
    same = data.batch["token_level_rewards"].clone()
    same[1] = 0
    same[1, 0] = same[0].sum()
    _, shares = compute_advantage(
        data.with_tensors(token_level_rewards=same), AlgorithmConfig(adv_estimator="rloo")
    )
    assert shares == {"critic/advantages/nonzero_share": pytest.approx(0.6)}


def test_without_kl_in_the_reward_the_scores_are_the_rewards():
    config = AlgorithmConfig()
    data, metrics = apply_kl_penalty(batch(), config, build_kl_controller(config))
    assert (
        torch.equal(data.batch["token_level_rewards"], batch().batch["token_level_scores"])
        and metrics == {}
    )


@pytest.mark.parametrize(("kind", "kl"), [("kl", 0.5), ("mse", 0.125)])
def test_the_kl_is_subtracted_and_moves_the_coefficient_by_the_trajectories_of_the_batch(kind, kl):
    ctrl = {"type": "adaptive", "kl_coef": 0.1, "target_kl": 0.1, "horizon": 100}
    config = AlgorithmConfig(use_kl_in_reward=True, kl_penalty=kind, kl_ctrl=ctrl)
    controller = build_kl_controller(config)
    data, metrics = apply_kl_penalty(batch(), config, controller)
    expected = torch.where(MASK.bool(), rewards() - 0.1 * kl, 0.0)
    assert torch.allclose(data.batch["token_level_rewards"], expected)
    assert metrics == {"critic/kl": pytest.approx(kl), "critic/kl_coeff": 0.1}
    moved = 0.1 * (1 + 0.2 * ROWS / 100)
    assert controller.value == pytest.approx(moved)
    data, metrics = apply_kl_penalty(batch(), config, controller)
    assert metrics["critic/kl_coeff"] == pytest.approx(moved)
    expected = torch.where(MASK.bool(), rewards() - moved * kl, 0.0)
    assert torch.allclose(data.batch["token_level_rewards"], expected)


def test_a_fixed_coefficient_stays():
    config = AlgorithmConfig(use_kl_in_reward=True, kl_ctrl={"kl_coef": 0.3})
    controller = build_kl_controller(config)
    apply_kl_penalty(batch(), config, controller)
    assert controller.value == 0.3


def test_the_teachers_part_is_the_gradient_of_the_reverse_kl():
    """Its mean over all tokens that may follow is the gradient of minus KL(policy || teacher)."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, generator=generator, requires_grad=True)
    policy = logits.log_softmax(0)
    teacher = torch.randn(4, generator=generator).log_softmax(0)
    tokens = DataProto(
        {
            "response_mask": torch.ones(4, 1),
            "advantages": torch.zeros(4, 1),
            "old_log_probs": policy.detach()[:, None],
            "teacher_log_prob": teacher[:, None],
        }
    )
    distilled, _ = add_distillation(tokens, weight=0.5)
    parts = distilled.batch["advantages"][:, 0]
    (found,) = torch.autograd.grad((policy.detach().exp() * parts * policy).sum(), logits)
    kl = (logits.softmax(0) * (logits.log_softmax(0) - teacher)).sum()
    (expected,) = torch.autograd.grad(-0.5 * kl, logits)
    assert torch.allclose(found, expected, atol=1e-6)


def test_the_teacher_says_nothing_of_what_the_policy_did_not_write():
    data = batch()
    unknown = torch.where(MASK.bool(), -1.5, float("nan"))
    data = data.with_tensors(advantages=torch.zeros(ROWS, RESPONSE), teacher_log_prob=unknown)
    distilled, metrics = add_distillation(data, weight=2.0)
    assert torch.equal(distilled.batch["advantages"], -1.0 * MASK)
    assert metrics["teacher/reverse_kl"] == pytest.approx(0.5)


def test_a_trajectory_that_only_the_teacher_credits_teaches():
    data = batch().with_tensors(advantages=torch.zeros(ROWS, RESPONSE))
    teacher = data.batch["old_log_probs"].clone()
    teacher[0, 0] -= 0.5
    _, metrics = add_distillation(data.with_tensors(teacher_log_prob=teacher), weight=1.0)
    assert metrics["critic/advantages/nonzero_share"] == pytest.approx(1 / ROWS)
