"""Estimators and losses beside PPO's and GRPO's: against twins in loops over plain floats, by hand,
by enumeration."""

import math
from functools import partial
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.verl.batches import policy_loss_of
from tests.verl.drawn import JUNK, masks, normal, with_junk
from verl.trainer.ppo.core_algos import (
    POLICY_LOSSES,
    agg_loss,
    are_equal,
    compute_gigpo_advantage,
    compute_grpo_outcome_advantage,
    compute_igpo_advantage,
    compute_reinforce_advantage,
    compute_reinforce_plus_plus_baseline_outcome_advantage,
    compute_reinforce_plus_plus_outcome_advantage,
    compute_rloo_outcome_advantage,
    compute_turn_level_advantage,
    likelihood_losses,
)

SIDES = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.3}


def lists(mask, *tensors):
    """Rows of plain floats where the mask is on."""
    return [
        [
            [x for x, m in zip(row, bits, strict=True) if m]
            for row, bits in zip(t.tolist(), mask.tolist(), strict=True)
        ]
        for t in tensors
    ]


def spread(mask, rows):
    """The inverse of `lists`: rows of floats back at the unmasked places."""
    out = torch.zeros(mask.shape, dtype=torch.float64)
    for row, (bits, values) in enumerate(zip(mask.tolist(), rows, strict=True)):
        for at, value in zip([t for t, m in enumerate(bits) if m], values, strict=True):
            out[row, at] = value
    return out


def whitened(rows):
    flat = [x for row in rows for x in row]
    mean = sum(flat) / len(flat)
    variance = sum((x - mean) ** 2 for x in flat) / max(1, len(flat) - 1)
    return [[(x - mean) / math.sqrt(variance + 1e-8) for x in row] for row in rows]


@st.composite
def groups(draw):
    mask = draw(masks(max_rows=8))
    index = draw(st.lists(st.sampled_from("wxyz"), min_size=len(mask), max_size=len(mask)))
    return mask, np.array(index, dtype=object)


def others(index, row):
    return [j for j, name in enumerate(index) if name == index[row] and j != row]


@given(groups(), st.integers(0, 99), st.sampled_from(JUNK))
@settings(max_examples=60, deadline=None)
def test_outcome_estimators_twin(case, seed, junk):
    mask, index = case
    rewards = normal(mask, seed)
    (rows,) = lists(mask, rewards)
    totals = [sum(row) for row in rows]
    rloo = []
    centred = []
    for i, total in enumerate(totals):
        rest = [totals[j] for j in others(index, i)]
        rloo.append(total - sum(rest) / len(rest) if rest else total)
        group = [*rest, total]
        centred.append(total - sum(group) / len(group) if rest else total)
    dirty = with_junk(rewards, mask, junk)
    expected = spread(mask, [[a] * len(row) for a, row in zip(rloo, rows, strict=True)])
    torch.testing.assert_close(
        compute_rloo_outcome_advantage(dirty, mask, index)[0], expected, atol=1e-9, rtol=0
    )
    expected = spread(
        mask, whitened([[a] * len(row) for a, row in zip(centred, rows, strict=True)])
    )
    found, _ = compute_reinforce_plus_plus_baseline_outcome_advantage(dirty, mask, index)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


@given(masks(), st.integers(0, 99), st.floats(0, 1), st.sampled_from(JUNK))
@settings(max_examples=60, deadline=None)
def test_returns_twin(mask, seed, gamma, junk):
    rewards = normal(mask, seed)
    (rows,) = lists(mask, rewards)
    returns = [
        [sum(gamma ** (k - t) * row[k] for k in range(t, len(row))) for t in range(len(row))]
        for row in rows
    ]
    dirty = with_junk(rewards, mask, junk)
    advantages, found = compute_reinforce_advantage(dirty, mask, gamma)
    torch.testing.assert_close(found, spread(mask, returns), atol=1e-9, rtol=0)
    assert torch.equal(advantages, found)
    advantages, again = compute_reinforce_plus_plus_outcome_advantage(dirty, mask, gamma)
    assert torch.equal(again, found)
    torch.testing.assert_close(advantages, spread(mask, whitened(returns)), atol=1e-6, rtol=1e-6)


