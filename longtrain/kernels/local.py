"""Attention of one process over whole sequences, as an autograd function over the kernel primitive."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longtrain.attention.keep import Keep
from longtrain.attention.mask import AttentionMask
from longtrain.attention.protocol import PLAIN, Block, SoftmaxAttend
from longtrain.attention.spec import AttentionSpec
from longtrain.kernels import ops

SLOT = "attention"
"""Where a Keep holds (out, lse) of a recomputed block."""


@dataclass(frozen=True)
class LocalAttend(SoftmaxAttend):
    """The Attend of one device: queries and keys are all here. In a compiled model it is one operator (`kernels.ops`)."""

    kernel: ops.Source
    handle: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "handle", ops.handle(self.kernel))

    def with_lse(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: AttentionMask,
        spec: AttentionSpec = PLAIN,
        *,
        keep: Keep | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(out, lse); both carry gradients."""
        block = Block.of(mask)
        if keep is None and torch.compiler.is_compiling():
            return ops.attention_forward(q, k, v, *ops.Flat.of(block, spec, self.handle))
        return _LocalAttention.apply(q, k, v, spec.bias, spec.sinks, self, block, spec, keep)  # type: ignore[return-value]


class _LocalAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        sinks: Tensor | None,
        attend: LocalAttend,
        block: Block,
        spec: AttentionSpec,
        keep: Keep | None,
    ) -> tuple[Tensor, Tensor]:
        kept = keep.recall(SLOT) if keep is not None else None
        if kept is not None:
            out, lse = kept
        elif ops.counts_flops():
            out, lse = ops.attention_forward(q, k, v, *ops.Flat.of(block, spec, attend.handle))
        else:
            out, lse = ops.run_forward(attend.kernel, q, k, v, block, spec)
        if keep is not None and kept is None:
            keep.store(SLOT, out, lse)
        ctx.save_for_backward(q, k, v, bias, sinks, out, lse)
        learned = bias is not None or sinks is not None
        ctx.attend, ctx.block, ctx.spec = attend, block, replace(spec, bias=None, sinks=None) if learned else spec
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bias, sinks, out, lse = ctx.saved_tensors
        learned = bias is not None or sinks is not None
        block, spec = ctx.block, replace(ctx.spec, bias=bias, sinks=sinks) if learned else ctx.spec
        given, bias_grad = (dout, dlse, q, k, v, out, lse), ctx.needs_input_grad[3]
        if ops.counts_flops():
            flat = ops.Flat.of(block, spec, ctx.attend.handle)
            grads = ops.Gradients.of(ops.attention_backward(*given, *flat, bias_grad), spec, bias_grad)
        else:
            grads = ops.run_backward(ctx.attend.kernel, *given, block, spec, bias_grad)
        return *grads, None, None, None, None
