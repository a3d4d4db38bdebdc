"""RMSNorm and LayerNorm in Triton, each also with the residual addition before it.

Legend: i_ program index, o_ offset, m_ mask, p_ pointer, b_ block of values, s_ row stride; tiles are [BLOCK_R rows, BLOCK_C
features], BLOCK_C >= C. CENTRED: LayerNorm, else RMSNorm. Statistics: fp32, 1 / std of every row, then for LayerNorm its mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from longtrain.errors import KernelError
from longtrain.kernels.language import constexpr, jit, tl
from longtrain.kernels.operators import DTYPES, differentiable, on_device, padded, processors, rows_of


@dataclass(frozen=True)
class Tuning:
    """per_thread: elements of a tile that a thread holds; tile: elements of a tile where rows are shorter; resident: warps that a
    multiprocessor is given, stages: depth of the load pipeline (both: backward, whose programs go through many rows)."""

    per_thread: int
    tile: int
    resident: int = 0
    stages: int = 1


TUNING = {"forward": Tuning(16, 2048), "backward": Tuning(8, 2048, resident=32, stages=3)}
"""Forward: two 16-byte loads of bf16 a thread and tensor. Backward: sums of the parameters' gradients cost registers, so a thread
holds half of that; two programs of 16 warps a multiprocessor, whose next rows travel to shared memory meanwhile, have 64 KiB of
loads under way. `python -m benchmarks.layers --tune` measures others."""
WIDEST = 16384
MOST_WARPS = 16
SHARED = 48 * 2**10
"""Bytes of shared memory that a program's load pipeline may take: two programs fit every GPU of compute capability 8.0 or above."""
NARROW = 8192
"""Wider rows leave registers for the sums of one parameter only: the other one is summed by torch."""


@jit
def load_rows(p_x, s_x, row, rows, C: constexpr, BLOCK_R: constexpr, BLOCK_C: constexpr):
    """[BLOCK_R, BLOCK_C] from `row` on, 0 beyond the last row and feature."""
    o_r, o_c = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_C)
    # 32 bits suffice inside a tile (the launcher sees to it), not inside a tensor
    p_tile = p_x + tl.cast(row, tl.int64) * s_x + (o_r[:, None] * s_x + o_c[None, :])
    if BLOCK_R > 1 and BLOCK_C != C:
        return tl.load(p_tile, mask=(row + o_r < rows)[:, None] & (o_c < C)[None, :], other=0.0)
    elif BLOCK_R > 1:
        return tl.load(p_tile, mask=(row + o_r < rows)[:, None], other=0.0)
    elif BLOCK_C != C:
        return tl.load(p_tile, mask=(o_c < C)[None, :], other=0.0)
    else:
        return tl.load(p_tile)


@jit
def store_rows(p_x, b_x, row, rows, C: constexpr, BLOCK_R: constexpr, BLOCK_C: constexpr):
    o_r, o_c = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_C)
    p_tile = p_x + tl.cast(row, tl.int64) * C + (o_r[:, None] * C + o_c[None, :])
    b_x = b_x.to(p_x.dtype.element_ty)
    if BLOCK_R > 1 and BLOCK_C != C:
        tl.store(p_tile, b_x, mask=(row + o_r < rows)[:, None] & (o_c < C)[None, :])
    elif BLOCK_R > 1:
        tl.store(p_tile, b_x, mask=(row + o_r < rows)[:, None])
    elif BLOCK_C != C:
        tl.store(p_tile, b_x, mask=(o_c < C)[None, :])
    else:
        tl.store(p_tile, b_x)


@jit
def load_features(p_x, C: constexpr, BLOCK_C: constexpr):
    o_c = tl.arange(0, BLOCK_C)
    return tl.load(p_x + o_c, mask=o_c < C, other=0.0)[None, :]


