from __future__ import annotations

import pytest
import torch
from torch import Tensor

from longtrain.attention import SequenceLayout, dropout
from longtrain.attention.dropout import Noise, derive, keep_mask

SEEDS = torch.tensor([1, 2, -1, 2**62 + 5, 1 + 2**32])


def mask(rate: float, length: int = 128, heads: int = 4, seeds: Tensor = SEEDS) -> Tensor:
    return keep_mask(seeds, heads, torch.arange(length), torch.arange(length), rate)


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5, 0.9])
def test_rate(rate: float) -> None:
    """Within five standard deviations of a fair coin, as a whole and for every row of the batch, head, query and key."""
    kept = mask(rate).double()
    for dims in ((), (0,), (1,), (2,), (3,)):
        others = [d for d in range(4) if d not in dims]
        mean = kept.mean(others)
        samples = kept.numel() / max(mean.numel(), 1)
        deviation = (rate * (1 - rate) / samples) ** 0.5
        assert ((mean - (1 - rate)).abs() < 5 * deviation).all()


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


PLACES = torch.arange(96)


def test_features_are_those_of_the_mask() -> None:
    x = torch.randn(len(SEEDS), 96, 24)
    kept = keep_mask(SEEDS, 1, PLACES, torch.arange(24), 0.3)[:, 0]
    assert torch.equal(Noise(SEEDS, PLACES).drop(x, 0.3), torch.where(kept, x / 0.7, 0))
    assert Noise(SEEDS, PLACES).drop(x, 0.0) is x
    low = Noise(SEEDS, PLACES).drop(x.bfloat16(), 0.3)
    assert low.dtype is torch.bfloat16
    assert torch.equal(low != 0, kept)


def test_features_are_the_same_for_any_shard_and_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(len(SEEDS), 96, 24)
    whole = Noise(SEEDS, PLACES).drop(x, 0.4)
    for layout in SequenceLayout:
        shards = [Noise(SEEDS, layout.shard(PLACES, 4, rank, dim=0)).drop(layout.shard(x, 4, rank), 0.4) for rank in range(4)]
        assert torch.equal(layout.unshard(shards), whole)
    monkeypatch.setattr(dropout, "_CHUNK", 1)
    assert torch.equal(Noise(SEEDS, PLACES).drop(x, 0.4), whole)


def test_seeds_derived_are_all_different() -> None:
    words = [*range(1000), 2**32, 2**32 + 1, 2**62]
    derived = torch.stack([derive(SEEDS, word) for word in words])
    assert derived.dtype is torch.int64
    assert derived.unique().numel() == derived.numel()
    again = torch.stack([derive(derive(SEEDS, first), second) for first in range(30) for second in range(3)])
    assert torch.cat([derived.flatten(), again.flatten()]).unique().numel() == derived.numel() + again.numel()
    # a contract with every run that is resumed
    assert derive(torch.tensor([0, 7, -1]), 2**40 + 3).tolist() == [-7317986719223312512, -1374392762860589512, 6405312259090426474]


def test_branches_are_independent() -> None:
    """Masks of neighbouring layers and places agree as often as two fair coins."""
    noise, ones = Noise(SEEDS, PLACES), torch.ones(len(SEEDS), 96, 64)
    masks = [noise.branch(layer).branch(place).drop(ones, 0.5) > 0 for layer in range(3) for place in range(3)]
    for i, a in enumerate(masks):
        for b in masks[:i]:
            assert abs((a == b).double().mean().item() - 0.5) < 6 * 0.5 / a.numel() ** 0.5
