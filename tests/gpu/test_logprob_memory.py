"""Peak memory of log-probs and entropy on a GPU, as scripts/bench/logprob_memory.py measures it."""

import sys

import pytest

from tests.e2e.runs import ROOT

sys.path.insert(0, str(ROOT / "scripts" / "bench"))
import logprob_memory


@pytest.mark.gpu
def test_log_probs_take_less_than_half_of_the_memory_of_a_naive_log_softmax():
    naive, _, *expected = logprob_memory.measure("naive", 4096, 152_000, "cuda")
    ours, _, *found = logprob_memory.measure("ours", 4096, 152_000, "cuda")
    assert 0 < ours < 0.5 * naive
    assert found == pytest.approx(expected, rel=1e-4)
