"""Rotary positions of queries and keys in one Triton launch.

Legend: i_ program index, o_ offset, m_ mask, p_ pointer, b_ block of values, s_ strides of (batch, position, head); tiles are
[BLOCK_T positions, BLOCK_H heads, features]; HALF of the turned features, D of all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from longtrain.errors import KernelError
from longtrain.kernels.language import constexpr, jit, tl
from longtrain.kernels.operators import DTYPES, differentiable, on_device, padded
from longtrain.kernels.plain import check_rotary


@dataclass(frozen=True)
class Tuning:
    """tile: pairs of features of a tile; per_thread: those that a thread holds."""

    tile: int
    per_thread: int


TUNING = Tuning(2048, 16)
"""One position of 32 heads of 128: two 16-byte loads of bf16 a thread and half. `python -m benchmarks.layers --tune` measures
others."""


@jit
def turn(
    p_x, s_x, p_out, b_cos, b_sin, i_b, o_t, length,
    H: constexpr, D: constexpr, HALF: constexpr, BLOCK_H: constexpr, BLOCK_F: constexpr, BLOCK_R: constexpr,
):  # fmt: skip
    """Every head of a block of positions."""
    o_f = tl.arange(0, BLOCK_F)[None, None, :]
    p_x += i_b * s_x[0] + (o_t.to(tl.int64) * s_x[1])[:, None, None]
    p_out += ((i_b * length + o_t) * (H * D))[:, None, None]
    for h in range(0, H, BLOCK_H):
        o_h = h + tl.arange(0, BLOCK_H)[None, :, None]
        m_rows = (o_t < length)[:, None, None] & (o_h < H)
        p_head, p_to = p_x + o_h.to(tl.int64) * s_x[2], p_out + o_h * D
        m = m_rows & (o_f < HALF)
        b_first = tl.load(p_head + o_f, mask=m, other=0.0).to(tl.float32)
        b_second = tl.load(p_head + (HALF + o_f), mask=m, other=0.0).to(tl.float32)
        tl.store(p_to + o_f, (b_first * b_cos - b_second * b_sin).to(p_out.dtype.element_ty), mask=m)
        tl.store(p_to + (HALF + o_f), (b_second * b_cos + b_first * b_sin).to(p_out.dtype.element_ty), mask=m)
        if D > 2 * HALF:
            o_r = 2 * HALF + tl.arange(0, BLOCK_R)[None, None, :]
            tl.store(p_to + o_r, tl.load(p_head + o_r, mask=m_rows & (o_r < D)), mask=m_rows & (o_r < D))


@jit(do_not_specialize=["length", "tiles"])
def rotary_kernel(
    p_q, p_k, p_cos, p_sin, p_q_out, p_k_out, s_q, s_k, s_cos, s_sin, length, tiles,
    H: constexpr, HKV: constexpr, D: constexpr, HALF: constexpr, INVERSE: constexpr,
    BLOCK_T: constexpr, BLOCK_H: constexpr, BLOCK_HKV: constexpr, BLOCK_F: constexpr, BLOCK_R: constexpr,
):  # fmt: skip
    i_b, i_t = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    o_t, o_f = i_t * BLOCK_T + tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_F)[None, None, :]
    m = (o_t < length)[:, None, None] & (o_f < HALF)
    o_rows = o_t.to(tl.int64)[:, None, None]
    b_cos = tl.load(p_cos + i_b * s_cos[0] + o_rows * s_cos[1] + o_f, mask=m, other=0.0).to(tl.float32)
    b_sin = tl.load(p_sin + i_b * s_sin[0] + o_rows * s_sin[1] + o_f, mask=m, other=0.0).to(tl.float32)
    if INVERSE:
        b_sin = -b_sin
    turn(p_q, s_q, p_q_out, b_cos, b_sin, i_b, o_t, length, H, D, HALF, BLOCK_H, BLOCK_F, BLOCK_R)
    turn(p_k, s_k, p_k_out, b_cos, b_sin, i_b, o_t, length, HKV, D, HALF, BLOCK_HKV, BLOCK_F, BLOCK_R)


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """`plain.rotary` in one launch, which reads the tables once a position; q and k may be views with a contiguous last dimension.

    New tensors come back: what the caller gave stays as it is. The backward turns the other way and keeps the tables only; there is
    no gradient of the tables.

    Raises:
        KernelError: shapes that do not fit, dtypes that the kernel does not take, tables that require a gradient.
    """
    if cos.requires_grad or sin.requires_grad:
        raise KernelError("fused rotary has no gradient of cos and sin: detach them, or leave rotary out of the fused layers")
    return _rotary(q, k, cos, sin, False)


def _launch(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    check_rotary(q, k, cos, sin)
    if q.dtype not in DTYPES or k.dtype not in DTYPES:
        raise KernelError(
            f"fused rotary: q and k are {q.dtype} and {k.dtype}, not fp16, bf16 or fp32; leave rotary out of the fused layers"
        )
    outputs = _fake(q, k, cos, sin, inverse)
    (batch, length, heads, dim), kv_heads, half = q.shape, k.shape[2], cos.shape[-1]
    if not batch * length * dim * max(heads, kv_heads):
        return outputs
    q, k, cos, sin = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, cos, sin))
    cos, sin = (x.expand(batch, -1, -1, -1) for x in (cos, sin))
    features = padded(half)
    most = max(TUNING.tile // features, 1)
    block = min(padded(max(heads, kv_heads)), most)
    positions = min(max(most // block, 1), padded(length))
    tiles = -(-length // positions)
    pairs = positions * block * features
    with on_device(q):
        rotary_kernel[(batch * tiles,)](
            q, k, cos, sin, *outputs, q.stride()[:3], k.stride()[:3], cos.stride()[:2], sin.stride()[:2], length, tiles,
            H=heads, HKV=kv_heads, D=dim, HALF=half, INVERSE=inverse, BLOCK_T=positions, BLOCK_H=min(padded(heads), block),
            BLOCK_HKV=min(padded(kv_heads), block), BLOCK_F=features, BLOCK_R=padded(dim - 2 * half),
            num_warps=min(max(pairs // (32 * TUNING.per_thread), 1), 8),
        )  # fmt: skip
    return outputs


def _fake(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[2:4])
    ctx.inverse = inputs[4]


def _gradients(backward: Any, ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
    return *backward(dq, dk, *ctx.saved_tensors, not ctx.inverse), None, None, None


_rotary = differentiable("rotary", (_launch, _fake), (_launch, _fake), _save, _gradients)
