"""Estimators that weigh the scores of a group: against twins over plain floats, by enumeration."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.verl.drawn import JUNK, masks, normal, with_junk
from verl.trainer.ppo.core_algos import (
    compute_grpo_outcome_advantage,
    compute_grpo_passk_outcome_advantage,
    compute_maxrl_outcome_advantage,
    compute_opo_outcome_advantage,
)

ESTIMATORS = {
    "opo": compute_opo_outcome_advantage,
    "grpo_passk": compute_grpo_passk_outcome_advantage,
    "maxrl": compute_maxrl_outcome_advantage,
}


def std_of(values):
    mean = sum(values) / len(values)
    return math.sqrt(sum((x - mean) ** 2 for x in values) / (len(values) - 1))


def twin(name, scores, lengths):
    """The advantage of each row of one group of two or more."""
    mean = sum(scores) / len(scores)
    if name == "opo":
        weighted = sum(n * x for n, x in zip(lengths, scores, strict=True)) / max(1, sum(lengths))
        if not sum(lengths):
            return [0.0] * len(scores)
        return [x - weighted for x in scores]
    if name == "maxrl":
        return [(x - mean) / mean if mean > 0 else 0.0 for x in scores]
    best, second = sorted(scores, reverse=True)[:2]
    gained = (best - second) / (std_of(scores) + 1e-6)
    return [gained if x == best else 0.0 for x in scores]


@pytest.mark.parametrize("name", ESTIMATORS)
@given(mask=masks(max_rows=8), seed=st.integers(0, 99), junk=st.sampled_from(JUNK), data=st.data())
@settings(max_examples=60, deadline=None)
def test_twins(name, mask, seed, junk, data):
    """Whatever stands where the policy did not write, and whatever other groups there are."""
    index = data.draw(st.lists(st.sampled_from("xyz"), min_size=len(mask), max_size=len(mask)))
    rewards = normal(mask, seed)
    kept = torch.where(mask.bool(), rewards, 0.0).sum(1).tolist()
    lengths = mask.sum(1).tolist()
    expected = [0.0] * len(mask)
    for group in set(index):
        rows = [row for row, of_row in enumerate(index) if of_row == group]
        if len(rows) == 1:
            expected[rows[0]] = 0.0 if name == "maxrl" else kept[rows[0]]
            continue
        found = twin(name, [kept[row] for row in rows], [lengths[row] for row in rows])
        for row, advantage in zip(rows, found, strict=True):
            expected[row] = advantage
    dirty = with_junk(rewards, mask, junk)
    advantages, returns = ESTIMATORS[name](dirty, mask, np.array(index, dtype=object))
    whole = torch.where(mask.bool(), torch.tensor(expected).double()[:, None], 0.0)
    torch.testing.assert_close(advantages, whole, atol=1e-6, rtol=1e-5)
    assert torch.equal(advantages, returns)


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("score", [0.9, 0.0, -0.3])
def test_equal_scores_teach_nothing(name, score):
    rewards = torch.tensor([[score, 0.0], [0.0, score], [score, 0.0]])
    advantages, _ = ESTIMATORS[name](rewards, torch.ones(3, 2), np.zeros(3, dtype=int))
    assert (advantages == 0).all()


def test_opo_by_hand_and_without_a_difference_in_length():
    # a of three tokens is right, b of one is wrong: the mean by tokens is 3/4
    rewards = torch.tensor([[0.0, 0.0, 1.0], [0.0, 9.0, 9.0]])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    advantages, _ = compute_opo_outcome_advantage(rewards, mask, np.zeros(2, dtype=int))
    assert advantages.tolist() == [[0.25] * 3, [-0.75, 0.0, 0.0]]
    same = torch.ones(2, 3)
    drawn = torch.tensor([[0.1, 0.0, 0.7], [0.3, 0.0, 0.1]])
    found, _ = compute_opo_outcome_advantage(drawn, same, np.zeros(2, dtype=int))
    centred, _ = compute_grpo_outcome_advantage(
        drawn, same, np.zeros(2, dtype=int), norm_adv_by_std_in_grpo=False
    )
    torch.testing.assert_close(found, centred)


LOGITS = (0.3, -0.4, 0.1)


def mean_estimate(estimate, rewards, size):
    """The mean over all groups of a policy with three answers, and the policy's probabilities.

    `estimate(scores)` gives the advantages of a group. The mean is divided by the group's size.
    """
    logits = torch.tensor(LOGITS, dtype=torch.float64, requires_grad=True)
    log_p = logits.log_softmax(0)
    loss = torch.zeros((), dtype=torch.float64)
    for group in product(range(len(LOGITS)), repeat=size):
        weight = math.prod(log_p[answer].exp().item() for answer in group)
        scores = torch.tensor([[rewards[answer]] for answer in group], dtype=torch.float64)
        advantages = estimate(scores)
        for answer, advantage in zip(group, advantages[:, 0], strict=True):
            loss = loss + weight * advantage * log_p[answer]
    return torch.autograd.grad(loss, logits)[0]


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("rewards", [(1.0, 0.0, 0.0), (0.7, -0.2, 0.4)])
def test_pass_at_k_without_the_std_is_the_gradient_of_the_expected_best(size, rewards):
    logits = torch.tensor(LOGITS, dtype=torch.float64, requires_grad=True)
    p = logits.softmax(0)
    best = torch.zeros((), dtype=torch.float64)
    for group in product(range(len(LOGITS)), repeat=size):
        best = best + torch.stack([p[answer] for answer in group]).prod() * max(
            rewards[answer] for answer in group
        )
    (true,) = torch.autograd.grad(best, logits)
    index = np.zeros(size, dtype=int)

    def estimate(scores):
        return compute_grpo_passk_outcome_advantage(
            scores, torch.ones(size, 1), index, norm_adv_by_std_in_grpo=False
        )[0]

    torch.testing.assert_close(mean_estimate(estimate, rewards, size), true, atol=1e-9, rtol=0)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_maxrl_is_the_gradient_of_a_truncated_likelihood(size):
    """log p = - sum_k (1 - p)^k / k over all k; the estimate has the terms below `size`."""
    rewards = (1.0, 0.0, 0.0)
    logits = torch.tensor(LOGITS, dtype=torch.float64, requires_grad=True)
    wrong = 1 - logits.softmax(0)[0]
    objective = -sum(wrong**k / k for k in range(1, size))
    (true,) = torch.autograd.grad(objective, logits)
    index = np.zeros(size, dtype=int)

    def estimate(scores):
        return compute_maxrl_outcome_advantage(scores, torch.ones(size, 1), index)[0]

    found = mean_estimate(estimate, rewards, size) / size
    torch.testing.assert_close(found, true, atol=1e-9, rtol=0)
