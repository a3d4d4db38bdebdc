"""Differentiable operators over kernels: plain autograd functions in eager mode, opaque custom operators under torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Launch = Callable[..., Any]
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
"""What the kernels of layers take; they compute in fp32."""


def operator(name: str, launch: Launch, fake: Launch) -> Launch:
    """`launch` as the custom operator longtrain::name. Its signature is the schema; results are new tensors, fake(...) in shape."""
    made = torch.library.custom_op(f"longtrain::{name}", launch, mutates_args=())
    made.register_fake(fake)
    return made


def differentiable(
    name: str,
    forward: tuple[Launch, Launch],
    backward: tuple[Launch, Launch],
    save: Callable[[Any, tuple[Any, ...], Any], None],
    gradients: Callable[..., tuple[Tensor | None, ...]],
) -> Launch:
    """A function of positional arguments.

    A custom operator costs tens of microseconds of the host a call, an autograd function a few, where a kernel takes about ninety
    of the device: so eager mode launches directly, and only what torch.compile traces goes through an operator.

    forward, backward: (launch, fake). save(ctx, inputs, output): keeps what the backward needs. gradients(backward, ctx, *grads):
    one result an input, from what was saved and a way to call the backward; a gradient that nobody computed is None.
    """
    forward_launch, backward_launch = forward[0], backward[0]
    backward_operator = operator(f"{name}_backward", *backward)
    forward_operator: Any = operator(name, *forward)
    forward_operator.register_autograd(
        lambda ctx, *grads: gradients(backward_operator, ctx, *grads),
        setup_context=lambda ctx, inputs, output: save(ctx, inputs, output),
    )

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            output = forward_launch(*inputs)
            save(ctx, inputs, output)
            return output

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            return gradients(backward_launch, ctx, *grads)

    def call(*inputs: Any) -> Any:
        return forward_operator(*inputs) if torch.compiler.is_compiling() else Eager.apply(*inputs)

    return call


def on_device(x: Tensor) -> AbstractContextManager[Any]:
    """Makes x's device the current one, on which Triton launches."""
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(x.device)


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; elsewhere one, so that the interpreter runs few programs."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def padded(width: int) -> int:
    """The next power of two."""
    return 1 << max(width - 1, 0).bit_length()


def rows_of(x: Tensor, tile: int = 1) -> tuple[Tensor, int]:
    """x [..., C] as rows of C with a contiguous last dimension, and a row's stride; no copy where strides allow. Offsets in a tile
    of so many rows fit 32 bits."""
    if x.is_contiguous():
        return x, x.shape[-1]
    rows = x.reshape(-1, x.shape[-1])
    if rows.stride(1) != 1 or rows.stride(0) * tile >= 2**31:
        rows = rows.contiguous()
    return rows, rows.stride(0)
