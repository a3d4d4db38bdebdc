"""Joining attention over disjoint sets of keys."""

from __future__ import annotations

import torch
from torch import Tensor

from longtrain.attention.protocol import Grads, Partial


def empty_partial(q: Tensor, value_dim: int) -> Partial:
    """Attention over no key at all: out 0, lse -inf; fp32 (fp64 for fp64 inputs), the neutral element of `merge_`."""
    batch, queries, heads, _ = q.shape
    dtype = accumulator_dtype(q.dtype)
    out = torch.zeros(batch, queries, heads, value_dim, dtype=dtype, device=q.device)
    return Partial(out, torch.full((batch, heads, queries), -torch.inf, dtype=dtype, device=q.device))


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32, or fp64 for fp64 inputs (the truth that tests compare with)."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def merge_(into: Partial, part: Partial) -> Partial:
    """Adds `part` to `into` in place: weights exp(lse_i - lse), where a row of -inf weighs 0.

    The log-sigmoid form of this is NaN where both are -inf, which windows make common.
    """
    out, lse = into
    total = torch.logaddexp(lse, part.lse)
    floor = _finite(total)
    out.mul_(_rows(torch.exp(lse - floor))).add_(part.out * _rows(torch.exp(part.lse - floor)))
    lse.copy_(total)
    return into


def add_sinks_(part: Partial, sinks: Tensor) -> Partial:
    """Merges, in place, a key of value 0 that every row sees with the score of its head: lse' = logaddexp(lse, sink),
    out' = out * exp(lse - lse'). sinks: [H].

    A row that sees nothing, padding included, keeps out 0 and has lse = sink. Raises ValueError where there is not one sink a head.
    """
    out, lse = part
    if sinks.shape != lse.shape[1:2]:
        raise ValueError(f"{list(sinks.shape)} sinks for {lse.shape[1]} query heads: give one a head")
    total = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])
    out.mul_(_rows(torch.exp(lse - _finite(total))))
    lse.copy_(total)
    return part


def sinks_gradient(sinks: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """[H], of the dtype of `sinks`, from this call's rows: -sum(exp(sink - lse) * delta) over rows and batch.

    lse, delta = sum(dout * out) - dlse: fp32 [B, H, T], of the results after `add_sinks_`.
    """
    weight = torch.exp(sinks.to(lse.dtype)[:, None] - _finite(lse))
    return -(weight * delta).sum((0, 2)).to(sinks.dtype)


def add_(into: Grads, part: Grads) -> Grads:
    """Adds gradients to fp32 accumulators in place."""
    for accumulator, gradient in zip(into, part, strict=True):
        if accumulator is not None and gradient is not None:
            accumulator.add_(gradient)
    return into


def zero_grads(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Grads:
    """fp32 (fp64 for fp64 inputs) accumulators of zeros, to pass to a kernel's backward as `into`; contiguous, for they travel."""
    dtype = accumulator_dtype(q.dtype)
    dq, dk, dv = (torch.zeros(t.shape, dtype=dtype, device=t.device) for t in (q, k, v))
    return Grads(dq, dk, dv, None if bias is None else torch.zeros(bias.shape, dtype=dtype, device=bias.device))


def cast_like(grads: Grads, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Grads:
    """Accumulated gradients in the dtypes of the tensors they belong to."""
    dbias = None if bias is None or grads.dbias is None else grads.dbias.to(bias.dtype)
    return Grads(grads.dq.to(q.dtype), grads.dk.to(k.dtype), grads.dv.to(v.dtype), dbias)


def row_dot(dout: Tensor, out: Tensor) -> Tensor:
    """delta = sum(dout * out) over the head dimension: [B, T, H, D] twice to fp32 [B, H, T]."""
    dtype = accumulator_dtype(out.dtype)
    return (dout.to(dtype) * out.to(dtype)).sum(-1).transpose(1, 2).contiguous()


def _finite(lse: Tensor) -> Tensor:
    """lse to subtract: -inf - -inf would be NaN."""
    return lse.clamp(min=torch.finfo(lse.dtype).min)


def _rows(x: Tensor) -> Tensor:
    """[B, H, T] as [B, T, H, 1]."""
    return x.transpose(1, 2).unsqueeze(-1)