def test_equal_scores_give_no_advantage():
    rewards = torch.full((3, 1), 0.9)
    mask = torch.ones(3, 1)
    index = np.zeros(3, dtype=int)
    assert (compute_rloo_outcome_advantage(rewards, mask, index)[0] == 0).all()
    assert (
        compute_reinforce_plus_plus_baseline_outcome_advantage(rewards, mask, index)[0] == 0
    ).all()
    assert (compute_turn_level_advantage(rewards, mask, index, torch.zeros(3, 1))[0] == 0).all()


def test_turn_level_by_hand():
    # one group of three: a earns 1 in turn 0 and 2 in turn 1; b only turn 0, 4; c 0 and 3. An
    # observation in between.
    rewards = torch.tensor([[1.0, 9.0, 2.0], [4.0, 9.0, 0.0], [0.0, 9.0, 3.0]])
    mask = torch.tensor([[1, 0, 1], [1, 0, 0], [1, 0, 1]])
    turns = torch.tensor([[0, -1, 1], [0, -1, -1], [0, -1, 1]])
    advantages, returns = compute_turn_level_advantage(rewards, mask, np.zeros(3, dtype=int), turns)
    assert returns.tolist() == [[3.0, 0.0, 2.0], [4.0, 0.0, 0.0], [3.0, 0.0, 3.0]]
    # turn 0: 3 - (4 + 3) / 2, 4 - 3, 3 - 3.5; turn 1: of a against c alone, and the reverse
    assert advantages.tolist() == [[-0.5, 0.0, -1.0], [1.0, 0.0, 0.0], [-0.5, 0.0, 1.0]]
    alone, _ = compute_turn_level_advantage(
        rewards[:2], mask[:2], np.zeros(2, dtype=int), turns[:2]
    )
    assert alone[0, 2].item() == 2 - 4, (
        "no other row has a turn 1: against all that the others earned"
    )


def test_gigpo_by_hand():
    """One group of three, from the same question. a and b read the same after their first turn, c
    reads something else; a is right."""
    rewards = torch.tensor([[0.0, 9.0, 1.0], [0.4, 9.0, 0.0], [0.0, 9.0, 0.0]])
    mask = torch.tensor([[1, 0, 1], [1, 0, 1], [1, 0, 1]])
    turns = torch.tensor([[0, -1, 1]] * 3)
    states = torch.tensor([[7, -1, 1], [7, -1, 1], [7, -1, 2]])
    index = np.zeros(3, dtype=int)
    advantages, returns = compute_gigpo_advantage(
        rewards, mask, index, turns, states, 0.5, 2.0, norm_adv_by_std_in_grpo=False
    )
    assert returns.tolist() == [
        pytest.approx([0.5, 0.0, 1.0]),
        pytest.approx([0.4, 0.0, 0.0]),
        [0.0, 0.0, 0.0],
    ]
    episode = np.array([1.0, 0.4, 0.0]) - 1.4 / 3
    first = np.array([0.5, 0.4, 0.0]) - 0.3
    second = np.array([0.5, -0.5, 0.0])
    expected = np.stack([episode + 2 * first, np.zeros(3), episode + 2 * second], axis=1)
    np.testing.assert_allclose(advantages.numpy(), expected, atol=1e-6)

    by_std, _ = compute_gigpo_advantage(rewards, mask, index, turns, states, 0.5, 2.0)
    scaled = episode / np.std([1.0, 0.4, 0.0], ddof=1) + 2 * second / np.std([1.0, 0.0], ddof=1)
    np.testing.assert_allclose(by_std[:2, 2].numpy(), scaled[:2], atol=1e-4)


