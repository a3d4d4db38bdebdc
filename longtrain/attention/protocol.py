"""The softmax-attention primitive that every kernel implements, and the seam that models see.

Notation: q [B, Tq, H, D], k [B, Tk, Hkv, D], v [B, Tk, Hkv, Dv], out [B, Tq, H, Dv]; Hkv divides H (GQA, MQA), query head h uses
key head h // (H / Hkv). lse: natural logarithm, fp32, [B, H, Tq].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from longtrain.attention.keep import Keep
from longtrain.attention.layout import Chunk
from longtrain.attention.mask import AttentionMask, Band
from longtrain.attention.spec import AttentionSpec
from longtrain.errors import KernelError

PLAIN = AttentionSpec()
"""Scores scaled by 1 / sqrt(D), nothing else."""
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Of q, k and v, and of what is added to scores."""


@dataclass(frozen=True, eq=False)
class Block:
    """One rectangle of (query, key) pairs: a band in local indices, documents, and where the rows and columns lie globally.

    q_segments [B, Tq], k_segments [B, Tk]: as in `AttentionMask`, of any strides, or both None. Row i is global position
    q_start + stride * i, column j is k_start + stride * j: ALiBi and dropout read these, so that they are the same in any ring.
    runs: segments ascend along both, padding last, so that what a row sees of its document is an interval.
    """

    band: Band
    q_segments: Tensor | None = None
    k_segments: Tensor | None = None
    q_start: int = 0
    k_start: int = 0
    stride: int = 1
    runs: bool = False

    @staticmethod
    def of(mask: AttentionMask) -> Block:
        """The whole of a mask as one block."""
        return Block(mask.band, mask.q_segments, mask.k_segments, mask.q_start, runs=mask.boundaries is not None)

    def narrow(self, q_start: int, q_length: int, k_start: int, k_length: int) -> Block:
        """A sub-rectangle, in its own local indices."""
        return Block(
            self.band.shift(q_start, k_start),
            None if self.q_segments is None else self.q_segments.narrow(1, q_start, q_length),
            None if self.k_segments is None else self.k_segments.narrow(1, k_start, k_length),
            self.q_start + self.stride * q_start,
            self.k_start + self.stride * k_start,
            self.stride,
            self.runs,
        )

    def q_positions(self, queries: int, device: torch.device) -> Tensor:
        return Chunk(self.q_start, queries, self.stride).positions(device)

    def k_positions(self, keys: int, device: torch.device) -> Tensor:
        return Chunk(self.k_start, keys, self.stride).positions(device)


class Partial(NamedTuple):
    """An attention result over some of the keys: out [B, Tq, H, Dv], lse fp32 [B, H, Tq]."""

    out: Tensor
    lse: Tensor


