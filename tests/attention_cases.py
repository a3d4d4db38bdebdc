"""Attention problems to test with: a description of one, its tensors, and hypothesis strategies over all of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from longtrain.attention import AttentionKernel, AttentionMask, AttentionSpec, Band
from longtrain.batch import PADDING
from longtrain.kernels.local import LocalAttend
from tests.parity import assert_results_close, naive_attention, results

Documents = tuple[tuple[int, ...], ...]
"""Per row of the batch the lengths of its documents; what is left of the sequence is padding."""

BIAS_SHAPES = ("whole", "heads", "rows", "columns", "matrix", "vector", "scalar")


class Tensors(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    dlse: Tensor
    mask: AttentionMask
    spec: AttentionSpec


@dataclass(frozen=True)
class Case:
    """One attention problem. k_length, value_dim: None is as the queries'. q_documents without k_documents is self attention."""

    band: Band = Band.causal()
    q_length: int = 37
    k_length: int | None = None
    batch: int = 2
    heads: int = 2
    kv_heads: int = 2
    dim: int = 8
    value_dim: int | None = None
    q_documents: Documents | None = None
    k_documents: Documents | None = None
    scale: float | None = None
    softcap: float | None = None
    alibi: bool = False
    bias: str | None = None
    dropout: float = 0.0
    seed: int = 0
    sinks: bool = False

    def tensors(self, dtype: torch.dtype, device: str = "cpu") -> Tensors:
        """Inputs rounded to `dtype`: the same numbers, rounded, for every dtype."""
        draw = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=draw).to(device, dtype)

        keys = self.q_length if self.k_length is None else self.k_length
        value_dim = self.dim if self.value_dim is None else self.value_dim
        q = normal(self.batch, self.q_length, self.heads, self.dim)
        k = normal(self.batch, keys, self.kv_heads, self.dim)
        v = normal(self.batch, keys, self.kv_heads, value_dim)
        dout = normal(self.batch, self.q_length, self.heads, value_dim)
        dlse = normal(self.batch, self.heads, self.q_length)
        bias = None if self.bias is None else normal(*self._bias_shape(keys)).requires_grad_()
        slopes = torch.tensor([2.0 ** -(h + 1) for h in range(self.heads)], device=device) if self.alibi else None
        dropout_seed = torch.randint(-(2**63), 2**63 - 1, (self.batch,), generator=draw).to(device) if self.dropout else None
        sinks = normal(self.heads).requires_grad_() if self.sinks else None
        spec = AttentionSpec(self.scale, self.softcap, slopes, bias, self.dropout, dropout_seed, sinks)
        return Tensors(q, k, v, dout, dlse, self._mask(keys, device), spec)

    def in_dtype(self, tensors: Tensors, dtype: torch.dtype) -> Tensors:
        """The very numbers of `tensors` in another dtype."""
        q, k, v, dout, dlse = (t.detach().to(dtype) for t in tensors[:5])
        spec = tensors.spec
        learned = {name: x for name in ("bias", "sinks") if (x := getattr(spec, name)) is not None}
        spec = replace(spec, **{name: x.detach().to(dtype).requires_grad_() for name, x in learned.items()})
        return Tensors(q, k, v, dout, dlse, tensors.mask, spec)

    def _mask(self, keys: int, device: str) -> AttentionMask:
        if self.q_documents is None:
            return AttentionMask(self.band)
        q_segments = segments(self.q_documents, self.q_length).to(device)
        if self.k_documents is None:
            return AttentionMask(self.band, q_segments, q_segments, boundaries(self.q_documents))
        return AttentionMask(self.band, q_segments, segments(self.k_documents, keys).to(device))

    def _bias_shape(self, keys: int) -> tuple[int, ...]:
        b, h, i, j = self.batch, self.heads, self.q_length, keys
        shapes = ((b, h, i, j), (1, h, 1, 1), (b, 1, i, 1), (h, 1, j), (i, j), (j,), ())
        return shapes[BIAS_SHAPES.index(self.bias or "")]


def segments(documents: Documents, length: int) -> Tensor:
    """int32 [rows, length]."""
    rows = torch.full((len(documents), length), PADDING, dtype=torch.int32)
    for row, lengths in zip(rows, documents, strict=True):
        ids = torch.repeat_interleave(torch.arange(len(lengths), dtype=torch.int32), torch.tensor(lengths, dtype=torch.int64))
        row[: len(ids)] = ids
    return rows


def boundaries(documents: Documents) -> tuple[tuple[int, ...], ...]:
    """As in `Batch`."""
    return tuple(tuple(sum(lengths[:i]) for i in range(len(lengths) + 1)) for lengths in documents)


