"""Attention kernels that come with torch, behind the primitive: cuDNN's, and FlashAttention-2 (Dao 2023).

Their operators return lse and take it in the backward, which is what a ring needs. But they make delta themselves, as
sum(dout * out) of an `out` that they are given, where the primitive is given delta. So they get the smallest `out` that has this
delta, its projection onto dout: out' = dout * delta / |dout|^2. It is never longer than the real one, and all terms of
sum(dout * out') have one sign, so rounding out' costs less than rounding out did. Sinks and gradients of lse are in delta.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longtrain.attention.mask import Band
from longtrain.attention.merge import accumulator_dtype, add_, cast_like, empty_partial, merge_, row_dot, zero_grads
from longtrain.attention.protocol import Block, Grads, Needs, Partial, check_dtypes
from longtrain.attention.spec import AttentionSpec
from longtrain.batch import PADDING
from longtrain.errors import KernelError

DTYPES = (torch.float16, torch.bfloat16)
MODIFIERS = {"softcap": "has no soft-cap", "alibi": "has no ALiBi", "bias": "returns no gradient of a bias"}
NO_DOCUMENTS = "takes no packed documents (torch's backward for them reads out of bounds before pytorch#186142)"
DROPOUT = "has a dropout of its own, not the one that depends on positions alone"


class Rectangle(NamedTuple):
    """Rows [q0, q1) against columns [k0, k1), under a band in indices of that rectangle."""

    q0: int
    q1: int
    k0: int
    k1: int
    band: Band


def seen(band: Band, queries: int, keys: int) -> Rectangle | None:
    """The rows that see something and the columns that are seen; None where there are none. Bounds without effect are dropped."""
    lo, hi = (1 - keys if band.lo is None else band.lo), (queries - 1 if band.hi is None else band.hi)
    q0, q1, k0, k1 = max(0, lo), min(queries, hi + keys), max(0, -hi), min(keys, queries - lo)
    if q0 >= q1 or k0 >= k1 or lo > hi:
        return None
    rows, columns, band = q1 - q0, k1 - k0, band.shift(q0, k0)
    lo = None if band.lo is None or band.lo <= 1 - columns else band.lo
    return Rectangle(q0, q1, k0, k1, Band(lo, None if band.hi is None or band.hi >= rows - 1 else band.hi))


class _VendorKernel:
    """What both share. Two runs of their backward may differ in the last bits: dq is added to in any order."""

    name: str
    widest: int
    wider: str = ""
    """What is to be said of larger head dimensions."""

    def __init__(self, aten: Any = torch.ops.aten) -> None:
        """aten: where the operators are."""
        self.aten = aten

    def refuses(self, needs: Needs) -> list[str]:
        reasons = []
        if needs.device != "cuda":
            reasons.append(f"runs on CUDA GPUs, not on {needs.device}")
        elif torch.cuda.is_available():
            reasons += self._missing()
        if needs.dtype not in DTYPES:
            reasons.append(f"computes in fp16 and bf16, not in {str(needs.dtype).removeprefix('torch.')}")
        for what, width in (("head", needs.head_dim), ("value head", needs.value_dim)):
            if width > self.widest or width % 8:
                reasons.append(f"has {what} dimensions up to {self.widest}{self.wider}, in multiples of 8")
        if needs.fp32_partials:
            reasons.append("rounds partial results to the precision of its inputs, where a ring's are fp32")
        reasons += [why for feature, why in MODIFIERS.items() if feature in needs.features]
        reasons += [DROPOUT] * ("dropout" in needs.features)
        return [*reasons, *self._refuses_mask(needs)]

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, block: Block, spec: AttentionSpec, *, into: Partial | None = None
    ) -> Partial:
        self._check(q, k, v, spec)
        scale = spec.scale_for(q.shape[-1])
        if block.q_segments is not None:
            part = self._documents_forward(q, k, v, block, scale)
            return part if into is None else merge_(into, part)
        whole = into
        for rows, columns, part_of in self._parts(block.band, q, k):
            part = self._forward(q[:, rows], k[:, columns], v[:, columns], part_of, scale)
            if into is None and part.lse.shape[2] == q.shape[1]:
                return part
            whole = self._nothing(q, v) if whole is None else whole
            if into is None:
                whole.out[:, rows], whole.lse[:, :, rows] = part
            else:
                merge_(Partial(whole.out[:, rows], whole.lse[:, :, rows]), part)
        return self._nothing(q, v) if whole is None else whole

    def delta(self, dout: Tensor, out: Tensor, dlse: Tensor) -> Tensor:
        """As the primitive's. NaN, not a wrong number, in rows whose dout is 0 and dlse is not: no `out` has that delta."""
        silent = (dout == 0).all(-1).transpose(1, 2) & (dlse != 0)
        return (row_dot(dout, out) - dlse).masked_fill(silent, torch.nan)

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
        self._check(q, k, v, spec)
        scale, dout = spec.scale_for(q.shape[-1]), _unit_stride(dout.to(q.dtype))
        out = _projection(dout, delta)
        if block.q_segments is not None:
            grads = self._documents_backward(dout, q, k, v, out, lse, block, scale)
            return grads if into is None else add_(into, grads)
        parts = list(self._parts(block.band, q, k))
        if into is None and [(r.stop - r.start, c.stop - c.start) for r, c, _ in parts] == [(q.shape[1], k.shape[1])]:
            return self._backward(dout, q, k, v, out, lse.contiguous(), parts[0][2], scale)
        whole = zero_grads(q, k, v) if into is None else into
        for r, c, band in parts:
            given = (dout[:, r], q[:, r], k[:, c], v[:, c], out[:, r], lse[:, :, r].contiguous())
            add_(Grads(whole.dq[:, r], whole.dk[:, c], whole.dv[:, c]), self._backward(*given, band, scale))
        return cast_like(whole, q, k, v) if into is None else whole

    def _parts(self, band: Band, q: Tensor, k: Tensor) -> Iterator[tuple[slice, slice, Band]]:
        if q.numel() == 0:
            return
        for part in self._rectangles(band, q.shape[1], k.shape[1]):
            yield slice(part.q0, part.q1), slice(part.k0, part.k1), part.band

    def _check(self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> None:
        refused = [why for feature, why in (MODIFIERS | {"dropout": DROPOUT}).items() if feature in spec.features]
        if refused:
            raise KernelError(f"attention kernel {self.name}: {'; '.join(refused)}")
        check_dtypes(q, k, v, spec)

    def _nothing(self, q: Tensor, v: Tensor) -> Partial:
        part = empty_partial(q, v.shape[-1])
        return Partial(part.out.to(q.dtype), part.lse)

    def _missing(self) -> list[str]:
        return ["needs a GPU of compute capability 8.0 or above"] * (torch.cuda.get_device_capability() < (8, 0))

    def _refuses_mask(self, needs: Needs) -> list[str]:
        raise NotImplementedError

    def _rectangles(self, band: Band, queries: int, keys: int) -> Iterator[Rectangle]:
        """Rectangles that the operator can do, of distinct rows, in which every row sees something."""
        raise NotImplementedError

    def _forward(self, q: Tensor, k: Tensor, v: Tensor, band: Band, scale: float) -> Partial:
        raise NotImplementedError

    def _backward(self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, band: Band, scale: float) -> Grads:
        raise NotImplementedError

    def _documents_forward(self, q: Tensor, k: Tensor, v: Tensor, block: Block, scale: float) -> Partial:
        raise KernelError(f"attention kernel {self.name}: {NO_DOCUMENTS}")

    def _documents_backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, block: Block, scale: float
    ) -> Grads:
        raise KernelError(f"attention kernel {self.name}: {NO_DOCUMENTS}")


