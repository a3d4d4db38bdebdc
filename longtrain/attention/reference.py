"""Dense attention, the truth that every kernel is tested against: plain matrices, gradients written by hand (docs/attention.md)."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from longtrain.attention.dropout import keep_mask
from longtrain.attention.mask import visible
from longtrain.attention.merge import accumulator_dtype, add_, cast_like, merge_, row_dot
from longtrain.attention.protocol import Block, Grads, Needs, Partial
from longtrain.attention.spec import AttentionSpec

Method = TypeVar("Method", bound=Callable[..., Any])


def _without_autocast(method: Method) -> Method:
    """Autocast would compute products of fp32 matrices in bf16."""

    @wraps(method)
    def run(kernel: ReferenceKernel, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not torch.amp.is_autocast_available(x.device.type):
            return method(kernel, x, *args, **kwargs)
        with torch.autocast(x.device.type, enabled=False):
            return method(kernel, x, *args, **kwargs)

    return cast(Method, run)


class ReferenceKernel:
    """Holds whole [B, H, Tq, Tk] matrices in fp32 (fp64 for fp64 inputs). Does everything, on any device, in O(Tq * Tk) memory."""

    name = "reference"

    def refuses(self, needs: Needs) -> list[str]:
        return []

    @_without_autocast
    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, block: Block, spec: AttentionSpec, *, into: Partial | None = None
    ) -> Partial:
        scores, _ = _scores(q, k, block, spec)
        lse = torch.logsumexp(scores, -1)
        p = _probabilities(scores, lse)
        keep = _keep(q, k, block, spec)
        if keep is not None:
            p = p * keep
        out = _ungroup(_group_rows(p, k.shape[2]) @ _keys(v, p.dtype), q.shape[2])
        part = Partial(out, lse)
        return Partial(out.to(q.dtype), lse) if into is None else merge_(into, part)

    def delta(self, dout: Tensor, out: Tensor, dlse: Tensor) -> Tensor:
        return row_dot(dout, out) - dlse

    @_without_autocast
    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lse: Tensor,
        delta: Tensor,
        block: Block,
        spec: AttentionSpec,
        *,
        into: Grads | None = None,
        bias_grad: bool = True,
    ) -> Grads:
        heads, kv_heads = q.shape[2], k.shape[2]
        scores, slope = _scores(q, k, block, spec)
        p = _probabilities(scores, lse)
        q_, k_, v_, dout_ = _group(q, kv_heads, p.dtype), _keys(k, p.dtype), _keys(v, p.dtype), _group(dout, kv_heads, p.dtype)
        dp = (dout_ @ v_.mT).view_as(p)
        keep = _keep(q, k, block, spec)
        dropped = p if keep is None else p * keep
        if keep is not None:
            dp = dp * keep
        dbias = ds = p * (dp - delta[..., None])
        if slope is not None:
            ds = ds * slope
        ds = _group_rows(ds * spec.scale_for(q.shape[-1]), kv_heads)
        grads = Grads(
            _ungroup(ds @ k_, heads),
            (ds.mT @ q_).transpose(1, 2),
            (_group_rows(dropped, kv_heads).mT @ dout_).transpose(1, 2),
            None if spec.bias is None or not bias_grad else dbias.sum_to_size(_four(spec.bias).shape).view_as(spec.bias),
        )
        if into is not None:
            return add_(into, grads)
        return cast_like(grads, q, k, v, spec.bias)


def _scores(q: Tensor, k: Tensor, block: Block, spec: AttentionSpec) -> tuple[Tensor, Tensor | None]:
    """Masked scores [B, H, Tq, Tk], and the derivative of the soft-cap where there is one."""
    (batch, queries, heads, dim), keys = q.shape, k.shape[1]
    dtype = accumulator_dtype(q.dtype)
    scores = (_group(q, k.shape[2], dtype) @ _keys(k, dtype).mT).view(batch, heads, queries, keys)
    scores = scores * spec.scale_for(dim)
    slope = None
    if spec.softcap is not None:
        squashed = torch.tanh(scores / spec.softcap)
        scores, slope = spec.softcap * squashed, 1 - squashed**2
    if spec.alibi_slopes is not None:
        distance = block.q_positions(queries, q.device)[:, None] - block.k_positions(keys, q.device)[None, :]
        scores = scores - spec.alibi_slopes.to(dtype)[:, None, None] * distance.abs()
    if spec.bias is not None:
        scores = scores + _four(spec.bias).to(dtype)
    mask = visible(block.band, queries, keys, block.q_segments, block.k_segments, q.device)
    return scores.masked_fill(~mask[:, None], -torch.inf), slope


def _probabilities(scores: Tensor, lse: Tensor) -> Tensor:
    """exp(scores - lse), 0 in rows that see nothing (where both are -inf)."""
    return torch.exp(scores - lse.to(scores.dtype).clamp(min=torch.finfo(scores.dtype).min)[..., None])


def _keep(q: Tensor, k: Tensor, block: Block, spec: AttentionSpec) -> Tensor | None:
    """What dropout multiplies probabilities with: 0 or 1 / (1 - dropout), [B, H, Tq, Tk]."""
    if not spec.dropout or spec.dropout_seed is None:
        return None
    rows, columns = block.q_positions(q.shape[1], q.device), block.k_positions(k.shape[1], q.device)
    keep = keep_mask(spec.dropout_seed, q.shape[2], rows, columns, spec.dropout)
    return keep.to(accumulator_dtype(q.dtype)) / (1 - spec.dropout)


def _four(bias: Tensor) -> Tensor:
    return bias[(None,) * (4 - bias.ndim)]


def _group(x: Tensor, kv_heads: int, dtype: torch.dtype) -> Tensor:
    """[B, T, H, D] as [B, Hkv, (H / Hkv) * T, D]: the query heads of a key head become rows, so that keys are never repeated."""
    return _group_rows(x.transpose(1, 2).to(dtype), kv_heads)


def _group_rows(x: Tensor, kv_heads: int) -> Tensor:
    """[B, H, Tq, X] as [B, Hkv, (H / Hkv) * Tq, X]."""
    batch, heads, rows, columns = x.shape
    return x.reshape(batch, kv_heads, heads // kv_heads * rows, columns)


def _ungroup(x: Tensor, heads: int) -> Tensor:
    """The inverse of `_group`: [B, T, H, D]."""
    batch, kv_heads, rows, columns = x.shape
    return x.reshape(batch, heads, rows * kv_heads // heads, columns).transpose(1, 2)


def _keys(x: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, T, Hkv, D] as [B, Hkv, T, D]."""
    return x.transpose(1, 2).to(dtype)