def check_kernel(kernel: AttentionKernel, case: Case, dtype: torch.dtype, device: str = "cpu") -> None:
    """Outputs and all gradients of a kernel against plain attention, by the self-calibrating rule. fp64 is compared at 1e-12."""
    given = case.tensors(dtype, device)
    wide = torch.float32 if dtype in (torch.bfloat16, torch.float16) else torch.float64
    exact = case.in_dtype(given, wide)
    fast = results(LocalAttend(kernel).with_lse, given[:3], given.mask, given.spec, given.dout, given.dlse)
    low = results(naive_attention, given[:3], given.mask, given.spec, given.dout, given.dlse)
    truth = results(naive_attention, exact[:3], exact.mask, exact.spec, exact.dout, exact.dlse)
    assert fast["out"].dtype == dtype
    assert fast["lse"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    if dtype == torch.float64:
        assert_results_close(fast, truth, low, noise=1e-12)
    else:
        assert_results_close(fast, truth, low, absolute=delta_noise(exact, truth["out"], dtype))


def delta_noise(exact: Tensors, out: Tensor, dtype: torch.dtype) -> dict[str, float]:
    """By how much rounding `out` to dtype moves the gradients of every FlashAttention and not those of a textbook.

    delta = sum(dout * out) is made from the rounded out, and subtracted from products that are summed in fp32. Where a row sees one
    key, or a bias is summed over whole rows, the textbook's formula cancels exactly instead. A wrong delta acts as a gradient of
    lse does, so noise is drawn and sent back through plain attention. exact, out: in fp32 or better.
    """
    eps = torch.finfo(dtype).eps + torch.finfo(torch.float32).eps * out.shape[-1] ** 0.5
    spread = (exact.dout * out).norm(dim=-1).transpose(1, 2) * (eps / 5)  # of a rounding error: eps / sqrt(12), or half of that
    draw, drawn = torch.Generator(out.device).manual_seed(0), []
    for _ in range(16):
        delta = spread * torch.randn(spread.shape, generator=draw, dtype=spread.dtype, device=spread.device)
        found = results(naive_attention, exact[:3], exact.mask, exact.spec, torch.zeros_like(exact.dout), delta)
        drawn.append({name: grad for name, grad in found.items() if name not in ("out", "lse")})
    return {name: _bound(torch.stack([grads[name] for grads in drawn])) for name in drawn[0]}


def _bound(drawn: Tensor) -> float:
    """Of noise, from 16 draws: the largest of four where numbers are many. Of few, alone or among zeros, four draws may all be
    small: then 4 spreads, of rounding p as well, which moves out as much as rounding that does."""

    def spread(x: Tensor) -> float:
        return x[x != 0].square().mean().nan_to_num().sqrt().item()

    few = drawn.count_nonzero().item() <= 16 * len(drawn)
    return 4 * 2**0.5 * spread(drawn) if few else max(drawn[:4].abs().max().item(), 3 * spread(drawn[:4]))


@st.composite
def documents(draw: st.DrawFn, rows: int, length: int) -> Documents:
    """Documents of any length, of one token and of none, and padding at the end of a row, or nothing but padding."""

    def one() -> tuple[int, ...]:
        left, lengths = length, []
        for _ in range(draw(st.integers(0, 5))):
            lengths.append(draw(st.sampled_from((0, 1)) | st.integers(0, left)) if left else 0)
            left -= lengths[-1]
        return (*lengths, left) if draw(st.booleans()) else tuple(lengths)

    return tuple(one() for _ in range(rows))


def bands(reach: int = 50) -> st.SearchStrategy[Band]:
    """Full, causal, windows, and arbitrary bounds, of either sign, crossed ones included."""
    bound = st.none() | st.integers(-reach, reach)
    return (
        st.sampled_from((Band.full(), Band.causal(), Band.causal(1)))
        | st.builds(Band.causal, st.integers(1, reach))
        | st.builds(Band, bound, bound)
    )


@st.composite
def cases(draw: st.DrawFn, lengths: st.SearchStrategy[int] | None = None, bias: bool = True) -> Case:
    """Any combination of features."""
    lengths = st.sampled_from((1, 2, 7, 37)) | st.integers(1, 48) if lengths is None else lengths
    q_length, batch, kv_heads = draw(lengths), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    cross = draw(st.integers(0, 3)) == 0
    k_length = draw(lengths) if cross else q_length
    packed = draw(st.booleans())
    return Case(
        band=draw(bands()),
        q_length=q_length,
        k_length=k_length,
        batch=batch,
        heads=kv_heads * draw(st.integers(1, 3)),
        kv_heads=kv_heads,
        dim=draw(st.sampled_from((1, 4, 8))),
        value_dim=draw(st.sampled_from((None, 1, 6))),
        q_documents=draw(documents(batch, q_length)) if packed else None,
        k_documents=draw(documents(batch, k_length)) if packed and cross else None,
        scale=draw(st.sampled_from((None, 0.3))),
        softcap=draw(st.sampled_from((None, 1.5))),
        alibi=draw(st.booleans()),
        bias=draw(st.none() | st.sampled_from(BIAS_SHAPES)) if bias else None,
        dropout=draw(st.sampled_from((0.0, 0.0, 0.3))),
        seed=draw(st.integers(0, 2**31)),
        sinks=draw(st.booleans()),
    )
