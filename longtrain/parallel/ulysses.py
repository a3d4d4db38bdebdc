"""Ulysses attention: every rank computes some heads over many positions (Jacobs et al. 2023, "DeepSpeed Ulysses"), alone or in a
ring (Fang and Zhao 2024, "USP").

Outside of attention a rank holds all heads of some positions. Before attention the ranks of a group exchange, each with each, so
that rank j of u has the j-th of u equal runs of heads for all positions of the group; after it they exchange back. Kernels see
whole heads, so any mask that a kernel can do works unchanged. With r groups, the ranks of the same place in each form a ring.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longtrain.attention.keep import Keep
from longtrain.attention.layout import SequenceLayout
from longtrain.attention.mask import AttentionMask
from longtrain.attention.merge import accumulator_dtype, sinks_gradient
from longtrain.attention.protocol import (
    PLAIN,
    Attend,
    AttentionKernel,
    Block,
    Grads,
    Partial,
    SoftmaxAttend,
    check_inputs,
    check_whole,
)
from longtrain.attention.spec import AttentionSpec
from longtrain.errors import KernelError
from longtrain.kernels import ops
from longtrain.kernels.local import SLOT, LocalAttend
from longtrain.parallel.exchange import Exchange, Parcel, Subgroup
from longtrain.parallel.ring import Ring, RingAttend, padded_segments, ring_backward, ring_forward


@dataclass(frozen=True)
class UlyssesLayout:
    """How a sequence is dealt to ranks that form a ring of groups of `size`: rank `size * i + j` holds the j-th of `size` equal
    runs of what rank i of the ring would hold under `ring`, in the order of its local tensors. So a group's shards, one behind
    the other, are one shard of the ring."""

    ring: SequenceLayout
    size: int

    def __str__(self) -> str:
        return f"{self.ring}, each shard over {self.size}"

    def padded_length(self, length: int, ranks: int) -> int:
        """The smallest length >= `length` that splits evenly over `ranks`, and over the ring."""
        unit = math.lcm(self.ring.padded_length(1, ranks // self.size), ranks)
        return -(-length // unit) * unit

    def shard(self, x: Tensor, ranks: int, rank: int, dim: int = 1) -> Tensor:
        """The part of `x` that `rank` holds. `x` has a padded length along `dim`."""
        of_ring, place = divmod(rank, self.size)
        return self.ring.shard(x, ranks // self.size, of_ring, dim).chunk(self.size, dim)[place]

    def unshard(self, shards: list[Tensor], length: int | None = None, dim: int = 1) -> Tensor:
        """The inverse of `shard` over all ranks, cut back to `length` positions."""
        groups = [torch.cat(shards[i : i + self.size], dim) for i in range(0, len(shards), self.size)]
        return self.ring.unshard(groups, length, dim)


@dataclass(frozen=True)
class UlyssesAttend(SoftmaxAttend):
    """The Attend of one rank of a ring of groups of `size`: q, k, v are this rank's shards as `UlyssesLayout(layout, size)` deals
    them, the mask describes the whole sequence.

    exchange: over all ranks that share a sequence, the ranks of a group being neighbours. All of them call it with shards of equal
    shape; a mask with segments may be shorter than all shards together, the rest is padding.
    """

    kernel: AttentionKernel
    exchange: Exchange
    size: int
    layout: SequenceLayout = SequenceLayout.ZIGZAG

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
        """(out, lse) of this rank's queries; both carry gradients. Sinks as in `RingAttend`.

        Raises KernelError for a bias tensor, for dropout, and where heads do not split: see `refuses_heads`.
        """
        reason = refuses_heads(q.shape[2], k.shape[2], self.size)
        if reason is not None:
            raise KernelError(f"Ulysses attention: {reason}")
        if spec.bias is not None:
            raise KernelError("Ulysses attention takes no bias tensor: its rows live on different ranks; use ALiBi or cp 1")
        if spec.dropout:
            raise KernelError(
                "Ulysses attention takes no dropout: it depends on the number of a head, and a rank knows only how many heads it "
                "has; use a ring (ulysses 1)"
            )
        check_inputs(q, k, v, spec)
        check_whole(mask, q.device)
        call = _Call.of(self, q, k, mask, spec)
        return _UlyssesAttention.apply(q, k, v, spec.sinks, call, keep)  # type: ignore[return-value]


def refuses_heads(heads: int, kv_heads: int, size: int) -> str | None:
    """Why a group of `size` ranks cannot share these heads, in words; None where it can: query heads split evenly, and key heads do
    too, or each goes to equally many ranks."""
    if heads % size:
        return f"{heads} query heads do not split over {size} ranks"
    if kv_heads % size and size % kv_heads:
        return f"{kv_heads} key-value heads neither split over {size} ranks nor does each go to equally many of them"
    return None


def choose_attend(kernel: AttentionKernel, exchange: Exchange, layout: SequenceLayout, ulysses: int) -> Attend:
    """The Attend of a rank. exchange: over all ranks that share a sequence; ulysses: how many of them share heads, a divisor."""
    if exchange.size == 1:
        return LocalAttend(kernel)
    if ulysses == 1:
        return RingAttend(kernel, exchange, layout)
    return UlyssesAttend(kernel, exchange, ulysses, layout)


class _Inner(Protocol):
    """Attention of some heads over a group's positions."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Partial: ...

    def backward(self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor) -> Grads: ...


