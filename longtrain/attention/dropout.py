"""Dropout as a pure function of (seed, head, query position, key position): equal for any tiling, ring layout and recomputation."""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


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
