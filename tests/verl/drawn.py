"""Masks that hypothesis draws, and values to put beside them."""

import math

import torch
from hypothesis import strategies as st

JUNK = [math.nan, math.inf, -math.inf, 1e4, -1e4]


@st.composite
def masks(draw, max_rows=6, max_cols=9):
    """[B, R] of 0 / 1 with at least one 1; rows may be fully masked."""
    rows = draw(st.integers(1, max_rows))
    cols = draw(st.integers(1, max_cols))
    bits = draw(
        st.lists(
            st.lists(st.integers(0, 1), min_size=cols, max_size=cols), min_size=rows, max_size=rows
        )
    )
    bits[draw(st.integers(0, rows - 1))][draw(st.integers(0, cols - 1))] = 1
    return torch.tensor(bits)


def normal(mask, seed, *tail):
    return torch.randn(
        *mask.shape, *tail, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )


def with_junk(x, mask, junk):
    return torch.where(mask.bool(), x, junk)