@dataclass(frozen=True, eq=False)
class _Alone:
    """One group holds the whole sequence."""

    kernel: AttentionKernel
    block: Block
    spec: AttentionSpec

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Partial:
        return ops.run_forward(self.kernel, q, k, v, self.block, self.spec)

    def backward(self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor) -> Grads:
        return self.kernel.backward(dout, q, k, v, lse, delta, self.block, self.spec.without_sinks)


@dataclass(frozen=True, eq=False)
class _InRing:
    """The sequence goes over a ring of groups."""

    ring: Ring
    sinks: Tensor | None

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Partial:
        return ring_forward(self.ring, q, k, v, self.sinks)

    def backward(self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor) -> Grads:
        return ring_backward(self.ring, dout, q, k, v, lse, delta)


@dataclass(frozen=True, eq=False)
class _Call:
    """One call: its group, and what is computed once heads are exchanged."""

    kernel: AttentionKernel
    group: Exchange
    inner: _Inner

    @staticmethod
    def of(attend: UlyssesAttend, q: Tensor, k: Tensor, mask: AttentionMask, spec: AttentionSpec) -> _Call:
        size, whole = attend.size, attend.exchange
        of_ring, place = divmod(whole.rank, size)
        group = Subgroup(whole, tuple(range(of_ring * size, (of_ring + 1) * size)))
        heads = _heads(q.shape[2], size, place)
        spec = replace(
            spec,
            alibi_slopes=None if spec.alibi_slopes is None else spec.alibi_slopes[heads],
            sinks=None if spec.sinks is None else spec.sinks.detach()[heads],
        )
        if whole.size == size:
            return _Call(
                attend.kernel, group, _Alone(attend.kernel, _whole_block(mask, q.shape[1] * size, k.shape[1] * size), spec)
            )
        ring = RingAttend(attend.kernel, Subgroup(whole, tuple(range(place, whole.size, size))), attend.layout)
        lengths = q.shape[1] * size, k.shape[1] * size
        return _Call(attend.kernel, group, _InRing(Ring.of(ring, *lengths, mask, spec.without_sinks), spec.sinks))

    def spread(self, *xs: Tensor) -> list[Tensor]:
        """[B, T, H, D] of this rank's positions as [B, u T, h, D] of its heads: all positions of the group, in the order of its
        ranks. Fewer heads than ranks go to several ranks each."""
        u, rank = self.group.size, self.group.rank
        parts = {peer: [x[:, :, _heads(x.shape[2], u, peer)].contiguous() for x in xs] for peer in range(u)}
        arriving = self._exchange(parts)
        return [torch.cat([arriving[peer][i] for peer in range(u)], 1) if u > 1 else parts[rank][i] for i in range(len(xs))]

    def collect(self, *given: tuple[Tensor, int]) -> list[Tensor]:
        """The inverse of `spread`, of (tensor, how many heads there are); what belongs to one head on several ranks is added up."""
        u = self.group.size
        parts = {peer: [x.chunk(u, 1)[peer].contiguous() for x, _ in given] for peer in range(u)}
        arriving = self._exchange(parts)
        return [_joined([arriving[peer][i] for peer in range(u)], heads) for i, (_, heads) in enumerate(given)]

    def _exchange(self, parts: dict[int, list[Tensor]]) -> dict[int, list[Tensor]]:
        """parts[peer] to every peer of the group; returns what they sent here. All parts of a place have one shape."""
        rank = self.group.rank
        peers = [peer for peer in parts if peer != rank]
        arriving = {peer: [torch.empty_like(part) for part in parts[rank]] for peer in peers}
        sends: list[Parcel] = [(peer, part) for peer in peers for part in parts[peer]]
        self.group.start(sends, [(peer, part) for peer in peers for part in arriving[peer]]).wait()
        return arriving | {rank: parts[rank]}


