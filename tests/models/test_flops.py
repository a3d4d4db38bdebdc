from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from longtrain.attention import AttentionMask, Band
from longtrain.models import Decoder, ModelConfig, attention_pairs, training_flops

bounds = st.one_of(st.none(), st.integers(-12, 12))


@given(bounds, bounds, st.lists(st.integers(0, 11), max_size=4))
def test_pairs_equal_a_count_of_the_dense_mask(lo: int | None, hi: int | None, lengths: list[int]) -> None:
    band = Band(lo, hi)
    assert attention_pairs(band, lengths) == sum(int(band.dense(n, n).sum()) for n in lengths)


def test_pairs_of_a_million_tokens() -> None:
    n = 2**20
    assert attention_pairs(Band.causal(), [n]) == n * (n + 1) // 2
    assert attention_pairs(Band.causal(4096), [n]) == 4096 * n - 4096 * 4095 // 2


def dense_attend(q, k, v, mask: AttentionMask, spec=None, *, keep=None):
    """The whole square, by products that torch's counter knows."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return ((q @ k.mT).softmax(-1) @ v).transpose(1, 2)


@pytest.mark.parametrize("change", [{}, {"tied_embeddings": True}, {"layers": 1, "head_dim": 16}, {"family": "opt"}])
def test_full_equals_the_counter_of_torch(small: ModelConfig, build: Callable[..., Decoder], change: dict) -> None:
    config = replace(small, kv_heads=4, **change)
    model = build(config, "none", dense_attend)
    tokens = torch.randint(config.vocab_size, (2, 24))
    positions = torch.arange(24).expand(2, 24)
    with FlopCounterMode(display=False) as counter:
        model(tokens, positions, AttentionMask(Band.full())).sum().backward()
    assert counter.get_total_flops() == training_flops(config, ((0, 24), (0, 24)), 24).full


def test_documents_window_and_padding_are_not_useful_work(small: ModelConfig) -> None:
    config = replace(small, window=4)
    boundaries = ((0, 3, 10), (0, 16))
    flops = training_flops(config, boundaries, 16)
    tokens = (10 + 16, 2 * 16)
    pairs = (sum(int(Band.causal(4).dense(n, n).sum()) for n in (3, 7, 16)), 2 * 16 * 16)
    matrices = 32 * 97 + 2 * (32 * 8 * (4 + 2 + 2 + 4) + 3 * 32 * 48)
    for part, n, visible in zip(flops, tokens, pairs, strict=True):
        assert part == 6 * matrices * n + 2 * 12 * 8 * 4 * visible