def test_gigpo_is_grpo_where_every_state_is_new():
    rewards = torch.tensor([[0.0, 1.0], [0.0, 0.0]])
    mask = torch.ones(2, 2)
    turns = torch.tensor([[0, 1], [0, 1]])
    states = torch.tensor([[1, 2], [3, 4]])
    index = np.zeros(2, dtype=int)
    found, _ = compute_gigpo_advantage(rewards, mask, index, turns, states, 1.0, 1.0)
    expected, _ = compute_grpo_outcome_advantage(rewards, mask, index)
    assert torch.equal(found, expected)


def test_igpo_by_hand():
    # turns of one group are paid .1, .9 (a), .5 (b, which stops after one turn), 0, 0 (c)
    rewards = torch.tensor([[0.1, 9.0, 0.9], [0.5, 9.0, 9.0], [0.0, 9.0, 0.0]])
    mask = torch.tensor([[1, 0, 1], [1, 0, 0], [1, 0, 1]])
    turns = torch.tensor([[0, -1, 1], [0, -1, -1], [0, -1, 1]])
    advantages, returns = compute_igpo_advantage(rewards, mask, np.zeros(3, dtype=int), turns, 0.5)
    paid = np.array([0.1, 0.9, 0.5, 0.0, 0.0])
    a, b, c, d, e = (paid - paid.mean()) / (paid.std(ddof=1) + 1e-6)
    expected = [[a + 0.5 * b, 0, b], [c, 0, 0], [d + 0.5 * e, 0, e]]
    np.testing.assert_allclose(advantages.numpy(), expected, atol=1e-6)
    np.testing.assert_allclose(returns.numpy(), [[0.55, 0, 0.9], [0.5, 0, 0], [0, 0, 0]], atol=1e-6)


TURN_ESTIMATORS = {
    "turn_level": compute_turn_level_advantage,
    "gigpo": partial(compute_gigpo_advantage, gamma=0.9, step_advantage_w=0.7),
    "igpo": partial(compute_igpo_advantage, gamma=0.9),
}


@pytest.mark.parametrize("name", TURN_ESTIMATORS)
@given(mask=masks(), seed=st.integers(0, 99), junk=st.sampled_from(JUNK))
@settings(max_examples=30, deadline=None)
def test_credit_by_turn_ignores_what_is_masked_and_the_order_of_the_rows(name, mask, seed, junk):
    """Turns change where an observation stands; junk in it, and other groups, change nothing."""
    rewards = normal(mask, seed)
    turns = torch.where(mask.bool(), (1 - mask).cumsum(1), -1)
    states = torch.where(mask.bool(), turns % 2, -1)
    index = np.arange(len(mask)) % 2
    estimate = TURN_ESTIMATORS[name]

    def run(rewards, rows):
        return estimate(
            rewards[rows], mask[rows], index[rows], turns=turns[rows], states=states[rows]
        )

    order = np.arange(len(mask))
    advantages, returns = run(rewards, order)
    dirty, _ = run(with_junk(rewards, mask, junk), order)
    assert torch.equal(dirty, advantages)
    assert (advantages[mask == 0] == 0).all() and (returns[mask == 0] == 0).all()
    backwards, _ = run(rewards, order[::-1].copy())
    torch.testing.assert_close(backwards.flip(0), advantages, atol=1e-9, rtol=0)


