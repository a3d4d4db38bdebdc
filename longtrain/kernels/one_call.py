"""Attention in one call, for code that has another library's in this place."""

from __future__ import annotations

from functools import lru_cache, partial

from torch import Tensor

from longtrain.attention.mask import AttentionMask
from longtrain.attention.protocol import PLAIN, AttentionKernel, Block, Needs
from longtrain.attention.spec import AttentionSpec
from longtrain.errors import KernelError
from longtrain.kernels.local import LocalAttend
from longtrain.kernels.ops import Chooser
from longtrain.kernels.registry import AUTO, kernels, kinds_of, select, unknown


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, spec: AttentionSpec = PLAIN, *, kernel: str = AUTO
) -> Tensor:  # fmt: skip
    """Attention of q [B, Tq, H, D] over k [B, Tk, Hkv, D] and v [B, Tk, Hkv, Dv], out [B, Tq, H, Dv], with gradients.

    H is a multiple of Hkv; q, k and v are of one dtype: fp16, bf16, fp32 or fp64. kernel: a name, or "auto" for the fastest that
    can do this (docs/attention.md lists what each can do). In a compiled model it is one operator, for all lengths.
    Raises KernelError, which names the argument, where something is not as said here, or says why no kernel, or not this one, can.
    """
    for name, x, wanted, hint in (
        ("q", q, Tensor, "[batch, tokens, heads, width]"),
        ("k", k, Tensor, "[batch, tokens, heads, width]"),
        ("v", v, Tensor, "[batch, tokens, heads, width]"),
        ("mask", mask, AttentionMask, "such as AttentionMask(Band.causal())"),
        ("spec", spec, AttentionSpec, "or left out"),
    ):
        if not isinstance(x, wanted):
            raise KernelError(f"attention: {name} is of type {type(x).__name__}, must be of type {wanted.__name__}, {hint}")
    if not isinstance(kernel, str) or kernel not in _ATTENDS:
        raise unknown(str(kernel), _NAMES, "kernel")
    return _ATTENDS[kernel](q, k, v, mask, spec)


def _choose(wanted: str, q: Tensor, k: Tensor, v: Tensor, block: Block, spec: AttentionSpec) -> AttentionKernel:
    kinds, documents, device = kinds_of([block.band]), block.q_segments is not None, q.device.type
    needs = Needs(kinds, documents, spec.features, q.shape[-1], v.shape[-1], q.dtype, device, length=q.shape[1])
    return _select(needs, wanted)


@lru_cache(maxsize=256)
def _select(needs: Needs, wanted: str) -> AttentionKernel:
    return select(needs, wanted, setting="kernel").kernel


_NAMES = tuple(kernel.name for kernel in kernels())
_ATTENDS = {name: LocalAttend(Chooser(f"select {name}", partial(_choose, name))) for name in (AUTO, *_NAMES)}
