"""Every algorithm against an independent twin in loops over plain floats, and against figures
worked out by hand."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.verl.batches import policy_loss_of
from tests.verl.drawn import JUNK, masks, normal, with_junk
from verl.trainer.ppo.core_algos import (
    AdaptiveKLController,
    FixedKLController,
    agg_loss,
    compute_entropy_loss,
    compute_gae_advantage_return,
    compute_grpo_outcome_advantage,
    compute_rewards,
    compute_value_loss,
    kl_penalty,
)
from verl.workers.update import Counts

MODES = ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean"]
KINDS = ["kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3"]


def twin_agg(rows, mask, mode, num_tokens=None, num_seqs=None):
    kept = [
        [x for x, m in zip(row, bits, strict=True) if m]
        for row, bits in zip(rows, mask, strict=True)
    ]
    kept = [row for row in kept if row]
    if mode == "token-mean":
        return math.fsum(map(math.fsum, kept)) / (num_tokens or sum(map(len, kept)))
    per_row = [math.fsum(row) / (len(row) if mode == "seq-mean-token-mean" else 1) for row in kept]
    return math.fsum(per_row) / (num_seqs or len(kept))


def twin_gae(rewards, values, gamma, lam):
    """(raw advantages, returns) of one sequence of policy tokens, from the defining sum of
    discounted TD errors."""
    size = len(rewards)
    deltas = [
        rewards[t] + gamma * (values[t + 1] if t + 1 < size else 0.0) - values[t]
        for t in range(size)
    ]
    advantages = [
        sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, size)) for t in range(size)
    ]
    return advantages, [a + v for a, v in zip(advantages, values, strict=True)]


def test_gae_by_hand():
    # gamma = lam = 0.5, two policy tokens around an observation: V = 1, 2; reward 4 on the last
    # last:  delta = 4 - 2 = 2, A = 2, return 4;  first: delta = 0 + .5*2 - 1 = 0, A = 0 + .25*2 =
    # .5, return 1.5
    rewards = torch.tensor([[0.0, 0.0, 4.0]])
    values = torch.tensor([[1.0, 9.0, 2.0]])
    advantages, returns = compute_gae_advantage_return(
        rewards, values, torch.tensor([[1, 0, 1]]), 0.5, 0.5
    )
    assert returns.tolist() == [[1.5, 0.0, 4.0]]
    # whitened: mean 1.25, deviations -/+ .75, unbiased variance 2 * .75^2 = 1.125, .75 /
    # sqrt(1.125) = .70711
    torch.testing.assert_close(
        advantages, torch.tensor([[-0.70711, 0.0, 0.70711]]), atol=1e-5, rtol=0
    )


@given(masks(), st.integers(0, 99), st.floats(0, 1), st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_gae_is_that_of_the_sequence_without_observations(mask, seed, gamma, lam):
    rewards = normal(mask, seed)
    values = normal(mask, seed + 1)
    advantages, returns = compute_gae_advantage_return(rewards, values, mask, gamma, lam)
    raw = torch.zeros_like(values)
    expected_returns = torch.zeros_like(values)
    for b, bits in enumerate(mask.tolist()):
        at = [t for t, m in enumerate(bits) if m]
        row = twin_gae(
            [rewards[b, t].item() for t in at], [values[b, t].item() for t in at], gamma, lam
        )
        for t, a, g in zip(at, *row, strict=True):
            raw[b, t] = a
            expected_returns[b, t] = g
    flat = raw[mask.bool()].numpy()
    spread = math.sqrt((flat.var(ddof=1) if len(flat) > 1 else 0.0) + 1e-8)
    expected = torch.where(mask.bool(), (raw - flat.mean()) / spread, 0.0)
    torch.testing.assert_close(returns, expected_returns, atol=1e-10, rtol=0)
    torch.testing.assert_close(advantages, expected, atol=1e-6, rtol=1e-6)


def test_grpo_by_hand():
    # group a: scores 1, 0, 0 -> mean 1/3, unbiased variance (4/9 + 1/9 + 1/9) / 2 = 1/3; group b:
    # one row
    rewards = torch.tensor([[0.0, 1.0], [0.0, 0.0], [0.0, 0.5], [0.0, 0.0]])
    mask = torch.tensor([[1, 1], [1, 0], [0, 1], [1, 1]])
    index = np.array(["a", "a", "b", "a"], dtype=object)
    advantages, returns = compute_grpo_outcome_advantage(rewards, mask, index)
    high = 2 / 3 / math.sqrt(1 / 3)
    low = -1 / 3 / math.sqrt(1 / 3)
    expected = torch.tensor([[high, high], [low, 0.0], [0.0, 0.5], [low, low]])
    torch.testing.assert_close(advantages, expected, atol=1e-5, rtol=0)
    assert torch.equal(advantages, returns)
    plain, _ = compute_grpo_outcome_advantage(rewards, mask, index, norm_adv_by_std_in_grpo=False)
    torch.testing.assert_close(plain[:, 1], torch.tensor([2 / 3, 0.0, 0.5, -1 / 3]))


@given(masks(max_rows=8), st.data())
@settings(max_examples=60, deadline=None)
def test_grpo_twin(mask, data):
    size = len(mask)
    index = np.array(
        data.draw(st.lists(st.sampled_from("wxyz"), min_size=size, max_size=size)), dtype=object
    )
    rewards = normal(mask, data.draw(st.integers(0, 99)))
    by_std = data.draw(st.booleans())
    advantages, _ = compute_grpo_outcome_advantage(
        rewards, mask, index, norm_adv_by_std_in_grpo=by_std
    )
    scores = [
        sum(r for r, m in zip(*row, strict=True) if m)
        for row in zip(rewards.tolist(), mask.tolist(), strict=True)
    ]
    for b in range(size):
        group = [s for s, g in zip(scores, index, strict=True) if g == index[b]]
        mean = sum(group) / len(group) if len(group) > 1 else 0.0
        std = (
            math.sqrt(sum((s - mean) ** 2 for s in group) / (len(group) - 1))
            if len(group) > 1
            else 1.0
        )
        expected = (scores[b] - mean) / (std + 1e-6 if by_std else 1.0)
        for t in range(mask.shape[1]):
            assert advantages[b, t].item() == pytest.approx(
                expected if mask[b, t] else 0.0, abs=1e-9
            )


def test_grpo_group_of_equal_scores_has_no_advantage():
    # in float32 their mean is off by 6e-8: over a std of 1e-6 an advantage of .06
    rewards = torch.full((3, 1), 0.9)
    advantages, _ = compute_grpo_outcome_advantage(
        rewards, torch.ones(3, 1), np.zeros(3, dtype=int)
    )
    assert (advantages == 0).all()


@pytest.mark.parametrize(
    ("kind", "expected"),
    # log-ratio -0.5 and 0.5: k3 is e^.5 - .5 - 1 = .148721 and e^-.5 + .5 - 1 = .106531
    [
        ("kl", [-0.5, 0.5]),
        ("abs", [0.5, 0.5]),
        ("mse", [0.125, 0.125]),
        ("low_var_kl", [0.148721, 0.106531]),
    ],
)
def test_kl_penalty_by_hand(kind, expected):
    logprob = torch.tensor([-1.5, -1.0])
    ref = torch.tensor([-1.0, -1.5])
    torch.testing.assert_close(
        kl_penalty(logprob, ref, kind), torch.tensor(expected), atol=1e-6, rtol=0
    )


def test_kl_penalty_aliases_and_unknown_name():
    logprob = torch.randn(2, 5)
    ref = torch.randn(2, 5)
    for one, other in [("kl", "k1"), ("mse", "k2"), ("low_var_kl", "k3")]:
        assert torch.equal(kl_penalty(logprob, ref, one), kl_penalty(logprob, ref, other))
    with pytest.raises(ValueError, match="'full'"):
        kl_penalty(logprob, ref, "full")


@pytest.mark.parametrize("kind", KINDS)
def test_kl_penalty_has_finite_gradients_at_extremes_and_shows_nan(kind):
    logprob = torch.tensor([1e4, -1e4, 0.0, *JUNK], requires_grad=True)
    kl = kl_penalty(logprob, torch.zeros(8), kind)
    kl[:3].sum().backward()
    assert kl[:3].isfinite().all() and logprob.grad is not None and logprob.grad.isfinite().all()
    assert kl[3:6].isnan().all()


def test_low_var_kl_is_capped_at_ten():
    assert kl_penalty(torch.tensor([-50.0]), torch.tensor([0.0]), "k3").item() == 10.0


def test_rewards_by_hand():
    scores = torch.tensor([[0.0, 0.0, 1.0]])
    mask = torch.tensor([[1, 0, 1]])
    old = torch.tensor([[-1.0, math.nan, -2.0]])
    ref = torch.tensor([[-1.5, -1.0, -1.0]])
    # 0 - .1 * .5;  masked;  1 - .1 * -1
    torch.testing.assert_close(
        compute_rewards(scores, old, ref, 0.1, mask), torch.tensor([[-0.05, 0.0, 1.1]])
    )
    torch.testing.assert_close(
        compute_rewards(scores, old, ref, 0.1, mask, "abs"), torch.tensor([[-0.05, 0.0, 0.9]])
    )


def test_kl_controllers():
    adaptive = AdaptiveKLController(init_kl_coef=0.1, target_kl=2.0, horizon=1000)
    adaptive.update(current_kl=2.2, n_steps=100)  # error .1: 0.1 * (1 + .1 * .1)
    assert adaptive.value == pytest.approx(0.101)
    adaptive.update(current_kl=200.0, n_steps=1000)  # error capped at .2
    assert adaptive.value == pytest.approx(0.101 * 1.2)
    adaptive.update(current_kl=0.0, n_steps=1000)  # and at -.2
    assert adaptive.value == pytest.approx(0.101 * 1.2 * 0.8)
    fixed = FixedKLController(0.3)
    fixed.update(9.0, 9)
    assert fixed.value == 0.3


def test_agg_loss_by_hand():
    loss = torch.tensor([[1.0, 2.0, 9.0], [4.0, 9.0, 9.0], [9.0, 9.0, 9.0]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0]])
    # 7 / 3 tokens;  (3 + 4) / 2 rows;  (1.5 + 4) / 2 rows
    assert [agg_loss(loss, mask, mode).item() for mode in MODES] == pytest.approx(
        [7 / 3, 3.5, 2.75]
    )
    assert agg_loss(loss, mask, "token-mean", num_tokens=14).item() == 0.5
    assert agg_loss(loss, mask, "seq-mean-token-sum", num_seqs=torch.tensor(7)).item() == 1.0
    assert [agg_loss(loss, torch.zeros_like(mask), mode).item() for mode in MODES] == [0, 0, 0]
    with pytest.raises(ValueError, match="'sum'"):
        agg_loss(loss, mask, "sum")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("chunks", [1, 4, 16])
def test_gradient_does_not_depend_on_the_micro_batches(mode, chunks):
    rng = torch.Generator().manual_seed(7)
    mask = (torch.rand(16, 12, generator=rng) < 0.6).long()
    mask[3] = 0
    old, advantages, target = (normal(mask, seed) for seed in (1, 2, 3))
    weight = torch.tensor([0.3, -0.2], dtype=torch.float64)
    counts = {"num_tokens": int(mask.sum()), "num_seqs": int(mask.any(-1).sum())}

    def gradient(parts, **given_counts):
        w = weight.clone().requires_grad_()
        total = torch.zeros((), dtype=torch.float64)
        figures = {}
        for rows in torch.arange(16).chunk(parts):
            o = old[rows]
            a = advantages[rows]
            g = target[rows]
            m = mask[rows]
            local = {"num_tokens": int(m.sum()), "num_seqs": int(m.any(-1).sum())}
            new = o + w[0] * g + w[1]
            pg, policy = policy_loss_of(
                o, new, a, m, counts=Counts(**given_counts or local), loss_agg_mode=mode
            )
            vf, critic = compute_value_loss(new, g, o, m, 0.1, mode, **given_counts)
            kl = agg_loss(kl_penalty(new, o, "k3"), m, mode, **given_counts)
            loss = pg + vf + 0.1 * kl
            loss.backward()
            total += loss.detach()
            for name, value in {**policy, **critic}.items():
                assert not value.requires_grad
                figures[name] = figures.get(name, 0.0) + value.item()
        return w.grad, total, figures

    whole = gradient(1)
    parts = gradient(chunks, **counts)
    torch.testing.assert_close(parts[0], whole[0], atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(parts[1], whole[1], atol=1e-10, rtol=1e-10)
    assert parts[2] == pytest.approx(whole[2], abs=1e-6)


def twin_policy(old, new, advantage, low, high, c):
    """(loss, held by the clip, held by the dual clip) of one token, by cases on the side of the
    clip range."""
    ratio = math.exp(min(max(new - old, -20.0), 20.0))
    if advantage >= 0:
        return -advantage * min(ratio, 1 + high), ratio > 1 + high and advantage > 0, False
    if ratio < 1 - low:
        return -advantage * (1 - low), True, False
    return -advantage * min(ratio, c), False, ratio > c


@given(masks(), st.integers(0, 99), st.sampled_from(MODES), st.sampled_from([0.3, 3.0, 1e4]))
@settings(max_examples=60, deadline=None)
def test_policy_loss_twin(mask, seed, mode, scale):
    old = normal(mask, seed)
    new = scale * normal(mask, seed + 1)
    advantages = normal(mask, seed + 2)
    loss, metrics = policy_loss_of(
        old, new, advantages, mask, clip_ratio_low=0.2, clip_ratio_high=0.28, loss_agg_mode=mode
    )
    tokens = [
        [twin_policy(*token, 0.2, 0.28, 3.0) for token in zip(*row, strict=True)]
        for row in zip(old.tolist(), new.tolist(), advantages.tolist(), strict=True)
    ]

    def mean(values, how):
        return twin_agg(values, mask.tolist(), how)

    assert loss.item() == pytest.approx(
        mean([[t[0] for t in row] for row in tokens], mode), rel=1e-9
    )
    shares = [mean([[float(t[i]) for t in row] for row in tokens], "token-mean") for i in (1, 2)]
    kl = [
        [-min(max(n - o, -20.0), 20.0) for o, n in zip(*row, strict=True)]
        for row in zip(old.tolist(), new.tolist(), strict=True)
    ]
    assert metrics["pg_clipfrac"].item() == pytest.approx(shares[0], abs=1e-6)
    assert metrics["pg_clipfrac_lower"].item() == pytest.approx(shares[1], abs=1e-6)
    assert metrics["ppo_kl"].item() == pytest.approx(mean(kl, "token-mean"), abs=1e-9)


def test_policy_loss_by_hand():
    # ratios 1.5, 0.5, 4: A = 1 held at 1.2 -> -1.2;  A = -1 held at .8 -> .8;  A = -1 held at 3 ->
    # 3
    new = torch.tensor([[1.5, 0.5, 4.0]]).log().requires_grad_()
    loss, metrics = policy_loss_of(
        torch.zeros(1, 3), new, torch.tensor([[1.0, -1.0, -1.0]]), torch.ones(1, 3), clip_ratio=0.2
    )
    assert loss.item() == pytest.approx((-1.2 + 0.8 + 3) / 3)
    assert metrics["pg_clipfrac"].item() == pytest.approx(2 / 3)
    assert metrics["pg_clipfrac_lower"].item() == pytest.approx(1 / 3)
    loss.backward()
    assert new.grad is not None and new.grad.tolist() == [[0.0, 0.0, 0.0]]


@given(masks(), st.integers(0, 99), st.sampled_from(MODES))
@settings(max_examples=40, deadline=None)
def test_value_loss_twin(mask, seed, mode):
    vpreds, returns, values = (normal(mask, seed + k) for k in range(3))
    loss, metrics = compute_value_loss(vpreds, returns, values, mask, 0.5, mode)
    squares = []
    held = []
    for v, g, o in zip(vpreds.tolist(), returns.tolist(), values.tolist(), strict=True):
        pairs = [
            ((a - b) ** 2, (min(max(a, c - 0.5), c + 0.5) - b) ** 2)
            for a, b, c in zip(v, g, o, strict=True)
        ]
        squares.append([0.5 * max(pair) for pair in pairs])
        held.append([float(h > f) for f, h in pairs])
    assert loss.item() == pytest.approx(twin_agg(squares, mask.tolist(), mode), rel=1e-9)
    assert metrics["vf_clipfrac"].item() == pytest.approx(
        twin_agg(held, mask.tolist(), "token-mean"), abs=1e-6
    )
    assert metrics["vpred_mean"].item() == pytest.approx(
        twin_agg(vpreds.tolist(), mask.tolist(), "token-mean")
    )


def test_entropy_loss_by_hand():
    # a fair coin: ln 2; a sure thing: 0; the masked row is NaN
    logits = torch.tensor([[[0.0, 0.0], [50.0, -50.0], [math.nan, math.nan]]], requires_grad=True)
    loss = compute_entropy_loss(logits, torch.tensor([[1, 1, 0]]))
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2) / 2)
    assert (
        logits.grad is not None and logits.grad.isfinite().all() and (logits.grad[0, 2] == 0).all()
    )
    of_four_tokens = compute_entropy_loss(logits, torch.tensor([[1, 1, 0]]), num_tokens=4)
    of_two_rows = compute_entropy_loss(
        logits, torch.tensor([[1, 1, 0]]), "seq-mean-token-sum", num_seqs=2
    )
    assert of_four_tokens.item() == pytest.approx(math.log(2) / 4)
    assert of_two_rows.item() == pytest.approx(math.log(2) / 2)


def losses_and_gradients(mask, junk, mode, kind, seed):
    """Everything a training step computes, with the entries of `junk` in the masked positions of
    the six inputs."""
    old, ref, advantages, rewards, values, new = (
        with_junk(normal(mask, seed + k), mask, x) for k, x in enumerate(junk)
    )
    new.requires_grad_()
    logits = torch.where(mask.bool().unsqueeze(-1), normal(mask, seed, 4), junk[0]).requires_grad_()
    index = np.arange(len(mask)) // 2
    results = [
        policy_loss_of(old, new, advantages, mask, loss_agg_mode=mode)[0],
        compute_value_loss(new, advantages, values, mask, 0.5, mode)[0],
        agg_loss(kl_penalty(new, ref, kind), mask, mode),
        compute_entropy_loss(logits, mask, mode),
    ]
    torch.stack(results).sum().backward()
    return [
        *(x.detach() for x in results),
        *policy_loss_of(old, new, advantages, mask)[1].values(),
        *compute_value_loss(new, advantages, values, mask, 0.5)[1].values(),
        *compute_gae_advantage_return(rewards, values, mask, 0.9, 0.8),
        *compute_grpo_outcome_advantage(rewards, mask, index),
        compute_rewards(rewards, old, ref, 0.1, mask, kind),
        new.grad,
        logits.grad,
    ]


junk_of_six = st.tuples(*[st.sampled_from([0.0, *JUNK])] * 6)


@given(masks(), st.integers(0, 99), junk_of_six, st.sampled_from(MODES), st.sampled_from(KINDS))
@settings(max_examples=100, deadline=None)
def test_masked_positions_change_not_a_bit(mask, seed, junk, mode, kind):
    clean = losses_and_gradients(mask, [0.0] * 6, mode, kind, seed)
    dirty = losses_and_gradients(mask, junk, mode, kind, seed)
    for before, after in zip(clean, dirty, strict=True):
        assert before.isfinite().all() and torch.equal(before, after)
    for gradient in clean[-2:]:
        assert (gradient[mask == 0] == 0).all()
