"""Ring attention: exact attention over a sequence that is dealt to many ranks (Liu et al. 2023, "Ring Attention").

There is one loop for every layout, window and packing: the schedule (attention/schedule.py) says which blocks a rank computes
against which shard, the loop fetches the next shard while it computes the current one. In step s a rank receives the shard of
rank - s straight from its owner, and in the backward returns that shard's gradients there: the bytes are those of passing shards
from neighbour to neighbour, but a shard that nobody needs is not sent at all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longtrain.attention.keep import Keep
from longtrain.attention.layout import SequenceLayout
from longtrain.attention.mask import AttentionMask
from longtrain.attention.merge import add_sinks_, cast_like, empty_partial, sinks_gradient, zero_grads
from longtrain.attention.protocol import PLAIN, AttentionKernel, Block, Grads, Partial, SoftmaxAttend, check_inputs, check_whole
from longtrain.attention.schedule import BlockPlan, ring_plan
from longtrain.attention.spec import AttentionSpec
from longtrain.batch import PADDING
from longtrain.errors import KernelError
from longtrain.kernels.local import SLOT
from longtrain.parallel.exchange import Exchange, Parcel, Transfer


@dataclass(frozen=True)
class RingAttend(SoftmaxAttend):
    """The Attend of one rank of a ring: q, k, v are this rank's shards, the mask describes the whole sequence.

    All ranks call it with shards of equal shape, cut by `layout.shard` from a sequence of padded length; a mask with segments may
    be shorter than that, the rest is padding. A mask without segments says that no position is padding.
    """

    kernel: AttentionKernel
    exchange: Exchange
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
        """(out, lse) of this rank's queries; both carry gradients. Raises KernelError for a bias tensor.

        Sinks are the same on every rank; each returns the gradient of its own rows, and the gradients are summed over the ring
        where those of all parameters are, by ZeRO.
        """
        if spec.bias is not None:
            raise KernelError(
                "ring attention takes no bias tensor: its rows and columns live on different ranks; use ALiBi or cp 1"
            )
        check_inputs(q, k, v, spec)
        check_whole(mask, q.device)
        ring = Ring.of(self, q.shape[1], k.shape[1], mask, spec.without_sinks)
        return _RingAttention.apply(q, k, v, spec.sinks, ring, keep)  # type: ignore[return-value]


@dataclass(frozen=True, eq=False)
class Ring:
    """One call's schedule and the documents of every shard."""

    kernel: AttentionKernel
    exchange: Exchange
    plan: tuple[tuple[tuple[BlockPlan, ...], ...], ...]
    spec: AttentionSpec
    q_segments: Tensor | None
    k_segments: tuple[Tensor, ...] | None
    runs: bool

    @staticmethod
    def of(attend: RingAttend, queries: int, keys: int, mask: AttentionMask, spec: AttentionSpec) -> Ring:
        """queries, keys: positions of one shard. Raises ValueError where the mask describes more than all shards hold."""
        size, rank, layout = attend.exchange.size, attend.exchange.rank, attend.layout
        q_length, k_length = queries * size, keys * size
        plan = ring_plan(layout, q_length, k_length, size, mask.band, mask.boundaries, spec.positional)
        q_segments, k_segments = None, None
        if mask.q_segments is not None and mask.k_segments is not None:
            q_segments = layout.shard(padded_segments(mask.q_segments, q_length), size, rank)
            padded = padded_segments(mask.k_segments, k_length)
            k_segments = tuple(layout.shard(padded, size, source) for source in range(size))
        return Ring(attend.kernel, attend.exchange, plan, spec, q_segments, k_segments, mask.boundaries is not None)

    def source(self, step: int) -> int:
        """Whose shard this rank computes against in `step`."""
        return (self.exchange.rank - step) % self.exchange.size

    def target(self, step: int) -> int:
        """Who computes against this rank's shard in `step`."""
        return (self.exchange.rank + step) % self.exchange.size

    def blocks(self, step: int) -> tuple[BlockPlan, ...]:
        return self.plan[self.exchange.rank][self.source(step)]

    def wanted(self, step: int) -> bool:
        """Whether this rank's shard is needed by the target of `step`."""
        return bool(self.plan[self.target(step)][self.exchange.rank])

    def block(self, plan: BlockPlan, source: int) -> Block:
        return Block(
            plan.band,
            None if self.q_segments is None else self.q_segments[:, plan.q0 : plan.q1],
            None if self.k_segments is None else self.k_segments[source][:, plan.k0 : plan.k1],
            plan.q_start,
            plan.k_start,
            plan.stride,
            self.runs,
        )

    def visit(self, k: Tensor, v: Tensor) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
        """(step, (keys, values)), the next shard under way while the caller computes; () in steps without blocks."""
        current = shard = (k.contiguous(), v.contiguous())
        for step in range(self.exchange.size):
            coming = tuple(torch.empty_like(t) for t in shard) if step + 1 < self.exchange.size and self.blocks(step + 1) else ()
            sends: list[Parcel] = []
            if step + 1 < self.exchange.size and self.wanted(step + 1):
                sends = [(self.target(step + 1), t) for t in shard]
            transfer = self.exchange.start(sends, [(self.source(step + 1), t) for t in coming])
            yield step, current
            transfer.wait()
            current = coming


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, ring: Ring, keep: Keep | None
    ) -> tuple[Tensor, Tensor]:
        kept = keep.recall(SLOT) if keep is not None else None
        out, lse = ring_forward(ring, q, k, v, sinks) if kept is None else kept
        if keep is not None and kept is None:
            keep.store(SLOT, out, lse)
        ctx.save_for_backward(q, k, v, sinks, out, lse)
        ctx.ring = ring
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sinks, out, lse = ctx.saved_tensors
        delta = ctx.ring.kernel.delta(dout, out, dlse)
        dsinks = None if sinks is None else sinks_gradient(sinks, lse, delta)
        grads = ring_backward(ctx.ring, dout, q, k, v, lse, delta)
        return grads.dq, grads.dk, grads.dv, dsinks, None, None


