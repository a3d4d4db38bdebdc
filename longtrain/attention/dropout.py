"""Dropout as a pure function of seeds and positions: equal for any tiling, ring layout and recomputation.

Of attention probabilities it is one of (seed, head, query position, key position), of hidden features of (seed, position, feature);
the seed of a row of a batch is one of the run's seed, the row's number in the order of the data, and the place in the model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_CHUNK = 1 << 22
"""Features whose int64 words are held at once."""


@dataclass(frozen=True, eq=False)
class Noise:
    """What dropout depends on. seeds: int64 [B], one a row. places: int64 [T], where the tokens at hand stand in the whole row."""

    seeds: Tensor
    places: Tensor

    def to(self, device: torch.device | str) -> Noise:
        return Noise(self.seeds.to(device, non_blocking=True), self.places.to(device, non_blocking=True))

    def branch(self, word: int) -> Noise:
        """Noise of its own for one place in the model."""
        return Noise(derive(self.seeds, word), self.places)

    def drop(self, x: Tensor, dropout: float) -> Tensor:
        """x [B, T, C] with features dropped with probability `dropout`, the others divided by 1 - dropout."""
        if not dropout:
            return x
        features = torch.arange(x.shape[-1], device=x.device)
        rows = max(1, _CHUNK // (x.shape[0] * x.shape[-1]))
        kept = [keep_mask(self.seeds, 1, places, features, dropout)[:, 0] for places in self.places.split(rows)]
        return torch.where(torch.cat(kept, 1), x / (1 - dropout), 0)


def derive(seeds: Tensor, word: int) -> Tensor:
    """int64 seeds of the same shape, one for every (seed, word); word: any whole number below 2^63."""
    low, high = seeds & _MASK, (seeds >> 32) & _MASK
    first = _mix(low ^ ((word & _MASK) * 0x9E3779B1 & _MASK))
    first = _mix(first ^ high ^ ((word >> 32 & _MASK) * 0x85EBCA77 & _MASK))
    return first | (_mix(first ^ low ^ 0x27D4EB2F) << 32)


def keep_mask(seed: Tensor, heads: int, q_positions: Tensor, k_positions: Tensor, dropout: float) -> Tensor:
    """bool [B, heads, Tq, Tk], False where a probability is dropped. seed int64 [B], positions int64 [T].

    A counter-based generator: 32-bit words through the finalizer of MurmurHash3, one round a key word, which kernels repeat in
    unsigned 32-bit arithmetic. dropout is rounded to a multiple of 2^-32.
    """
    head = torch.arange(heads, device=seed.device)
    word = _mix(_mix(seed & _MASK) ^ ((seed >> 32) & _MASK))[:, None]
    word = _mix(word ^ (head * 0x9E3779B1 & _MASK))[:, :, None]
    word = _mix(word ^ (q_positions * 0x85EBCA77 & _MASK))[:, :, :, None]
    word = _mix(word ^ (k_positions * 0xC2B2AE3D & _MASK))
    return word >= round(dropout * 2**32)


def _mix(x: Tensor) -> Tensor:
    """fmix32 on int64 tensors that hold unsigned 32-bit words; products wrap modulo 2^64, so their low words are right."""
    x = x ^ (x >> 16)
    x = x * 0x85EBCA6B & _MASK
    x = x ^ (x >> 13)
    x = x * 0xC2B2AE35 & _MASK
    return x ^ (x >> 16)
