from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longtrain.data.order import Order


@settings(deadline=None, max_examples=100)
@given(length=st.integers(1, 700), seed=st.integers(-(2**70), 2**70), epoch=st.integers(0, 5) | st.integers(0, 2**40))
def test_every_epoch_is_a_permutation(length: int, seed: int, epoch: int) -> None:
    order = Order(length, seed)
    assert sorted(order(epoch * length + n) for n in range(length)) == list(range(length))


def test_epochs_and_seeds_differ() -> None:
    length = 64
    permutations = {
        tuple(Order(length, seed)(epoch * length + n) for n in range(length)) for seed in range(8) for epoch in range(8)
    }
    assert len(permutations) == 64


def test_order_mixes() -> None:
    """Where a sequence goes says nothing about it: over 4000 epochs, each of 5 sequences comes first about equally often."""
    firsts = [Order(5, 1)(5 * epoch) for epoch in range(4000)]
    assert all(700 < firsts.count(index) < 900 for index in range(5))
    values = [Order(10_000, 7)(n) for n in range(10_000)]
    neighbours = sum(abs(a - b) for a, b in pairwise(values)) / len(values)
    assert 3200 < neighbours < 3470


def test_huge_lengths_need_no_memory() -> None:
    order = Order(10**15, 0)
    assert len({order(n) for n in range(2000)}) == 2000


def test_order_never_changes() -> None:
    """A run that resumes under a newer version must go on with the same sequences."""
    assert [Order(10, 0)(n) for n in range(20)] == GOLDEN


def test_no_sequences() -> None:
    with pytest.raises(ValueError, match="at least one"):
        Order(0, 0)


GOLDEN = [9, 8, 6, 5, 7, 0, 2, 3, 4, 1, 7, 8, 3, 6, 2, 5, 0, 1, 9, 4]