@jit(do_not_specialize=["rows"])
def forward_kernel(
    p_x, p_branch, p_weight, p_bias, p_y, p_total, p_stats, s_x, s_branch, rows, eps,
    C: constexpr, BLOCK_R: constexpr, BLOCK_C: constexpr, CENTRED: constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_R
    o_r, o_c = row + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_C)
    b_x = load_rows(p_x, s_x, row, rows, C, BLOCK_R, BLOCK_C)
    if p_branch is not None:
        b_branch = load_rows(p_branch, s_branch, row, rows, C, BLOCK_R, BLOCK_C)
        b_x = (b_x.to(tl.float32) + b_branch.to(tl.float32)).to(p_x.dtype.element_ty)
        store_rows(p_total, b_x, row, rows, C, BLOCK_R, BLOCK_C)
    b_weight = load_features(p_weight, C, BLOCK_C).to(tl.float32)
    b_x = b_x.to(tl.float32)
    if CENTRED:
        b_mean = tl.sum(b_x, 1) / C
        tl.store(p_stats + rows + o_r, b_mean, mask=o_r < rows)
        b_x = tl.where((o_c < C)[None, :], b_x - b_mean[:, None], 0.0)
    b_rstd = tl.rsqrt(tl.sum(b_x * b_x, 1) / C + eps)
    tl.store(p_stats + o_r, b_rstd, mask=o_r < rows)
    b_y = b_x * b_rstd[:, None]
    if not CENTRED:
        b_y = b_y.to(p_x.dtype.element_ty).to(tl.float32)
    b_y = b_y * b_weight
    if p_bias is not None:
        b_y += load_features(p_bias, C, BLOCK_C).to(tl.float32)
    store_rows(p_y, b_y, row, rows, C, BLOCK_R, BLOCK_C)


@jit(do_not_specialize=["rows"])
def backward_kernel(
    p_dy, p_dtotal, p_x, p_weight, p_stats, p_dx, p_partial, s_dy, s_dtotal, s_x, rows,
    C: constexpr, BLOCK_R: constexpr, BLOCK_C: constexpr, CENTRED: constexpr, SUMS: constexpr, STAGES: constexpr,
):  # fmt: skip
    """dx of every row; of this program's rows the gradients of the first SUMS parameters, fp32 [SUMS, programs, C]."""
    i_p = tl.program_id(0)
    o_c = tl.arange(0, BLOCK_C)
    b_weight = load_features(p_weight, C, BLOCK_C)
    b_dweight = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    b_dbias = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for row in tl.range(i_p * BLOCK_R, rows, tl.num_programs(0) * BLOCK_R, num_stages=STAGES):
        o_r = row + tl.arange(0, BLOCK_R)
        b_dy = load_rows(p_dy, s_dy, row, rows, C, BLOCK_R, BLOCK_C).to(tl.float32)
        b_x = load_rows(p_x, s_x, row, rows, C, BLOCK_R, BLOCK_C).to(tl.float32)
        b_rstd = tl.load(p_stats + o_r, mask=o_r < rows, other=0.0)[:, None]
        if p_dtotal is not None:
            b_dtotal = load_rows(p_dtotal, s_dtotal, row, rows, C, BLOCK_R, BLOCK_C)
        if CENTRED:
            b_x = b_x - tl.load(p_stats + rows + o_r, mask=o_r < rows, other=0.0)[:, None]
        b_x = b_x * b_rstd
        if SUMS > 0:
            b_rounded = b_x if CENTRED else b_x.to(p_x.dtype.element_ty).to(tl.float32)
            b_dweight += b_dy * b_rounded
        if SUMS > 1:
            b_dbias += b_dy
        # beyond the last feature dy and the weight are 0
        b_dy = b_dy * b_weight.to(tl.float32)
        b_dx = b_dy - b_x * (tl.sum(b_dy * b_x, 1) / C)[:, None]
        if CENTRED:
            b_dx -= (tl.sum(b_dy, 1) / C)[:, None]
        b_dx = b_dx * b_rstd
        if p_dtotal is not None:
            b_dx += b_dtotal.to(tl.float32)
        store_rows(p_dx, b_dx, row, rows, C, BLOCK_R, BLOCK_C)
    if SUMS > 0:
        tl.store(p_partial + i_p * C + o_c, tl.sum(b_dweight, 0), mask=o_c < C)
    if SUMS > 1:
        tl.store(p_partial + (tl.num_programs(0) + i_p) * C + o_c, tl.sum(b_dbias, 0), mask=o_c < C)


