"""Attention in O(T) memory on any device, in plain torch: tiles of the dense kernel, merged by lse.

Rabe and Staats, "Self-attention Does Not Need O(n^2) Memory" (2021); the backward recomputes each tile from lse, as FlashAttention
(Dao et al. 2022) does.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from longtrain.attention.mask import Cover
from longtrain.attention.merge import cast_like, empty_partial, row_dot, zero_grads
from longtrain.attention.protocol import Block, Grads, Needs, Partial
from longtrain.attention.reference import ReferenceKernel
from longtrain.attention.spec import AttentionSpec, narrow_bias
from longtrain.batch import PADDING

Tile = tuple[int, int, int, int]


class MemoryEfficientKernel:
    """Holds one [B, H, q_tile, k_tile] matrix at a time. Does everything that the reference does.

    Tiles outside the band are skipped by arithmetic, tiles outside every document by the documents' least and greatest numbers.
    """

    name = "memory_efficient"

    def __init__(self, q_tile: int = 512, k_tile: int = 512) -> None:
        self.q_tile, self.k_tile = q_tile, k_tile
        self._dense = ReferenceKernel()

    def refuses(self, needs: Needs) -> list[str]:
        return []

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, block: Block, spec: AttentionSpec, *, into: Partial | None = None
    ) -> Partial:
        whole = empty_partial(q, v.shape[-1]) if into is None else into
        for q0, nq, k0, nk in self._tiles(q.shape[1], k.shape[1], block):
            rows = Partial(whole.out.narrow(1, q0, nq), whole.lse.narrow(2, q0, nq))
            self._dense.forward(
                q.narrow(1, q0, nq),
                k.narrow(1, k0, nk),
                v.narrow(1, k0, nk),
                block.narrow(q0, nq, k0, nk),
                spec.narrow(q0, nq, k0, nk),
                into=rows,
            )
        return whole if into is not None else Partial(whole.out.to(q.dtype), whole.lse)

    def delta(self, dout: Tensor, out: Tensor, dlse: Tensor) -> Tensor:
        return row_dot(dout, out) - dlse

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
        whole = zero_grads(q, k, v, spec.bias if bias_grad else None) if into is None else into
        for q0, nq, k0, nk in self._tiles(q.shape[1], k.shape[1], block):
            dbias = None if whole.dbias is None else narrow_bias(whole.dbias, q0, nq, k0, nk)
            self._dense.backward(
                dout.narrow(1, q0, nq),
                q.narrow(1, q0, nq),
                k.narrow(1, k0, nk),
                v.narrow(1, k0, nk),
                lse.narrow(2, q0, nq),
                delta.narrow(2, q0, nq),
                block.narrow(q0, nq, k0, nk),
                spec.narrow(q0, nq, k0, nk),
                into=Grads(whole.dq.narrow(1, q0, nq), whole.dk.narrow(1, k0, nk), whole.dv.narrow(1, k0, nk), dbias),
                bias_grad=bias_grad,
            )
        return whole if into is not None else cast_like(whole, q, k, v, spec.bias)

    def _tiles(self, queries: int, keys: int, block: Block) -> Iterator[Tile]:
        """The (q0, rows, k0, columns) that hold a visible pair."""
        q_spans = _document_spans(block.q_segments, self.q_tile)
        k_spans = _document_spans(block.k_segments, self.k_tile)
        for i, q0 in enumerate(range(0, queries, self.q_tile)):
            nq = min(self.q_tile, queries - q0)
            for j, k0 in enumerate(range(0, keys, self.k_tile)):
                nk = min(self.k_tile, keys - k0)
                if block.band.shift(q0, k0).cover(nq, nk) is Cover.EMPTY:
                    continue
                if q_spans is None or k_spans is None or _overlap(q_spans[i], k_spans[j]):
                    yield q0, nq, k0, nk


def _document_spans(segments: Tensor | None, tile: int) -> list[list[list[int]]] | None:
    """Per tile and batch row [least, greatest] document; an empty span where all is padding."""
    if segments is None or segments.shape[1] == 0:
        return None
    tiles = F.pad(segments, (0, -segments.shape[1] % tile), value=PADDING).unflatten(1, (-1, tile))
    least = tiles.masked_fill(tiles == PADDING, torch.iinfo(tiles.dtype).max).amin(2)
    # one tensor, so that a device is waited for once
    return torch.stack((least, tiles.amax(2)), -1).transpose(0, 1).tolist()


def _overlap(a: list[list[int]], b: list[list[int]]) -> bool:
    return any(max(x[0], y[0]) <= min(x[1], y[1]) for x, y in zip(a, b, strict=True))
