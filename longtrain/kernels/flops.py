"""FLOPs of attention as its formulas count them, from shapes and a band alone. One multiply-add is two.

For `torch.utils.flop_counter`, where the operators of `kernels.ops` register them. Shapes do not show documents: under a mask with
documents these are upper bounds, those of the band alone (`models.flops.training_flops` knows the documents).
"""

from __future__ import annotations

from collections.abc import Sequence

from longtrain.attention.mask import Band


def forward_flops(q: Sequence[int], k: Sequence[int], v: Sequence[int], band: Band) -> int:
    """Two products a visible pair and head, Q K^T and P V: 2 (D + Dv). q [B, Tq, H, D], k [B, Tk, Hkv, D], v [B, Tk, Hkv, Dv]."""
    batch, queries, heads, dim = q
    return batch * heads * band.pairs(queries, k[1]) * 2 * (dim + v[-1])


def backward_flops(q: Sequence[int], k: Sequence[int], v: Sequence[int], band: Band) -> int:
    """Five products a visible pair and head: Q K^T again, dO V^T, P^T dO, dS K and dS^T Q; 2.5 times the forward where Dv = D.

    As torch counts its own FlashAttention. `training_flops` counts four: recomputed scores are no useful work.
    """
    batch, queries, heads, dim = q
    return batch * heads * band.pairs(queries, k[1]) * 2 * (3 * dim + 2 * v[-1])