@pytest.mark.parametrize("noise", [0.0, 1e-7, -1e-7])
def test_scores_that_differ_in_their_last_bits_are_equal(noise):
    """What turns are paid adds up to the score, up to the rounding of float32."""
    assert are_equal(torch.tensor([1.0, 1.0 + noise, 1.0]))
    assert not are_equal(torch.tensor([1.0, 1.0 + 1e-4, 1.0]))
    rewards = torch.tensor([[1.0], [1.0 + noise], [1.0]])
    mask = torch.ones(3, 1)
    advantages, _ = compute_grpo_outcome_advantage(rewards, mask, np.zeros(3, dtype=int))
    assert (advantages == 0).all()


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("go_on", [0.0, 0.2, -0.5])
def test_turn_level_credit_is_unbiased_when_the_policy_decides_to_stop(size, go_on):
    """All outcomes of a group, weighted by their probability: the mean estimate is the gradient of
    the expected reward.

    Turn 0 goes on with probability p, which is paid at once, or stops, which earns .3; turn 1 is
    right with probability q (reward 1).
    """
    p = 0.6
    q = 0.25
    stop = 0.3
    outcomes = {
        "stop": (1 - p, [stop, 0.0]),
        "right": (p * q, [go_on, 1.0]),
        "wrong": (p * (1 - q), [go_on, 0.0]),
    }
    true = {"p": go_on + q - stop, "q": p}  # of J = (1 - p) stop + p (go_on + q)
    score = {  # d log-probability of turn 0 by p, of turn 1 by q
        "stop": (-1 / (1 - p), 0.0),
        "right": (1 / p, 1 / q),
        "wrong": (1 / p, -1 / (1 - q)),
    }
    found = {"p": 0.0, "q": 0.0}
    for group in product(outcomes, repeat=size):
        mask = torch.tensor([[1, int(o != "stop")] for o in group])
        turns = torch.where(mask.bool(), torch.tensor([0, 1]), -1)
        paid = [outcomes[outcome][1] for outcome in group]
        rewards = torch.tensor(paid, dtype=torch.float64)
        advantages, _ = compute_turn_level_advantage(
            rewards, mask, np.zeros(size, dtype=int), turns
        )
        weight = math.prod(outcomes[o][0] for o in group)
        for row, outcome in enumerate(group):
            found["p"] += weight * advantages[row, 0].item() * score[outcome][0] / size
            found["q"] += weight * advantages[row, 1].item() * score[outcome][1] / size
    assert found == pytest.approx(true, abs=1e-12)


def twin_loss(mode, ratios, log_probs, advantages, low, high):
    """Loss of each token of one sequence."""
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else 1.0
    if mode == "geo_mean":
        return twin_of_sequence(ratios, advantages, low, high)
    losses = []
    for ratio, log_prob, a in zip(ratios, log_probs, advantages, strict=True):
        used = mean if mode == "gspo" else ratio
        held = min(max(used, 1 - low), 1 + high)
        if mode == "reinforce":
            losses.append(-a * log_prob)
        elif mode == "sapo":
            tau = 1.0 if a > 0 else 1.05
            losses.append(-a * 4 / tau / (1 + math.exp(-tau * (ratio - 1))))
        elif mode in ("dppo_tv", "dppo_kl"):
            moved = divergence_of(mode, log_prob, ratio)
            drifts = ratio > 1 if a > 0 else ratio < 1
            is_out = drifts and moved > (high if a > 0 else low)
            losses.append(0.0 if is_out else -min(ratio, 3) * a * log_prob)
        elif mode == "cispo":
            losses.append(-held * a * log_prob)
        else:
            clipped = max(-a * used, -a * held)
            losses.append(min(clipped, -3 * a) if mode == "vanilla" and a < 0 else clipped)
    return losses


def twin_of_sequence(ratios, advantages, low, high):
    """GMPO: one loss for all tokens of a sequence, from logarithms held on one side each."""
    if not ratios:
        return []
    is_good = sum(advantages) > 0
    held = []
    for ratio in ratios:
        log = math.log(ratio)
        held.append(min(log, high) if is_good else max(log, -low))
    loss = -sum(advantages) / len(held) * math.exp(sum(held) / len(held))
    return [loss] * len(held)