class CudnnKernel(_VendorKernel):
    """cuDNN's fused attention, full or causal. Every new combination of shapes makes it plan anew, which takes a moment."""

    name = "cudnn"
    widest = 128
    """What every GPU and version can do, forward and backward: a limit of ours."""
    wider = " (cuDNN may have more, on some GPUs with some versions: not used)"

    def _missing(self) -> list[str]:
        return super()._missing() + ["this torch has no cuDNN"] * (not torch.backends.cudnn.is_available())

    def _refuses_mask(self, needs: Needs) -> list[str]:
        reasons = [NO_DOCUMENTS] * needs.documents
        return reasons + ["is full or causal, with no window or other band"] * (not needs.kinds <= {"full", "causal"})

    def _rectangles(self, band: Band, queries: int, keys: int) -> Iterator[Rectangle]:
        part = seen(band, queries, keys)
        if part is None:
            return
        if part.band not in (Band.full(), Band.causal()):
            raise KernelError(f"attention kernel cudnn: is full or causal, not {band} over {queries} queries and {keys} keys")
        if part.k1 - part.k0 == 1:
            raise KernelError("attention kernel cudnn: takes two keys or more, not one")
        yield part

    def _forward(self, q: Tensor, k: Tensor, v: Tensor, band: Band, scale: float) -> Partial:
        heads_first = (_unit_stride(x).transpose(1, 2) for x in (q, k, v))
        causal = band == Band.causal()
        out, lse, *_ = self.aten._scaled_dot_product_cudnn_attention(*heads_first, None, True, 0.0, causal, False, scale=scale)
        return Partial(out.transpose(1, 2), lse.reshape(out.shape[:3]))

    def _backward(self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, band: Band, scale: float) -> Grads:
        given = tuple(_unit_stride(x).transpose(1, 2) for x in (dout, q, k, v, out))
        lse = lse.view(*lse.shape, 1) if _lse_dimensions(self.aten, q.device, q.dtype) == 4 else lse
        seed = torch.zeros((), dtype=torch.int64, device=q.device)  # of a dropout that there is not
        lengths = (None, None, q.shape[1], k.shape[1])
        grads = self.aten._scaled_dot_product_cudnn_attention_backward(
            *given, lse, seed, seed, None, *lengths, 0.0, band == Band.causal(), scale=scale
        )
        return Grads(*(x.transpose(1, 2) for x in grads))


