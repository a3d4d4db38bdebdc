"""Attention in one call, for code that has another library's in this place."""

from __future__ import annotations

from functools import lru_cache

from torch import Tensor

from longtrain.attention.mask import AttentionMask
from longtrain.attention.protocol import PLAIN, Needs
from longtrain.attention.spec import AttentionSpec
from longtrain.kernels.local import LocalAttend
from longtrain.kernels.registry import AUTO, kinds_of, select


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, spec: AttentionSpec = PLAIN, *, kernel: str = AUTO
) -> Tensor:  # fmt: skip
    """Attention of q [B, Tq, H, D] over k [B, Tk, Hkv, D] and v [B, Tk, Hkv, Dv], out [B, Tq, H, Dv], with gradients.

    H is a multiple of Hkv. kernel: a name, or "auto" for the fastest that can do this (docs/attention.md lists what each can do).
    Raises KernelError with every kernel's reasons where none can.
    """
    kinds, device = kinds_of([mask.band]), q.device.type
    needs = Needs(kinds, mask.q_segments is not None, spec.features, q.shape[-1], v.shape[-1], q.dtype, device, length=q.shape[1])
    return _attend(needs, kernel)(q, k, v, mask, spec)


@lru_cache(maxsize=256)
def _attend(needs: Needs, kernel: str) -> LocalAttend:
    return LocalAttend(select(needs, kernel).kernel)
