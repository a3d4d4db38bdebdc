"""act(gate) * up in Triton: SwiGLU, GeGLU.

Legend: i_ program index, o_ offset, m_ mask, p_ pointer, b_ block of values, s_ row stride.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longtrain.errors import KernelError
from longtrain.kernels.language import constexpr, jit, tl
from longtrain.kernels.operators import DTYPES, differentiable, on_device, rows_of
from longtrain.kernels.plain import check_gated


@dataclass(frozen=True)
class Tuning:
    """block: elements of a program; warps: those of it."""

    block: int
    warps: int


TUNING = {"forward": Tuning(2048, 4), "backward": Tuning(1024, 4)}
"""One or two 16-byte loads of bf16 a thread and tensor; `python -m benchmarks.layers --tune` measures others."""

SQRT_HALF = tl.constexpr(0.7071067811865476)
DENSITY = tl.constexpr(0.3989422804014327)
TANH_SCALE = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi): (1 + tanh(u)) / 2 = sigmoid(2 u)
TANH_CUBIC = tl.constexpr(0.044715)


@jit
def activation(b_x, ACTIVATION: constexpr):
    """act(x) and its derivative, of fp32."""
    if ACTIVATION == "gelu":
        b_share = 0.5 * (1.0 + tl.erf(b_x * SQRT_HALF))
        b_slope = b_share + b_x * tl.exp(-0.5 * b_x * b_x) * DENSITY
    elif ACTIVATION == "gelu_tanh":
        b_square = b_x * b_x * TANH_CUBIC
        b_share = 1.0 / (1.0 + tl.exp((b_x + b_x * b_square) * -TANH_SCALE))
        b_slope = b_share + b_x * b_share * (1.0 - b_share) * (1.0 + 3.0 * b_square) * TANH_SCALE
    else:
        b_share = 1.0 / (1.0 + tl.exp(-b_x))
        b_slope = b_share * (1.0 + b_x * (1.0 - b_share))
    return b_x * b_share, b_slope


@jit
def forward_kernel(p_gate, p_up, p_out, s_gate, s_up, columns, tiles, ACTIVATION: constexpr, BLOCK: constexpr):
    i_r, i_c = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    o_c = i_c * BLOCK + tl.arange(0, BLOCK)
    m_c = o_c < columns
    b_gate = tl.load(p_gate + i_r * s_gate + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_up = tl.load(p_up + i_r * s_up + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_act, _ = activation(b_gate, ACTIVATION)
    tl.store(p_out + i_r * columns + o_c, (b_act * b_up).to(p_out.dtype.element_ty), mask=m_c)


@jit
def backward_kernel(
    p_dout, p_gate, p_up, p_dgate, p_dup, s_dout, s_gate, s_up, columns, tiles, ACTIVATION: constexpr, BLOCK: constexpr
):
    i_r, i_c = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    o_c = i_c * BLOCK + tl.arange(0, BLOCK)
    m_c = o_c < columns
    b_dout = tl.load(p_dout + i_r * s_dout + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_gate = tl.load(p_gate + i_r * s_gate + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_up = tl.load(p_up + i_r * s_up + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_act, b_slope = activation(b_gate, ACTIVATION)
    tl.store(p_dgate + i_r * columns + o_c, (b_dout * b_up * b_slope).to(p_dgate.dtype.element_ty), mask=m_c)
    tl.store(p_dup + i_r * columns + o_c, (b_dout * b_act).to(p_dup.dtype.element_ty), mask=m_c)


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """`plain.gated` in one pass, fp32 inside and rounded once. gate, up [..., C] of one shape and of fp16, bf16 or fp32; both
    may be slices of a joint projection. Keeps gate and up; the backward computes the activation again and writes new tensors.

    Raises:
        KernelError: an unknown activation, shapes that differ, dtypes that the kernel does not take.
    """
    return _gated(gate, up, activation)


def _flat(*tensors: Tensor) -> tuple[int, int, list[Tensor], list[int]]:
    """Rows, columns, tensors and row strides; one row where all are contiguous and 32 bits suffice: no program is half empty."""
    first = tensors[0]
    if first.numel() < 2**31 - 2**16 and all(x.is_contiguous() for x in tensors):
        return 1, first.numel(), list(tensors), [0] * len(tensors)
    rows = [rows_of(x) for x in tensors]
    return first.shape[:-1].numel(), first.shape[-1], [x for x, _ in rows], [stride for _, stride in rows]


def _forward_launch(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    check_gated(gate, up, activation)
    if gate.dtype not in DTYPES or up.dtype not in DTYPES:
        given = f"{gate.dtype} and {up.dtype}, not fp16, bf16 or fp32"
        raise KernelError(f"fused gated layer: gate and up are {given}; leave mlp out of the fused layers")
    out = _forward_fake(gate, up, activation)
    if out.numel():
        (rows, columns, tensors, strides), tuning = _flat(gate, up), TUNING["forward"]
        tiles = -(-columns // tuning.block)
        with on_device(gate):
            forward_kernel[(rows * tiles,)](
                *tensors, out, *strides, columns, tiles, ACTIVATION=activation, BLOCK=tuning.block, num_warps=tuning.warps
            )
    return out


def _forward_fake(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return gate.new_empty(gate.shape, dtype=torch.promote_types(gate.dtype, up.dtype))


def _backward_launch(dout: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    dgate, dup = _backward_fake(dout, gate, up, activation)
    if dout.numel():
        (rows, columns, tensors, strides), tuning = _flat(dout, gate, up), TUNING["backward"]
        tiles = -(-columns // tuning.block)
        with on_device(gate):
            backward_kernel[(rows * tiles,)](
                *tensors, dgate, dup, *strides, columns, tiles, ACTIVATION=activation, BLOCK=tuning.block, num_warps=tuning.warps
            )
    return dgate, dup


def _backward_fake(dout: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.activation = inputs[2]


def _gradients(backward: Any, ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    return *backward(dout, *ctx.saved_tensors, ctx.activation), None


_gated = differentiable("gated", (_forward_launch, _forward_fake), (_backward_launch, _backward_fake), _save, _gradients)