@jit(do_not_specialize=["programs"])
def sum_kernel(p_partial, p_sum, programs, C: constexpr, BLOCK_P: constexpr, BLOCK_C: constexpr):
    """Sums [programs, C] over the programs, always in one order. Grid: blocks of features x what is summed."""
    o_p, o_c = tl.arange(0, BLOCK_P), tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    p_partial += tl.program_id(1) * programs * C
    b_sum = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for i in range(0, programs, BLOCK_P):
        m = (i + o_p < programs)[:, None] & (o_c < C)[None, :]
        b_sum += tl.load(p_partial + (i + o_p)[:, None] * C + o_c[None, :], mask=m, other=0.0)
    p_out = p_sum + tl.program_id(1) * C + o_c
    tl.store(p_out, tl.sum(b_sum, 0).to(p_sum.dtype.element_ty), mask=o_c < C)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`plain.rms_norm` in one pass. x [..., C] of fp16, bf16 or fp32, C up to 16384; keeps x and one fp32 a row for the backward.

    Raises:
        KernelError: dtypes or shapes that these kernels do not take.
    """
    return _norm(x, weight, None, eps, False)[0]


def add_rms_norm(x: Tensor, branch: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`plain.add_rms_norm` in one pass; keeps the sum and one fp32 a row. The backward takes both gradients in one pass."""
    return _add_norm(x, branch, weight, None, eps, False)[:2]


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """`plain.layer_norm` in one pass; keeps x and two fp32 a row. bias: of weight's shape and dtype, as torch wants it."""
    return _norm(x, weight, bias, eps, True)[0]


