from __future__ import annotations

import pytest
import torch
from torch import Tensor

from longtrain.attention.dropout import keep_mask

SEEDS = torch.tensor([1, 2, -1, 2**62 + 5, 1 + 2**32])


def mask(dropout: float, length: int = 128, heads: int = 4, seeds: Tensor = SEEDS) -> Tensor:
    return keep_mask(seeds, heads, torch.arange(length), torch.arange(length), dropout)


@pytest.mark.parametrize("dropout", [0.01, 0.1, 0.5, 0.9])
def test_rate(dropout: float) -> None:
    """Within five standard deviations of a fair coin, as a whole and for every row of the batch, head, query and key."""
    kept = mask(dropout).double()
    for dims in ((), (0,), (1,), (2,), (3,)):
        others = [d for d in range(4) if d not in dims]
        mean = kept.mean(others)
        samples = kept.numel() / max(mean.numel(), 1)
        deviation = (dropout * (1 - dropout) / samples) ** 0.5
        assert ((mean - (1 - dropout)).abs() < 5 * deviation).all()


def test_independence() -> None:
    """Masks of neighbouring heads, seeds and positions agree as often as two fair coins."""
    kept = mask(0.5)
    pairs = {
        "seeds": (kept[:-1], kept[1:]),
        "seeds that differ in the high word": (kept[0], kept[-1]),
        "heads": (kept[:, :-1], kept[:, 1:]),
        "queries": (kept[:, :, :-1], kept[:, :, 1:]),
        "keys": (kept[..., :-1], kept[..., 1:]),
        "query and key exchanged": (kept, kept.mT),
        "diagonals": (kept[:, :, :-1, :-1], kept[:, :, 1:, 1:]),
    }
    for name, (a, b) in pairs.items():
        deviation = 0.5 / a.numel() ** 0.5
        assert abs((a == b).double().mean().item() - 0.5) < 6 * deviation, name


def test_known_answer() -> None:
    """The words of the generator are a contract with every kernel, and with every run that is resumed."""

    def fmix32(x: int) -> int:
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            x = (x ^ x >> shift) * factor % 2**32
        return x ^ x >> 16

    def word(seed: int, head: int, i: int, j: int) -> int:
        x = fmix32(fmix32(seed % 2**32) ^ (seed >> 32) % 2**32)
        for key, factor in ((head, 0x9E3779B1), (i, 0x85EBCA77), (j, 0xC2B2AE3D)):
            x = fmix32(x ^ key * factor % 2**32)
        return x

    rows, columns = torch.tensor([0, 3, 2**20 - 1, 2**31 + 7]), torch.tensor([0, 1, 2**20 + 5])
    kept = keep_mask(SEEDS, 3, rows, columns, 0.3)
    expected = [
        [[[word(s, h, i, j) >= round(0.3 * 2**32) for j in columns.tolist()] for i in rows.tolist()] for h in range(3)]
        for s in SEEDS.tolist()
    ]
    assert kept.tolist() == expected


def test_the_same_for_any_tile() -> None:
    whole = mask(0.3, 64)
    tile = keep_mask(SEEDS, 4, torch.arange(17, 41), torch.arange(3, 64, 5), 0.3)
    assert torch.equal(tile, whole[:, :, 17:41, 3:64:5])
    assert torch.equal(mask(0.3, 64), whole)


def test_more_dropout_drops_more_of_the_same() -> None:
    assert not (mask(0.5) & ~mask(0.2)).any()
    assert mask(0.0).all()