def _heads(heads: int, size: int, place: int) -> slice:
    """The heads of one rank of a group: an equal run, or one that several ranks have."""
    first = place * heads // size
    return slice(first, first + max(1, heads // size))


def _joined(parts: list[Tensor], heads: int) -> Tensor:
    """Heads of all ranks side by side: [B, T, heads, D]."""
    whole = torch.cat(parts, 2)
    copies = whole.shape[2] // heads
    if copies == 1:
        return whole
    return whole.unflatten(2, (heads, copies)).sum(3, dtype=accumulator_dtype(whole.dtype)).to(whole.dtype)


def _whole_block(mask: AttentionMask, queries: int, keys: int) -> Block:
    if mask.q_segments is None or mask.k_segments is None:
        return Block(mask.band)
    q_segments = padded_segments(mask.q_segments, queries)
    same = mask.k_segments is mask.q_segments and queries == keys
    k_segments = q_segments if same else padded_segments(mask.k_segments, keys)
    return Block(mask.band, q_segments, k_segments, runs=mask.boundaries is not None)


class _UlyssesAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, call: _Call, keep: Keep | None
    ) -> tuple[Tensor, Tensor]:
        kept = keep.recall(SLOT) if keep is not None else None
        given = q, k, v
        if kept is None:
            mine = call.spread(q, k, v)
            part = call.inner.forward(*mine)
            rows = part.lse.transpose(1, 2)[..., None]
            out, rows = call.collect((part.out, q.shape[2]), (rows, q.shape[2]))
            kept = out, rows[..., 0].transpose(1, 2).contiguous()
            if keep is None:
                given = tuple(mine)
            else:
                keep.store(SLOT, *kept)
        out, lse = kept
        ctx.save_for_backward(*given, sinks, out, lse)
        ctx.call, ctx.spread, ctx.heads = call, keep is None, (q.shape[2], k.shape[2])
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sinks, out, lse = ctx.saved_tensors
        call, (heads, kv_heads) = ctx.call, ctx.heads
        delta = call.kernel.delta(dout, out, dlse)
        dsinks = None if sinks is None else sinks_gradient(sinks, lse, delta)
        rows = torch.stack([lse, delta], -1).transpose(1, 2)
        dout, rows, *more = call.spread(dout, rows, *(() if ctx.spread else (q, k, v)))
        lse, delta = rows.permute(3, 0, 2, 1).contiguous()
        grads = call.inner.backward(dout, *(more or (q, k, v)), lse, delta)
        return *call.collect((grads.dq, heads), (grads.dk, kv_heads), (grads.dv, kv_heads)), dsinks, None, None