@cache
def _lse_dimensions(aten: Any, device: torch.device, dtype: torch.dtype) -> int:
    """4 where torch's cuDNN operators have lse as [B, H, T, 1], 3 where as [B, H, T]; it has been both."""
    x = torch.zeros(1, 1, 64, 64, dtype=dtype, device=device)
    return aten._scaled_dot_product_cudnn_attention(x, x, x, None, True, 0.0, False, False)[1].ndim


class FlashAttention2Kernel(_VendorKernel):
    """FlashAttention-2 as built into torch, under any band. Packed documents are found on the device, which makes the host wait
    for it in every call."""

    name = "flash"
    widest = 256

    def _missing(self) -> list[str]:
        return super()._missing() + ["this torch has no FlashAttention"] * (not torch.backends.cuda.is_flash_attention_available())

    def _refuses_mask(self, needs: Needs) -> list[str]:
        reasons = ["needs values of the head dimension"] * (needs.head_dim != needs.value_dim)
        other = needs.documents and "band" in needs.kinds
        return reasons + ["takes packed documents under a full, causal or windowed mask only"] * other

    def _rectangles(self, band: Band, queries: int, keys: int) -> Iterator[Rectangle]:
        part = seen(band, queries, keys)
        if part is None:
            return
        rows, columns, lo = part.q1 - part.q0, part.k1 - part.k0, part.band.lo
        if lo is None or rows - columns - lo < columns:
            yield part
            return
        # a right window as wide as the keys counts as none there, though with more queries than keys it is one
        split = part.q0 + columns - 1 + lo
        for q0, q1 in ((part.q0, split), (split, part.q1)):
            for inner in self._rectangles(part.band.shift(q0 - part.q0, 0), q1 - q0, columns):
                yield Rectangle(q0 + inner.q0, q0 + inner.q1, part.k0 + inner.k0, part.k0 + inner.k1, inner.band)

    def _forward(self, q: Tensor, k: Tensor, v: Tensor, band: Band, scale: float) -> Partial:
        lengths = (None, None, q.shape[1], k.shape[1])
        windows = _windows(band, q.shape[1] - k.shape[1])
        given = (_unit_stride(x) for x in (q, k, v))
        out, lse, *_ = self.aten._flash_attention_forward(*given, *lengths, 0.0, False, False, scale=scale, **windows)
        return Partial(out, lse)

    def _backward(self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, band: Band, scale: float) -> Grads:
        lengths = (None, None, q.shape[1], k.shape[1])
        return self._gradients((dout, q, k, v, out), lse, lengths, _windows(band, q.shape[1] - k.shape[1]), scale)

    def _gradients(self, given: tuple[Tensor, ...], lse: Tensor, lengths: tuple[Any, ...], windows: Any, scale: float) -> Grads:
        state = torch.zeros(2, dtype=torch.uint64, device=lse.device)  # of a dropout that there is not
        given = tuple(_unit_stride(x) for x in given)
        none = torch.empty(0, device=lse.device)
        return Grads(*self.aten._flash_attention_backward(*given, lse, *lengths, 0.0, False, state, none, scale=scale, **windows))

    def _documents_forward(self, q: Tensor, k: Tensor, v: Tensor, block: Block, scale: float) -> Partial:
        packing, whole = _packing(block), self._nothing(q, v)
        if packing is None:
            return whole
        rows, columns, lengths = packing
        given = rows.pack(q), columns.pack(k), columns.pack(v)
        out, lse, *_ = self.aten._flash_attention_forward(
            *given, *lengths, 0.0, False, False, scale=scale, **_windows(block.band, 0)
        )
        if rows.tokens is None:
            return Partial(out.view(whole.out.shape), lse.unflatten(1, q.shape[:2]).transpose(0, 1).contiguous())
        whole.out.view(-1, *out.shape[1:])[rows.tokens] = out
        flat = whole.lse.transpose(0, 1).flatten(1)
        flat[:, rows.tokens] = lse
        return Partial(whole.out, flat.unflatten(1, q.shape[:2]).transpose(0, 1).contiguous())

    def _documents_backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, block: Block, scale: float
    ) -> Grads:
        packing = _packing(block)
        if packing is None:
            return cast_like(zero_grads(q, k, v), q, k, v)
        rows, columns, lengths = packing
        given = rows.pack(dout), rows.pack(q), columns.pack(k), columns.pack(v), rows.pack(out)
        lses = rows.pack(lse.transpose(1, 2)).T.contiguous()
        dq, dk, dv, _ = self._gradients(given, lses, lengths, _windows(block.band, 0), scale)
        return Grads(rows.unpack(dq, q), columns.unpack(dk, k), columns.unpack(dv, v))


