"""The attention primitive over the Triton kernels: refusals, shapes and launches."""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

from longtrain.attention.mask import Cover
from longtrain.attention.merge import cast_like, empty_partial, zero_grads
from longtrain.attention.protocol import Block, Grads, Needs, Partial, check_dtypes
from longtrain.attention.spec import AttentionSpec
from longtrain.errors import KernelError
from longtrain.kernels.flash.tiles import GRID, SHARED, TABLE, Pass, Tile, Tiles, longest, tile_for, tiles_for
from longtrain.kernels.language import has_triton

WIDEST = 256
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
ROWS = 256
"""A multiple of every tile's rows."""
CACHE = 32 << 20
"""Bytes, of an H100's 50 MB of L2: measured against one head at a time, 4 to 6% at 16K tokens and 10% at 4K."""
DELTA_ROWS = 32
"""Of a program that makes delta: 16 KiB of dout and out at a width of 128."""
CHUNK = 1024
"""Tiles whose documents are read at once."""
RUN_ROWS = 128
"""Positions of a program that finds runs: few, so that there are enough programs to hide its waits."""


class FlashKernel:
    """FlashAttention (Dao et al. 2022, 2023) in Triton; every result is the same bits in every run.

    tiles: which tile sizes to use; None: the table of the device (nothing is tuned at start). precision: of fp32 products, "ieee"
    or "tf32". descriptors: read tiles through Hopper's tensor memory accelerator where it is there and strides allow.
    interpret: run on the CPU in Triton's interpreter, for tests; TRITON_INTERPRET=1 must be set before Triton is imported.
    """

    name = "triton"

    def __init__(
        self, *, tiles: Tiles | None = None, precision: str = "ieee", descriptors: bool = True, interpret: bool = False
    ) -> None:
        self.tiles, self.precision, self.descriptors, self.interpret = tiles, precision, descriptors, interpret

    def refuses(self, needs: Needs) -> list[str]:
        reasons = []
        if needs.device != "cuda" and not self.interpret:
            reasons.append(f"runs on CUDA GPUs, not on {needs.device}")
        elif needs.device == "cuda" and torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
            reasons.append("needs a GPU of compute capability 8.0 or above")
        if not has_triton():
            reasons.append("Triton is not installed")
        if needs.dtype not in DTYPES:
            reasons.append(f"computes in fp16, bf16 and fp32, not in {str(needs.dtype).removeprefix('torch.')}")
        elif self.interpret and needs.dtype == torch.bfloat16:
            reasons.append("Triton's interpreter multiplies bf16 matrices wrongly")
        for what, width in (("head", needs.head_dim), ("value head", needs.value_dim)):
            if width > WIDEST:
                reasons.append(f"has {what} dimensions up to {WIDEST}, not {width}")
        if needs.length is not None and not reasons:
            width, tiles = _padded(max(needs.head_dim, needs.value_dim)), self.table(torch.device(needs.device))
            most = longest(width, needs.dtype.itemsize, tiles)
            if needs.length > most:
                reasons.append(f"has up to {most:,} tokens on a rank at this width and precision, not {needs.length:,}")
        return reasons

    def table(self, device: torch.device) -> Tiles:
        """The tile sizes in use there."""
        if self.tiles is not None or device.type != "cuda" or not torch.cuda.is_available():
            return self.tiles or TABLE
        properties = torch.cuda.get_device_properties(device)
        # AMD's properties have no such name, nor may those of every torch
        unnamed = SHARED if torch.version.hip is None and properties.major in (9, 10) else 0
        return tiles_for(getattr(properties, "shared_memory_per_block_optin", unnamed))

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, block: Block, spec: AttentionSpec, *, into: Partial | None = None
    ) -> Partial:
        if block.band.cover(q.shape[1], k.shape[1]) is Cover.EMPTY or q.numel() == 0:
            part = empty_partial(q, v.shape[-1]) if into is None else into
            return part if into is not None else Partial(part.out.to(q.dtype), part.lse)
        from longtrain.kernels.flash.forward import forward_kernel

        (batch, queries, heads, _), value_dim = q.shape, v.shape[-1]
        if into is None:
            out = torch.empty(batch, queries, heads, value_dim, dtype=q.dtype, device=q.device)
            into_, merge = Partial(out, torch.empty(batch, heads, queries, dtype=torch.float32, device=q.device)), False
        else:
            into_, merge = Partial(_accumulator(into.out), into.lse), True
        call = Call(self, q, k, v, block, spec)
        tile = call.tile(Pass.SHORT if call.short else Pass.FORWARD)
        k_, v_, tma = call.tiled(tile.columns, k=call.k, v=call.v)
        plain = not spec.features - {"dropout"} and spec.scale_for(q.shape[-1]) > 0
        call.launch(
            forward_kernel,
            call.grid(queries, tile.rows, call.k, call.v, group=call.group),
            tile,
            (call.q, k_, v_, *into_, *call.segments, call.documents(tile), *call.modifiers),
            (call.q, call.k, call.v, into_.out, into_.lse, *call.segments, call.bias),
            BIAS=spec.bias is not None,
            RUNS=call.runs,
            PLAIN=plain,
            INTO=merge,
            TMA=tma,
        )
        return into_ if into is None else into

    def delta(self, dout: Tensor, out: Tensor, dlse: Tensor) -> Tensor:
        from longtrain.kernels.flash.backward import delta_kernel

        (batch, queries, heads, value_dim), dout, out = out.shape, _rows(dout), _rows(out)
        delta = torch.empty(batch, heads, queries, dtype=torch.float32, device=out.device)
        if delta.numel() == 0:
            return delta
        with _on(out):
            delta_kernel[(-(-queries // DELTA_ROWS) * batch * heads,)](
                dout, out, dlse, delta, dout.stride(), out.stride(), dlse.stride(), heads, queries,
                DV=value_dim, BLOCK_V=_padded(value_dim), BLOCK_T=DELTA_ROWS,
            )  # fmt: skip
        return delta

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
        if block.band.cover(q.shape[1], k.shape[1]) is Cover.EMPTY or q.numel() == 0:
            bias = spec.bias if bias_grad else None
            return cast_like(zero_grads(q, k, v, bias), q, k, v, bias) if into is None else into
        call = Call(self, q, k, v, block, spec)
        rows = (_rows(dout.to(q.dtype)), *padded_rows(lse, delta))
        grads = into or Grads(*(torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v)))
        shape = _four(spec.bias).shape if spec.bias is not None and bias_grad else None
        over_keys, over_queries = (shape is not None and shape[3] == 1), (shape is not None and shape[2] == 1 < shape[3])
        q_sums = run_queries(call, rows, grads, into is not None, over_keys)
        k_sums = run_keys(call, rows, grads, into is not None, over_queries)
        if spec.bias is None or shape is None:
            return grads
        if over_keys or over_queries:
            sums = q_sums if over_keys else k_sums
            dbias = sums.sum_to_size(shape).view(spec.bias.shape)
            if into is None:
                return grads._replace(dbias=dbias.to(spec.bias.dtype))
            if grads.dbias is not None:
                grads.dbias.add_(dbias.view_as(grads.dbias))
            return grads
        if into is None:
            grads = grads._replace(dbias=torch.empty(spec.bias.shape, dtype=spec.bias.dtype, device=q.device))
        if grads.dbias is not None:
            _bias(call, rows, _four(grads.dbias), into is not None)
        return grads


def padded_rows(lse: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """lse and delta, fp32 [B, H, Tq], as the backward's kernels read them: [B, H, Tq in multiples of ROWS]."""
    from longtrain.kernels.flash.backward import rows_kernel

    batch, heads, length = lse.shape
    lses, deltas = torch.empty(2, batch, heads, -(-length // ROWS) * ROWS, dtype=torch.float32, device=lse.device)
    with _on(lse):
        rows_kernel[(lses.numel() // ROWS,)](lse, delta, lses, deltas, lse.stride(), delta.stride(), heads, length, BLOCK=ROWS)
    return lses, deltas


Rows = tuple[Tensor, Tensor, Tensor]
"""dout and `padded_rows`."""


def run_queries(call: Call, rows: Rows, grads: Grads, into: bool = False, sums: bool = False) -> Tensor:
    """Writes dq, or adds to it; returns the gradient of scores summed over keys, where `sums` asks for it."""
    from longtrain.kernels.flash.backward import queries_kernel

    batch, queries, heads, _ = call.q.shape
    tile = call.tile(Pass.QUERIES)
    k, v, tma = call.tiled(tile.columns, k=call.k, v=call.v)
    partial = torch.empty(batch, heads, queries if sums else 0, 1, dtype=torch.float32, device=grads.dq.device)
    call.launch(
        queries_kernel,
        call.grid(queries, tile.rows, call.k, call.v, group=call.group),
        tile,
        (call.q, k, v, *rows, _accumulator(grads.dq), partial, *call.segments, call.documents(tile), *call.modifiers),
        (call.q, call.k, call.v, *rows[:2], grads.dq, *call.segments, call.bias),
        BIAS=call.bias is not None,
        RUNS=call.runs,
        SUMS=sums,
        INTO=into,
        TMA=tma,
    )
    return partial


def run_keys(call: Call, rows: Rows, grads: Grads, into: bool = False, sums: bool = False) -> Tensor:
    """Writes dk and dv, or adds to them; returns the gradient of scores summed over queries, where `sums` asks for it."""
    from longtrain.kernels.flash.backward import keys_kernel

    (batch, _, heads, _), keys = call.q.shape, call.k.shape[1]
    tile = call.tile(Pass.KEYS)
    q, dout, tma = call.tiled(tile.rows, q=call.q, dout=rows[0])
    partial = torch.empty(batch, heads, 1, keys if sums else 0, dtype=torch.float32, device=grads.dk.device)
    dk, dv = _accumulator(grads.dk), _accumulator(grads.dv)
    call.launch(
        keys_kernel,
        call.grid(keys, tile.columns, call.q, rows[0]),
        tile,
        (q, call.k, call.v, dout, *rows[1:], dk, dv, partial, *call.segments, call.documents(tile, of_keys=True), *call.modifiers),
        (call.q, call.k, call.v, *rows[:2], dk, dv, *call.segments, call.bias),
        BIAS=call.bias is not None,
        RUNS=call.runs,
        SUMS=sums,
        INTO=into,
        TMA=tma,
    )
    return partial


def _bias(call: Call, rows: Rows, dbias: Tensor, into: bool) -> None:
    from longtrain.kernels.flash.backward import bias_kernel

    (batch, queries, heads, _), keys = call.q.shape, call.k.shape[1]
    tile = call.tile(Pass.BIAS)
    batches, shared = batch // dbias.shape[0], heads // dbias.shape[1]
    call.launch(
        bias_kernel,
        (call.count(queries, tile.rows) * call.count(keys, tile.columns) * dbias.shape[0] * dbias.shape[1],),
        tile,
        (call.q, call.k, call.v, *rows, dbias, *call.segments, *call.modifiers),
        (call.q, call.k, call.v, *rows[:2], dbias, *call.segments, call.bias),
        (batches, shared),
        INTO=into,
    )


class Call:
    """One block's tensors as kernels want them, and what all of its launches share."""

    def __init__(self, kernel: FlashKernel, q: Tensor, k: Tensor, v: Tensor, block: Block, spec: AttentionSpec) -> None:
        check_dtypes(q, k, v, spec)
        self.kernel, self.tiles = kernel, kernel.table(q.device)
        self.q, self.k, self.v = (_rows(x) for x in (q, k, v))
        (batch, queries, heads, dim), (_, keys, kv_heads, value_dim) = q.shape, v.shape
        # AMD's capabilities begin with 9 too
        self.hopper = q.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(q.device) >= (9, 0)
        self.block_d, self.block_v = _padded(dim), _padded(value_dim)
        self.segments = (block.q_segments, block.k_segments)
        self.runs = block.runs and block.q_segments is not None
        self.bias = None if spec.bias is None else _four(spec.bias.detach()).expand(batch, heads, queries, keys)
        slopes = None if spec.alibi_slopes is None else spec.alibi_slopes.to(q.device, torch.float32).contiguous()
        seed = spec.dropout_seed.contiguous() if spec.dropout and spec.dropout_seed is not None else None
        self.modifiers = (self.bias, slopes, seed)
        lo, hi = block.band.lo, block.band.hi
        lo = None if lo is None or lo <= 1 - keys else lo
        hi = None if hi is None or hi >= queries - 1 else hi
        self.short = block.q_segments is not None or (lo is not None and hi is not None)
        threshold = min(round(spec.dropout * 2**32), 2**32 - 1)
        self.group = heads // kv_heads
        self.scalars = (
            *(heads, self.group, queries, keys),
            *(lo or 0, hi or 0),
            *(block.q_start, block.k_start, block.stride),
            *(float(spec.scale_for(dim)), float(spec.softcap or 1.0), threshold, 1 / (1 - spec.dropout)),
        )
        self.constants: dict[str, Any] = {
            "D": dim,
            "DV": value_dim,
            "BLOCK_D": self.block_d,
            "BLOCK_V": self.block_v,
            "HAS_LO": lo is not None,
            "HAS_HI": hi is not None,
            "DOCUMENTS": block.q_segments is not None,
            "SOFTCAP": spec.softcap is not None,
            "ALIBI": slopes is not None,
            "DROPOUT": seed is not None,
            "PRECISION": kernel.precision,
        }

    def tile(self, kernel: Pass) -> Tile:
        return tile_for(kernel, max(self.block_d, self.block_v), self.q.element_size(), self.tiles)

    def count(self, length: int, tile: int) -> int:
        return -(-length // tile)

    def grid(self, length: int, tile: int, *walked: Tensor, group: int = 1) -> tuple[int, int, int]:
        """For `place`: heads of a section, tiles, sections. walked: what programs walk over; group: heads with programs a key head.

        A section is as many key heads as CACHE bytes hold what their programs walk over; one where all programs are equally long.
        Raises KernelError where a sequence has more tiles than a grid can have.
        """
        tiles, heads = self.count(length, tile), self.k.shape[0] * self.k.shape[2]
        if tiles > GRID:
            raise KernelError(f"attention kernel triton: {length:,} tokens in one block; up to {GRID * tile:,} are possible")
        each = sum(x.shape[1] * x.shape[2] * x.shape[3] * x.element_size() for x in walked) // self.k.shape[2]
        section = _divisor(heads, CACHE // each if self.constants["HAS_LO"] != self.constants["HAS_HI"] else 1)
        return section * group, tiles, heads // section

    def launch(
        self, kernel: Any, grid: tuple[int, ...], tile: Tile, pointers: tuple[Any, ...], strided: tuple[Tensor | None, ...],
        more: tuple[int, ...] = (), **constants: Any,
    ) -> None:  # fmt: skip
        """pointers, then the strides of `strided` as tuples, then the scalars: the order of every kernel's arguments."""
        strides = tuple((0, 0, 0, 0) if x is None else x.stride() for x in strided)
        limit = {"maxnreg": tile.registers} if tile.registers and not self.kernel.interpret else {}
        with _on(self.q):
            kernel[grid](
                *pointers, *strides, *self.scalars, *more, **self.constants, **constants,
                BLOCK_M=tile.rows, BLOCK_N=tile.columns, num_warps=tile.warps, num_stages=tile.stages, **limit,
            )  # fmt: skip

    def documents(self, tile: Tile, of_keys: bool = False) -> Tensor | None:
        """What the programs of queries, or those of keys, need to know of documents: int32, of runs_kernel [B, 2, length] where
        they are runs, else of ranges_kernel [B, tiles, 4]."""
        q_segments, k_segments = self.segments
        if q_segments is None or k_segments is None:
            return None
        from longtrain.kernels.flash.common import ranges_kernel, runs_kernel

        if self.runs:
            own, other = (k_segments, q_segments) if of_keys else (q_segments, k_segments)
            (batch, length), columns = own.shape, other.shape[1]
            runs = torch.empty(batch, 2, length, dtype=torch.int32, device=own.device)
            with _on(self.q):
                runs_kernel[(self.count(length, RUN_ROWS) * batch,)](
                    own, other, runs, own.stride(), other.stride(), length, columns, columns.bit_length(), BLOCK=RUN_ROWS
                )
            return runs
        q_spans, k_spans = self._spans(q_segments, tile.rows), self._spans(k_segments, tile.columns)
        own, other = (k_spans, q_spans) if of_keys else (q_spans, k_spans)
        ranges = torch.empty(*own.shape[:2], 4, dtype=torch.int32, device=own.device)
        with _on(self.q):
            ranges_kernel[(own.shape[0] * own.shape[1],)](own, other, ranges, own.shape[1], other.shape[1], CHUNK=CHUNK)
        return ranges

    def tiled(self, rows: int, **tensors: Tensor) -> tuple[Any, Any, bool]:
        """Two tensors as descriptors of tiles of `rows` where the hardware has them and both allow, else as they are."""
        (a, b) = tensors.values()
        usable = self.kernel.descriptors and (self.kernel.interpret or self.hopper)
        if not (usable and a.element_size() == 2 and _describable(a) and _describable(b)):
            return a, b, False
        from triton.tools.tensor_descriptor import TensorDescriptor

        def describe(x: Tensor) -> Any:
            strides = [16 if size == 1 else stride for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True)]
            return TensorDescriptor(x, list(x.shape), [*strides, 1], [1, rows, 1, _padded(x.shape[-1])])

        return describe(a), describe(b), True

    def _spans(self, segments: Tensor, tile: int) -> Tensor:
        from longtrain.kernels.flash.common import spans_kernel

        batch, length = segments.shape
        tiles = self.count(length, tile)
        spans = torch.empty(batch, tiles, 3, dtype=torch.int32, device=segments.device)
        with _on(self.q):
            spans_kernel[(batch * tiles,)](segments, spans, segments.stride(), length, tiles, BLOCK=tile)
        return spans


def _on(x: Tensor) -> Any:
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


@cache
def _divisor(number: int, most: int) -> int:
    """The largest divisor up to `most` whose quotient a grid can have; the least such where all are larger."""
    divisors = [n for n in range(1, number + 1) if number % n == 0 and number // n <= GRID]
    return max((n for n in divisors if n <= most), default=divisors[0])


def _padded(width: int) -> int:
    return max(16, 1 << (width - 1).bit_length())


def _rows(x: Tensor) -> Tensor:
    """x with a contiguous last dimension, and with offsets inside a tile that fit 32 bits."""
    return x if x.stride(-1) == 1 and x.stride(1) < 2**22 else x.contiguous()


def _accumulator(x: Tensor) -> Tensor:
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        raise KernelError("attention kernel triton: an accumulator's last dimension is not contiguous")
    return x


def _describable(x: Tensor) -> bool:
    steps = [stride for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True) if size > 1]
    return x.data_ptr() % 16 == 0 and x.shape[-1] >= 8 and all(s > 0 and s % 8 == 0 for s in steps)


def _four(bias: Tensor) -> Tensor:
    return bias[(None,) * (4 - bias.ndim)]
