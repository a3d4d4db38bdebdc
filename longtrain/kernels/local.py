"""Attention of one process over whole sequences, as an autograd function over the kernel primitive."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longtrain.attention.keep import Keep
from longtrain.attention.mask import AttentionMask
from longtrain.attention.merge import row_dot
from longtrain.attention.protocol import PLAIN, AttentionKernel, Block
from longtrain.attention.spec import AttentionSpec

SLOT = "attention"
"""Where a Keep holds (out, lse) of a recomputed block."""


@dataclass(frozen=True)
class LocalAttend:
    """The Attend of one device: queries and keys are all here."""

    kernel: AttentionKernel

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: AttentionMask,
        spec: AttentionSpec = PLAIN,
        *,
        keep: Keep | None = None,
    ) -> Tensor:
        return self.with_lse(q, k, v, mask, spec, keep=keep)[0]

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
        return _LocalAttention.apply(q, k, v, spec.bias, self.kernel, Block.of(mask), spec, keep)  # type: ignore[return-value]


class _LocalAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        kernel: AttentionKernel,
        block: Block,
        spec: AttentionSpec,
        keep: Keep | None,
    ) -> tuple[Tensor, Tensor]:
        kept = keep.recall(SLOT) if keep is not None else None
        out, lse = kernel.forward(q, k, v, block, spec) if kept is None else kept
        if keep is not None and kept is None:
            keep.store(SLOT, out, lse)
        ctx.save_for_backward(q, k, v, bias, out, lse)
        ctx.kernel, ctx.block, ctx.spec = kernel, block, replace(spec, bias=None)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bias, out, lse = ctx.saved_tensors
        delta = row_dot(dout, out) - dlse  # a gradient of lse enters as delta - dlse
        grads = ctx.kernel.backward(dout, q, k, v, lse, delta, ctx.block, replace(ctx.spec, bias=bias))
        return grads.dq, grads.dk, grads.dv, grads.dbias, None, None, None, None