def add_layer_norm(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """`plain.add_layer_norm` in one pass; keeps the sum and two fp32 a row."""
    return _add_norm(x, branch, weight, bias, eps, True)[:2]


@cache
def _shape(tuning: Tuning, width: int) -> dict[str, int]:
    block = padded(width)
    tile = max(block, tuning.tile)
    warps = min(max(tile // (32 * tuning.per_thread), 1), MOST_WARPS)
    return {"C": width, "BLOCK_R": tile // block, "BLOCK_C": block, "num_warps": warps}


def _check(x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor | None) -> None:
    for given in (x, branch, weight):
        if given is not None and given.dtype not in DTYPES:
            raise KernelError(
                f"fused norms compute in fp16, bf16 and fp32, not in {given.dtype}: leave norm out of the fused layers"
            )
    if weight.shape != x.shape[-1:] or not 0 < weight.shape[0] <= WIDEST:
        raise KernelError(f"fused norms: x {tuple(x.shape)}, weight {tuple(weight.shape)}: one weight a feature, up to {WIDEST}")
    if branch is not None and branch.shape != x.shape:
        raise KernelError(f"fused norms: x {tuple(x.shape)} and what is added, {tuple(branch.shape)}, must be of one shape")
    if bias is not None and (bias.shape, bias.dtype) != (weight.shape, weight.dtype):
        described = f"weight {tuple(weight.shape)} {weight.dtype}, bias {tuple(bias.shape)} {bias.dtype}"
        raise KernelError(f"fused norms: {described}: both must be of one shape and dtype")


def _forward(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, centred: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    _check(x, branch, weight, bias)
    y, total, stats = _results(x, branch, weight, centred)
    count = stats.shape[0] // (1 + centred)
    if count:
        shape = _shape(TUNING["forward"], weight.shape[0])
        tile = shape["BLOCK_R"]
        rows, stride = rows_of(x, tile)
        added, added_stride = (None, 0) if branch is None else rows_of(branch, tile)
        bias = None if bias is None else bias.contiguous()
        with on_device(x):
            forward_kernel[(-(-count // tile),)](
                rows, added, weight.contiguous(), bias, y, total, stats, stride, added_stride, count, eps, CENTRED=centred, **shape
            )
    return y, total, stats


def _results(x: Tensor, branch: Tensor | None, weight: Tensor, centred: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    dtype = x.dtype if centred else torch.promote_types(x.dtype, weight.dtype)
    stats = x.new_empty(x.shape[:-1].numel() * (1 + centred), dtype=torch.float32)
    return x.new_empty(x.shape, dtype=dtype), None if branch is None else x.new_empty(x.shape), stats


def _norm_launch(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, centred: bool) -> tuple[Tensor, Tensor]:
    y, _, stats = _forward(x, None, weight, bias, eps, centred)
    return y, stats


def _norm_fake(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, centred: bool) -> tuple[Tensor, Tensor]:
    y, _, stats = _results(x, None, weight, centred)
    return y, stats


def _add_norm_launch(
    x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor | None, eps: float, centred: bool
) -> tuple[Tensor, Tensor, Tensor]:
    y, total, stats = _forward(x, branch, weight, bias, eps, centred)
    assert total is not None
    return y, total, stats


def _add_norm_fake(
    x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor | None, eps: float, centred: bool
) -> tuple[Tensor, Tensor, Tensor]:
    y, total, stats = _results(x, branch, weight, centred)
    assert total is not None
    return y, total, stats


def _backward_launch(
    dy: Tensor, dtotal: Tensor | None, x: Tensor, weight: Tensor, stats: Tensor, centred: bool, sums: int
) -> tuple[Tensor, Tensor]:
    """dx like x, and the gradients of the first `sums` parameters (weight, bias) one after the other, of weight's dtype."""
    dx, dparameters = _backward_fake(dy, dtotal, x, weight, stats, centred, sums)
    count, width = stats.shape[0] // (1 + centred), weight.shape[0]
    if not count:
        return dx, dparameters.zero_()
    tuning = TUNING["backward"]
    shape = _shape(tuning, width)
    tile = shape["BLOCK_R"]
    (grads, s_grads), (rows, s_rows) = rows_of(dy, tile), rows_of(x, tile)
    others, s_others = (None, 0) if dtotal is None else rows_of(dtotal, tile)
    # few programs that go through many rows: their partial sums stay small beside the rows
    resident = max(tuning.resident // shape["num_warps"], 1)
    programs = min(-(-count // tile), processors(x.device) * resident)
    tile_bytes = tile * shape["BLOCK_C"] * sum(t.element_size() for t in (dy, x, dtotal) if t is not None)
    inside = min(sums, 1) if width > NARROW else sums
    partial = x.new_empty(inside * programs * width, dtype=torch.float32) if inside else None
    with on_device(x):
        backward_kernel[(programs,)](
            grads, others, rows, weight.contiguous(), stats, dx, partial, s_grads, s_others, s_rows, count,
            CENTRED=centred, SUMS=inside, STAGES=min(tuning.stages, 1 + SHARED // tile_bytes), **shape,
        )  # fmt: skip
        if inside:
            sum_kernel[(-(-width // 32), inside)](partial, dparameters, programs, C=width, BLOCK_P=64, BLOCK_C=32)
    if sums > inside:
        dparameters[width:] = dy.reshape(-1, width).sum(0, dtype=torch.float32)
    return dx, dparameters


def _backward_fake(
    dy: Tensor, dtotal: Tensor | None, x: Tensor, weight: Tensor, stats: Tensor, centred: bool, sums: int
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(sums * weight.shape[0])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """The norm's input and what its backward needs besides; of an addition, the sum."""
    x, weight, bias = (inputs[0] if len(output) == 2 else output[1]), *inputs[-4:-2]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[-1])
    ctx.save_for_backward(x, weight, output[-1])
    ctx.has_bias, ctx.centred = bias is not None, inputs[-1]


def _gradients(backward: Any, ctx: Any, dy: Tensor | None, dtotal: Tensor | None) -> tuple[Tensor | None, ...]:
    """Of the norm's input, weight and bias."""
    if dy is None:
        return dtotal, None, None
    need_weight, need_bias = ctx.needs_input_grad[-4:-2]
    sums = 1 + ctx.has_bias if need_weight or need_bias else 0
    dx, dparameters = backward(dy, dtotal, *ctx.saved_tensors, ctx.centred, sums)
    if sums < 2:
        return dx, dparameters if sums else None, None
    dweight, dbias = dparameters.chunk(2)
    return dx, dweight, dbias


def _norm_gradients(backward: Any, ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    return *_gradients(backward, ctx, dy, None), None, None


def _add_norm_gradients(backward: Any, ctx: Any, dy: Tensor | None, dtotal: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    dx, dweight, dbias = _gradients(backward, ctx, dy, dtotal)
    return dx, dx, dweight, dbias, None, None


_BACKWARD = (_backward_launch, _backward_fake)
_norm = differentiable("norm", (_norm_launch, _norm_fake), _BACKWARD, _save, _norm_gradients)
_add_norm = differentiable("add_norm", (_add_norm_launch, _add_norm_fake), _BACKWARD, _save, _add_norm_gradients)