def divergence_of(mode, log_prob, ratio):
    """Of a token whose probability is kept between a millionth and one less a millionth."""
    new, old = (
        min(max(p, 1e-6), 1 - 1e-6) for p in (math.exp(log_prob), math.exp(log_prob) / ratio)
    )
    if mode == "dppo_tv":
        return abs(new - old)
    return old * math.log(old / new) + (1 - old) * math.log((1 - old) / (1 - new))


@pytest.mark.parametrize("mode", POLICY_LOSSES)
@given(mask=masks(), seed=st.integers(0, 99), junk=st.sampled_from(JUNK))
@settings(max_examples=40, deadline=None)
def test_policy_losses_twin(mode, mask, seed, junk):
    old = normal(mask, seed) - 2
    advantages = normal(mask, seed + 1)
    weights = normal(mask, seed + 2).exp()
    new = old + 0.5 * normal(mask, seed + 3)
    rows = lists(mask, (new - old).exp(), new, advantages)
    losses = [twin_loss(mode, *row, 0.2, 0.3) for row in zip(*rows, strict=True)]
    dirty = [with_junk(x, mask, junk) for x in (old, new, advantages)]
    agg = {"loss_agg_mode": "token-mean", "loss_mode": mode, **SIDES}
    found, _ = policy_loss_of(*dirty, mask, **agg)
    expected = agg_loss(spread(mask, losses), mask, "token-mean")
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)
    found, _ = policy_loss_of(*dirty, mask, weights=with_junk(weights, mask, junk), **agg)
    expected = agg_loss(spread(mask, losses) * weights, mask, "token-mean")
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("mode", POLICY_LOSSES)
def test_extreme_and_masked_tokens_bring_no_nan(mode, dtype):
    old = torch.tensor([[-1e4, -1.0, math.nan], [-1.0, -1e4, -math.inf]], dtype=dtype)
    new = torch.tensor([[-1.0, -1e4, 0.0], [-1e4, -1.0, math.inf]], dtype=dtype, requires_grad=True)
    mask = torch.tensor([[1, 1, 0], [1, 1, 0]])
    advantages = torch.tensor([[1.0, -1.0, math.nan], [-1.0, 1.0, 1.0]], dtype=dtype)
    loss, metrics = policy_loss_of(old, new, advantages, mask, loss_mode=mode, **SIDES)
    loss = loss + 0.1 * likelihood_losses(old, new, advantages, mask).sum()
    loss.backward()
    assert loss.isfinite() and new.grad.isfinite().all() and (new.grad[:, 2] == 0).all()
    assert all(value.isfinite() for value in metrics.values())


def slopes_at(ratio, old=0.0):
    """The slope of each loss in the log-prob of a token with advantage 1."""
    one = torch.ones(1, 1, dtype=torch.float64)
    slopes = {}
    for mode in POLICY_LOSSES:
        new = (one * (old + math.log(ratio))).requires_grad_()
        loss, _ = policy_loss_of(old * one, new, one, one, loss_mode=mode, **SIDES)
        loss.backward()
        slopes[mode] = new.grad.item()
    return slopes


def gated(ratio):
    """The slope of SAPO's gate: at most that of the ratio, and near 0 far from 1."""
    gate = 1 / (1 + math.exp(1 - ratio))
    return -4 * gate * (1 - gate) * ratio


def test_what_a_clip_holds_still_learns_without_one_only():
    """The ratio is far above 1.3. Of the probability, from .3 to .75, that is .45 too."""
    assert slopes_at(2.5, math.log(0.3)) == pytest.approx(
        {
            "vanilla": 0.0,
            "gspo": 0.0,
            "cispo": -1.3,
            "reinforce": -1.0,
            "geo_mean": 0.0,
            "sapo": gated(2.5),
            "dppo_tv": 0.0,
            "dppo_kl": 0.0,
        }
    )


