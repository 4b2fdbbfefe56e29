import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verl.utils.seqlen_balancing import balance

lengths_lists = st.lists(st.integers(0, 1000), max_size=40)


def sums(lengths, parts):
    return [sum(lengths[i] for i in part) for part in parts]


def test_by_hand():
    assert balance([8, 1, 7, 2], 2) == [[0, 1], [2, 3]]  # 9 and 9
    assert balance([5, 4, 3, 2, 1], 2) == [[1, 3, 4], [0, 2]]  # 7 and 8, three rows first
    assert balance([10, 1, 1, 1, 1], 2, equal_size=False) == [[1, 2, 3, 4], [0]]
    assert balance([], 2) == [[], []]
    assert balance([3], 2) == [[0], []]
    with pytest.raises(ValueError, match="num_parts"):
        balance([1], 0)


@given(lengths_lists, st.integers(1, 9), st.booleans())
@settings(deadline=None)
def test_every_row_once_and_sizes_even(lengths, num_parts, equal_size):
    parts = balance(lengths, num_parts, equal_size)
    assert sorted(i for part in parts for i in part) == list(range(len(lengths)))
    assert len(parts) == num_parts
    sizes = [len(part) for part in parts]
    assert sizes == sorted(sizes, reverse=True)
    assert not equal_size or sizes[0] - sizes[-1] <= 1
    assert len(lengths) < num_parts or min(sizes) > 0
    assert parts == balance(lengths, num_parts, equal_size)


@given(lengths_lists, st.integers(1, 9), st.booleans())
@settings(deadline=None)
def test_sums_differ_by_no_more_than_the_longest_row(lengths, num_parts, equal_size):
    totals = sums(lengths, balance(lengths, num_parts, equal_size))
    assert max(totals) - min(totals) <= max(lengths, default=0)


@given(st.lists(st.integers(1, 50), min_size=6, max_size=6))
@settings(deadline=None, max_examples=50)
def test_close_to_the_best_division(lengths):
    best = min(
        max(sum(half), sum(lengths) - sum(half)) for half in itertools.combinations(lengths, 3)
    )
    # 48, 16, 16, 16, 1, 1 comes to 1.3
    assert max(sums(lengths, balance(lengths, 2))) <= 4 / 3 * best