def ring_forward(ring: Ring, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Partial:
    """This rank's rows, over all shards; sinks [H] applied once, at the end."""
    whole = empty_partial(q, v.shape[-1])
    for step, visiting in ring.visit(k, v):
        for plan in ring.blocks(step):
            rows, columns = slice(plan.q0, plan.q1), slice(plan.k0, plan.k1)
            keys, values = visiting
            block, into = ring.block(plan, ring.source(step)), Partial(whole.out[:, rows], whole.lse[:, :, rows])
            ring.kernel.forward(q[:, rows], keys[:, columns], values[:, columns], block, ring.spec, into=into)
    if sinks is not None:
        add_sinks_(whole, sinks)
    return Partial(whole.out.to(q.dtype), whole.lse)


def ring_backward(ring: Ring, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor) -> Grads:
    """Gradients of this rank's shards; lse and delta are those of whole rows."""
    mine = zero_grads(q, k, v)
    returns = _Returns(ring, mine)
    for step, visiting in ring.visit(k, v):
        blocks = ring.blocks(step)
        dk, dv = (mine.dk, mine.dv) if step == 0 or not blocks else (torch.zeros_like(mine.dk), torch.zeros_like(mine.dv))
        for plan in blocks:
            rows, columns = slice(plan.q0, plan.q1), slice(plan.k0, plan.k1)
            keys, values = visiting
            ring.kernel.backward(
                dout[:, rows],
                q[:, rows],
                keys[:, columns],
                values[:, columns],
                lse[:, :, rows],
                delta[:, :, rows],
                ring.block(plan, ring.source(step)),
                ring.spec,
                into=Grads(mine.dq[:, rows], dk[:, columns], dv[:, columns]),
            )
        if step > 0:
            returns.send(step, (dk, dv) if blocks else ())
    returns.settle()
    return cast_like(mine, q, k, v)


class _Returns:
    """Gradients of visiting shards on their way home, one step behind the computation."""

    def __init__(self, ring: Ring, mine: Grads) -> None:
        self._ring, self._mine = ring, mine
        self._pending: tuple[Transfer, tuple[Tensor, ...]] | None = None

    def send(self, step: int, gradients: tuple[Tensor, ...]) -> None:
        """Sends the source of `step` its gradients, expects those of this rank's shard from the target."""
        self.settle()
        ring = self._ring
        coming = (torch.empty_like(self._mine.dk), torch.empty_like(self._mine.dv)) if ring.wanted(step) else ()
        sends = [(ring.source(step), t) for t in gradients]
        self._pending = (ring.exchange.start(sends, [(ring.target(step), t) for t in coming]), coming)

    def settle(self) -> None:
        """Adds what has arrived; always in the order of the steps, so that sums are the same every time."""
        if self._pending is None:
            return
        transfer, arrived = self._pending
        transfer.wait()
        for accumulator, gradient in zip((self._mine.dk, self._mine.dv), arrived, strict=False):
            accumulator.add_(gradient)
        self._pending = None


def padded_segments(segments: Tensor, length: int) -> Tensor:
    """[B, length], more padding at the end. Raises ValueError where there are more segments than that."""
    if segments.shape[1] > length:
        raise ValueError(f"the mask describes {segments.shape[1]} positions, the shards of all ranks hold {length}")
    return torch.nn.functional.pad(segments, (0, length - segments.shape[1]), value=PADDING)