class Grads(NamedTuple):
    """dq, dk, dv shaped as q, k, v; dbias shaped as the bias, where there is one."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    dbias: Tensor | None = None


@dataclass(frozen=True)
class Needs:
    """What a schedule asks of a kernel. kinds: those of every block that it yields (`band_kind`). length: tokens of a sequence that
    one rank holds, None where that is unknown; it decides which kernel is the fastest, and the longest may be too long for one."""

    kinds: frozenset[str]
    documents: bool
    features: frozenset[str]
    head_dim: int
    value_dim: int
    dtype: torch.dtype
    device: str
    fp32_partials: bool = False
    length: int | None = None


def band_kind(band: Band) -> str:
    """'full', 'causal', 'window' (causal with a bound), or 'band' for every other, such as the lo = 1 of striped rings."""
    if band == Band.full():
        return "full"
    if band == Band.causal():
        return "causal"
    return "window" if band.lo == 0 else "band"


class AttentionKernel(Protocol):
    """Tensors in, tensors out; not an autograd function, holds no state between calls."""

    name: str

    def refuses(self, needs: Needs) -> list[str]:
        """Why it cannot do this, in words; empty where it can."""
        ...

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, block: Block, spec: AttentionSpec, *, into: Partial | None = None
    ) -> Partial:
        """Attention over one block. A row that sees nothing has out 0 and lse -inf.

        `into`: an fp32 partial result over other keys, merged with this one in place and returned. Without it `out` has q's dtype.
        """
        ...

    def delta(self, dout: Tensor, out: Tensor, dlse: Tensor) -> Tensor:
        """sum(dout * out, -1) - dlse, fp32 [B, H, Tq]: what the backward of every block of these rows is given. dout, out
        [B, Tq, H, Dv]; dlse: the gradient of lse, fp32 [B, H, Tq]."""
        ...

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
        """Gradients through one block. lse and delta = sum(dout * out, -1) are those of the whole row, fp32 [B, H, Tq].

        `into`: fp32 accumulators, added to in place and returned; without it gradients are of the inputs' dtypes. bias_grad: False
        where the bias is a constant; dbias is then None.
        """
        ...


def check_dtypes(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> None:
    """Raises KernelError, which names tensor and dtype: plain torch would compute on integers, and on a mask of bools as a bias."""
    for name, x in (("q", q), ("k", k), ("v", v), ("bias", spec.bias), ("alibi_slopes", spec.alibi_slopes)):
        if x is not None and x.dtype not in DTYPES:
            raise KernelError(f"attention: {name} is {x.dtype}, must be {', '.join(map(str, DTYPES[:-1]))} or {DTYPES[-1]}")
    if not q.dtype == k.dtype == v.dtype:
        raise KernelError(f"attention: q is {q.dtype}, k {k.dtype}, v {v.dtype}: give them one dtype")


def check_inputs(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, block: Block | None = None) -> None:
    """Raises KernelError, which names the tensor, where shapes, dtypes or devices do not belong together: kernels would read what
    is not there.

    Once a call, before any kernel; reads no data. Without a block nothing is said of segments.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise KernelError(f"attention: {name} is {list(x.shape)}, must be [batch, tokens, heads, width]")
    check_dtypes(q, k, v, spec)
    (batch, queries, heads, dim), (_, keys, kv_heads, _) = q.shape, k.shape
    if dim == 0:
        raise KernelError(f"attention: q is {list(q.shape)}: a width of 0 gives no scores")
    if kv_heads == 0 or heads % kv_heads:
        raise KernelError(f"attention: q is {list(q.shape)}, k {list(k.shape)}: {heads} heads are no multiple of {kv_heads}")
    expected: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "k": (k, (batch, keys, kv_heads, dim)),
        "v": (v, (batch, keys, kv_heads, v.shape[3])),
        "alibi_slopes": (spec.alibi_slopes, (heads,)),
        "dropout_seed": (spec.dropout_seed, (batch,)),
        "sinks": (spec.sinks, (heads,)),
    }
    if block is not None:
        expected |= {"q_segments": (block.q_segments, (batch, queries)), "k_segments": (block.k_segments, (batch, keys))}
    for name, (x, shape) in expected.items():
        if x is not None and x.shape != shape:
            given = f"q is {list(q.shape)}, k {list(k.shape)}"
            raise KernelError(f"attention: {name} is {list(x.shape)}, must be {list(shape)}: {given}")
        if x is not None and name.endswith("segments") and x.dtype != torch.int32:
            raise KernelError(f"attention: {name} are {x.dtype}, must be torch.int32")
    for name, x in (*((name, x) for name, (x, _) in expected.items()), ("bias", spec.bias)):
        if x is not None and x.device != q.device:
            move = "mask.to(device) moves it" if name.endswith("segments") else "give both on one device"
            raise KernelError(f"attention: {name} is on {x.device}, q on {q.device}: {move}")
    if spec.bias is not None:
        whole = (batch, heads, queries, keys)
        sizes = zip(reversed(spec.bias.shape), reversed(whole), strict=False)
        if spec.bias.ndim > 4 or any(size not in (1, most) for size, most in sizes):
            raise KernelError(f"attention: bias is {list(spec.bias.shape)}, must broadcast to {list(whole)}")


def check_whole(mask: AttentionMask, device: torch.device) -> None:
    """For what cuts a sequence over ranks: raises KernelError where the queries of a mask do not begin where its keys do, or its
    segments are elsewhere."""
    if mask.q_segments is not None and mask.q_segments.device != device:
        raise KernelError(f"attention: segments are on {mask.q_segments.device}, q on {device}: mask.to(device) moves them")
    if mask.q_start:
        raise KernelError(f"attention: a mask with q_start {mask.q_start} is for one device: give it there, or use cp 1")


class Attend(Protocol):
    """The seam that models see. An implementation may hold shards of the sequence and brings its own exchange."""

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
        """Attention [B, Tq, H, Dv] of q's dtype.

        `keep`: the store of a recomputed block; the recomputation runs no kernel. A Keep serves one attention call, a second one
        would recall the first one's result.
        """
        ...


class SoftmaxAttend:
    """An Attend whose results over some keys have an lse, and can be merged."""

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
        """(out [B, Tq, H, Dv], lse fp32 [B, H, Tq]); both carry gradients."""
        raise NotImplementedError