def test_what_no_clip_holds_learns_by_its_ratio():
    """No gradient flows through the weight of CISPO and DPPO: or a token would learn by its own
    log-prob once more."""
    expected = dict.fromkeys(POLICY_LOSSES, -1.1) | {"reinforce": -1.0, "sapo": gated(1.1)}
    assert slopes_at(1.1, math.log(0.3)) == pytest.approx(expected)


def test_a_rare_token_may_change_its_ratio_much_with_dppo():
    """From one in a thousand to one in four hundred: a clip holds it, a divergence does not."""
    slopes = slopes_at(2.5, math.log(0.001))
    assert slopes["vanilla"] == 0.0
    assert slopes["dppo_tv"] == slopes["dppo_kl"] == pytest.approx(-2.5)


def test_gmpo_gives_each_token_its_share_of_the_sequence():
    """Of three tokens with advantage 1 one is held: it has no gradient, and the others a third."""
    old = torch.zeros(1, 3, dtype=torch.float64)
    new = torch.tensor([[0.1, 0.9, -0.5]], dtype=torch.float64, requires_grad=True)
    one = torch.ones(1, 3, dtype=torch.float64)
    settings = {"loss_mode": "geo_mean", "loss_agg_mode": "seq-mean-token-mean", **SIDES}
    loss, _ = policy_loss_of(old, new, one, one, **settings)
    loss.backward()
    ratio = math.exp((0.1 + 0.3 - 0.5) / 3)
    assert loss.item() == pytest.approx(-ratio)
    assert new.grad.tolist() == [pytest.approx([-ratio / 3, 0.0, -ratio / 3])]


def test_gspo_gives_every_token_of_a_sequence_the_same_gradient():
    old = torch.zeros(1, 3, dtype=torch.float64)
    new = torch.tensor([[0.1, -0.2, 0.15]], dtype=torch.float64, requires_grad=True)
    mask = torch.ones(1, 3)
    loss, _ = policy_loss_of(
        old,
        new,
        torch.ones(1, 3),
        mask,
        loss_mode="gspo",
        loss_agg_mode="seq-mean-token-mean",
        **SIDES,
    )
    loss.backward()
    ratio = math.exp(0.05 / 3)  # the gradient of the sequence's ratio by a token is ratio / 3
    torch.testing.assert_close(new.grad, torch.full((1, 3), -ratio / 3, dtype=torch.float64))


def test_likelihood_regulariser_by_hand():
    old = torch.zeros(4, 2)
    new = torch.tensor([[-0.5, 0.2], [0.5, -0.2], [-0.5, -0.5], [-0.5, 9.0]])
    advantages = torch.tensor([[1.0, 1.0], [1.0, 1.0], [-1.0, -1.0], [0.0, 0.0]])
    mask = torch.tensor([[1, 1], [1, 1], [1, 1], [1, 0]])
    # the second response gained as a whole, the third was bad; of the others the tokens that lost
    expected = torch.tensor([[0.5, 0.0], [0.0, 0.0], [0.0, 0.0], [0.5, 0.0]])
    torch.testing.assert_close(likelihood_losses(old, new, advantages, mask), expected)


@given(masks(), st.integers(0, 99), st.sampled_from(JUNK))
@settings(max_examples=40, deadline=None)
def test_constant_divisors(mask, seed, junk):
    x = normal(mask, seed)
    (rows,) = lists(mask, x)
    dirty = with_junk(x, mask, junk)
    kept = [row for row in rows if row]
    total = math.fsum(map(math.fsum, kept))
    assert agg_loss(dirty, mask, "token-sum").item() == pytest.approx(total, abs=1e-9)
    norm = agg_loss(dirty, mask, "seq-mean-token-sum-norm", loss_scale_factor=7.0).item()
    assert norm == pytest.approx(total / len(kept) / 7, abs=1e-9)
    with pytest.raises(ValueError, match="needs loss_scale_factor"):
        agg_loss(dirty, mask, "seq-mean-token-sum-norm")
