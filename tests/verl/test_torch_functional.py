import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from verl.utils import torch_functional as F


def test_masked_statistics_by_hand():
    values = torch.tensor([[1.0, math.nan], [3.0, math.inf]])
    mask = torch.tensor([[1, 0], [1, 0]])
    assert F.masked_sum(values, mask).item() == 4.0
    assert F.masked_mean(values, mask).item() == 2.0
    assert F.masked_mean(values, mask, axis=0).tolist() == [2.0, 0.0]
    assert F.masked_var(values, mask).item() == 2.0  # (1 + 1) / (2 - 1)
    assert F.masked_var(values, mask, unbiased=False).item() == 1.0
    # deviations of 1 over a standard deviation of 1.41421
    torch.testing.assert_close(
        F.masked_whiten(values, mask), torch.tensor([[-0.70711, 0], [0.70711, 0]])
    )
    torch.testing.assert_close(
        F.masked_whiten(values, mask, False), torch.tensor([[1.29289, 0], [2.70711, 0]])
    )


@pytest.mark.parametrize("mask", [[0, 0, 0], [0, 1, 0]])
def test_masks_with_fewer_than_two_entries_are_safe(mask):
    values = torch.tensor([math.nan, 5.0, math.inf])
    assert F.masked_mean(values, torch.tensor(mask)).item() == (5.0 if any(mask) else 0.0)
    assert F.masked_var(values, torch.tensor(mask)).item() == 0.0
    assert F.masked_whiten(values, torch.tensor(mask)).tolist() == [0.0, 0.0, 0.0]


@given(st.lists(st.tuples(st.floats(-9, 9), st.booleans()), min_size=2, max_size=30))
@settings(max_examples=60, deadline=None)
def test_whitened_values_have_mean_0_and_variance_1(entries):
    values = torch.tensor([v for v, _ in entries], dtype=torch.float64)
    mask = torch.tensor([m for _, m in entries])
    kept = values[mask]
    whitened = F.masked_whiten(values, mask)
    assert (whitened[~mask] == 0).all()
    if len(kept) > 1 and kept.var() > 1e-3:
        assert whitened[mask].mean().item() == pytest.approx(0, abs=1e-9)
        assert whitened[mask].var().item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("chunk_elements", [1, 14, 2**26])  # one row at a time; two; all at once
def test_logprobs_and_entropy_do_not_depend_on_the_chunks(monkeypatch, chunk_elements):
    monkeypatch.setattr(F, "CHUNK_ELEMENTS", chunk_elements)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(7, (3, 5), generator=generator)
    logprobs = F.logprobs_from_logits(logits, labels)
    entropy = F.entropy_from_logits(logits)
    for b in range(3):
        for t in range(5):
            weights = [math.exp(x) for x in logits[b, t].tolist()]
            p = [w / sum(weights) for w in weights]
            assert logprobs[b, t].item() == pytest.approx(math.log(p[int(labels[b, t])]))
            assert entropy[b, t].item() == pytest.approx(-sum(x * math.log(x) for x in p))
    (logprobs.sum() + entropy.sum()).backward()
    again = logits.detach().clone().requires_grad_()
    table = again.log_softmax(-1)
    (table.gather(-1, labels[..., None]).sum() - (table.exp() * table).sum()).backward()
    torch.testing.assert_close(logits.grad, again.grad)


def test_low_precision_logits_give_float32():
    logits = torch.tensor([[2.0, 2.0, 2.0, 2.0]], dtype=torch.bfloat16)
    assert F.logprobs_from_logits(logits, torch.tensor([1])).item() == pytest.approx(
        -math.log(4), abs=1e-6
    )
    assert F.entropy_from_logits(logits).dtype == torch.float32


def test_impossible_tokens_leave_entropy_and_gradient_finite():
    logits = torch.tensor([[0.0, 0.0, -math.inf]], requires_grad=True)
    entropy = F.entropy_from_logits(logits)
    entropy.sum().backward()
    assert entropy.item() == pytest.approx(math.log(2))
    assert logits.grad is not None and logits.grad.isfinite().all()


def test_no_rows():
    assert F.logprobs_from_logits(
        torch.zeros(0, 5, 7), torch.zeros(0, 5, dtype=torch.long)
    ).shape == (0, 5)


class _LargestFloat32(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dtype == torch.float32:
            self.elements = max(self.elements, result.numel())
        return result


def test_no_float32_copy_of_all_logits(monkeypatch):
    monkeypatch.setattr(F, "CHUNK_ELEMENTS", 4 * 50)
    logits = torch.randn(64, 50).to(torch.bfloat16).requires_grad_()
    saved = []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
        _LargestFloat32() as largest,
    ):
        loss = F.logprobs_from_logits(logits, torch.zeros(64, dtype=torch.long)).sum()
        loss.backward()
    assert largest.elements <= 4 * 50
    assert sum(t.numel() for t in saved if t.dtype == torch.float32) <= 4 * 50


@pytest.mark.parametrize("chunk", [1, 2**26])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_one_pass_gives_log_probs_and_entropy_at_the_temperature(monkeypatch, chunk, temperature):
    monkeypatch.setattr(F, "CHUNK_ELEMENTS", chunk)
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 11, dtype=torch.float64, generator=g, requires_grad=True)
    labels = torch.randint(0, 11, (2, 3), generator=g)
    log_probs, entropy = F.logprobs_and_entropy(logits, labels, temperature)
    expected = torch.distributions.Categorical(logits=logits / temperature)
    torch.testing.assert_close(log_probs, expected.log_prob(labels))
    torch.testing.assert_close(entropy, expected.entropy())
    alone = F.logprobs_from_logits(logits, labels, temperature)
    torch.testing.assert_close(log_probs, alone)
    (found,) = torch.autograd.grad((log_probs.sum() + entropy.sum()), logits)
    (wanted,) = torch.autograd.grad(
        (expected.log_prob(labels).sum() + expected.entropy().sum()), logits
    )
    torch.testing.assert_close(found, wanted)
