"""Fused layers against plain ones, outputs and gradients; for the interpreter, the GPU and the benchmark's gate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from longtrain.kernels import gated, norms, plain, rotary
from tests.parity import assert_close_to_truth

Layer = Callable[..., Any]
NORMS = ("rms_norm", "add_rms_norm", "layer_norm", "add_layer_norm")
EPS = 1e-5


def outputs_and_gradients(
    layer: Layer, inputs: Sequence[Tensor], fixed: Sequence[Any], cotangents: Sequence[Tensor]
) -> dict[str, Tensor]:
    """layer(*inputs, *fixed): its outputs, and the gradients of the inputs under these cotangents."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = layer(*leaves, *fixed)
    outs = out if isinstance(out, tuple) else (out,)
    gradients = torch.autograd.grad(outs, leaves, [g.to(y.dtype) for g, y in zip(cotangents, outs, strict=True)])
    found = {f"out {i}": y.detach() for i, y in enumerate(outs)}
    return found | {f"gradient {i}": g for i, g in enumerate(gradients)}


def check_layer(fast: Layer, truth: Layer, inputs: Sequence[Tensor], fixed: Sequence[Any], cotangents: Sequence[Tensor]) -> None:
    """The self-calibrating rule: truth in fp64, and in the precision of the inputs."""
    wide = [x.double() for x in (*inputs, *cotangents)]
    exact = outputs_and_gradients(truth, wide[: len(inputs)], fixed, wide[len(inputs) :])
    low = outputs_and_gradients(truth, inputs, fixed, cotangents)
    found = outputs_and_gradients(fast, inputs, fixed, cotangents)
    # Triton's interpreter cuts fp32 down to bf16 where GPUs round: twice the error and a bias, for which the noise must stand
    cut = inputs[0].dtype == torch.bfloat16 and not inputs[0].is_cuda
    for name, value in found.items():
        assert value.dtype == low[name].dtype, name
        noise = torch.finfo(torch.bfloat16).eps if cut else None
        assert_close_to_truth(value, exact[name], low[name], name, noise=noise)


def poisoned(x: Tensor, around: int = 8) -> Tensor:
    """The same values with NaN before, between and behind the rows (the last dimension)."""
    rows = x.reshape(-1, x.shape[-1])
    buffer = torch.full((rows.shape[0] + 2, rows.shape[1] + 2 * around), torch.nan, dtype=x.dtype, device=x.device)
    view = buffer[1:-1, around : around + rows.shape[1]]
    view.copy_(rows)
    return view.unflatten(0, x.shape[:-1]) if x.dim() > 1 else view[0]


def check_norm(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu", seed: int = 0, poison: bool = True
) -> None:
    draw = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=draw, device=device).to(dtype)

    added, centred = name.startswith("add"), name.endswith("layer_norm")
    weights = [normal(shape[-1]) for _ in range(1 + centred)]
    around = [normal(*shape) + (0.5 if centred else 0) for _ in range(2 * (1 + added))]
    if poison:
        around = [poisoned(x) for x in around]
    inputs, cotangents = around[: 1 + added], around[1 + added :]
    check_layer(getattr(norms, name), getattr(plain, name), [*inputs, *weights], (EPS,), cotangents)


def tables(batch: int, length: int, turned: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """cos and sin of positions that differ between rows of the batch."""
    positions = torch.arange(batch * length, device=device).view(batch, length) * 7 % 1009
    frequencies = 10000.0 ** -(torch.arange(0, turned, 2, device=device) / max(turned, 1))
    angles = positions[..., None, None] * frequencies
    return angles.cos(), angles.sin()


def check_rotary(
    batch: int, length: int, heads: int, kv_heads: int, dim: int, turned: int, dtype: torch.dtype, device: str = "cpu",
    poison: bool = True,
) -> None:  # fmt: skip
    draw = torch.Generator(device).manual_seed(length)
    # queries and keys as slices of one projection, and gradients of another layout
    joint = torch.randn(batch, length, (heads + kv_heads) * dim, generator=draw, device=device).to(dtype)
    if poison:
        joint = poisoned(joint)
    q, k = joint[..., : heads * dim].unflatten(-1, (heads, dim)), joint[..., heads * dim :].unflatten(-1, (kv_heads, dim))
    cotangents = [torch.randn(x.transpose(1, 2).shape, generator=draw, device=device).to(dtype).transpose(1, 2) for x in (q, k)]
    check_layer(rotary.rotary, plain.rotary, (q, k), tables(batch, length, turned, device), cotangents)


def check_gated(shape: tuple[int, ...], activation: str, dtype: torch.dtype, device: str = "cpu", joint: bool = False) -> None:
    draw = torch.Generator(device).manual_seed(shape[-1])
    both = (4 * torch.randn(*shape[:-1], 2 * shape[-1], generator=draw, device=device)).to(dtype)
    gate, up = poisoned(both).chunk(2, -1) if joint else (x.contiguous() for x in both.chunk(2, -1))
    dout = torch.randn(shape, generator=draw, device=device).to(dtype)
    check_layer(gated.gated, plain.gated, (gate, up), (activation,), (poisoned(dout) if joint else dout,))