def _windows(band: Band, more: int) -> dict[str, int]:
    """The band as FlashAttention-2 has it: aligned to the last query and key, -1 is unbounded. more: queries than keys."""
    return {
        "window_size_left": -1 if band.hi is None else band.hi - more,
        "window_size_right": -1 if band.lo is None else more - band.lo,
    }


Lengths = tuple[Tensor, Tensor, int, int]
"""The cumulated lengths of the documents, of queries and of keys, and the longest of each."""


def _packing(block: Block) -> tuple[_Packing, _Packing, Lengths] | None:
    """Documents that the queries and the keys of a block share; None where there is none."""
    q_segments, k_segments, band = block.q_segments, block.k_segments, block.band
    assert q_segments is not None
    assert k_segments is not None
    same = q_segments is k_segments or torch.equal(q_segments, k_segments)
    if (band.lo is not None and band.lo > 0) or (band.hi is not None and band.hi < 0):
        raise KernelError("attention kernel flash: takes packed documents under a full, causal or windowed mask only")
    if not same and band != Band.full():
        raise KernelError("attention kernel flash: takes packed documents under a causal or windowed mask in self attention only")
    q_names = _names(q_segments)
    k_names = q_names if same else _names(k_segments)
    rows = _Packing.of(q_names, k_names)
    columns = rows if same else _Packing.of(k_names, q_names)
    longest = int(rows.ends.diff().max())
    return (rows, columns, (rows.ends, columns.ends, longest, int(columns.ends.diff().max()))) if longest else None


def _names(segments: Tensor) -> Tensor:
    """int64 [B * T]: a number for each document of the batch, ascending as rows and segments do; PADDING stays."""
    rows = torch.arange(len(segments), device=segments.device)[:, None] << 32
    return torch.where(segments == PADDING, PADDING, rows + segments).flatten()


class _Packing(NamedTuple):
    """Documents of a batch one behind the other. tokens: which of the B * T are of one, None where all are. ends: int32, where each
    begins among them, and the end of the last."""

    tokens: Tensor | None
    ends: Tensor

    @staticmethod
    def of(names: Tensor, others: Tensor) -> _Packing:
        """Of the documents with these names, those that are also among the others'."""
        wanted = names != PADDING
        if others is not names:
            wanted &= torch.isin(names, others)
        tokens = wanted.nonzero().flatten()
        steps, gaps = names[tokens].diff(), tokens.diff() != 1
        if bool(((steps < 0) | ((steps == 0) & gaps)).any()):
            raise KernelError("attention kernel flash: a document is in several pieces, or documents are not in order")
        both = torch.tensor([0, tokens.numel()], device=names.device)
        ends = torch.cat([both[:1], steps.nonzero().flatten() + 1, both[1:]]).to(torch.int32)
        return _Packing(None if tokens.numel() == names.numel() else tokens, ends)

    def pack(self, x: Tensor) -> Tensor:
        """[B, T, ...] as [tokens, ...]."""
        flat = x.flatten(0, 1)
        return _unit_stride(flat) if self.tokens is None else flat[self.tokens]

    def unpack(self, x: Tensor, like: Tensor) -> Tensor:
        """The inverse of `pack`, 0 for padding."""
        if self.tokens is None:
            return x.view(like.shape)
        whole = x.new_zeros(like.shape)
        whole.view(-1, *x.shape[1:])[self.tokens] = x
        return whole


def _projection(dout: Tensor, delta: Tensor) -> Tensor:
    """The shortest vectors, of dout's shape and dtype, that have these products with dout. delta: [B, H, T]."""
    length = torch.linalg.vector_norm(dout, dim=-1, dtype=accumulator_dtype(dout.dtype))
    delta = delta.transpose(1, 2)
    weight = torch.where(length > 0, delta / length / length, delta * 0)
    return torch.mul(dout, weight[..., None], out=torch.empty_like(dout))


def _unit_stride(x: Tensor) -> Tensor:
    """x with a contiguous last dimension."""
    return x if x.stride(-1) == 1 else x.contiguous()
