"""Candidates for longtrain/kernels/flash/tiles.py, checked and measured: each kernel alone, over a few shapes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.gate import Case, check_kernel
from benchmarks.refusals import need_gpu
from benchmarks.timing import milliseconds
from longtrain.attention import AttentionSpec, Band, Block, Grads
from longtrain.attention.merge import row_dot
from longtrain.kernels.flash import FlashKernel
from longtrain.kernels.flash.kernel import Call, padded_rows, run_keys, run_queries
from longtrain.kernels.flash.tiles import TABLE, Pass, Tile

PROCESSES = 12
"""Compile while nothing is measured."""

PRODUCTS = {Pass.FORWARD: 2, Pass.SHORT: 2, Pass.QUERIES: 3, Pass.KEYS: 4}

CANDIDATES: dict[tuple[Pass, int], tuple[Tile, ...]] = {
    (Pass.FORWARD, 64): (Tile(64, 128, 4, 2), Tile(128, 128, 8, 2, 128), Tile(64, 64, 4, 3), Tile(128, 64, 4, 3)),
    (Pass.FORWARD, 128): (Tile(128, 64, 4, 2), Tile(128, 64, 8, 2, 128), Tile(64, 64, 4, 3), Tile(64, 64, 4, 2)),
    (Pass.FORWARD, 256): (Tile(128, 64, 8, 2), Tile(128, 32, 8, 2), Tile(64, 32, 4, 2), Tile(64, 64, 8, 2)),
    (Pass.SHORT, 64): (Tile(64, 128, 4, 2), Tile(64, 64, 4, 3), Tile(64, 64, 4, 2)),
    (Pass.SHORT, 128): (Tile(64, 64, 4, 3), Tile(64, 64, 4, 2), Tile(128, 64, 4, 2), Tile(128, 64, 8, 2, 128)),
    (Pass.QUERIES, 64): (Tile(64, 64, 4, 2), Tile(64, 64, 4, 3, 128), Tile(64, 128, 4, 2), Tile(128, 64, 8, 3, 128)),
    (Pass.QUERIES, 128): (Tile(64, 64, 4, 2), Tile(128, 128, 8, 2), Tile(64, 32, 4, 2, 168), Tile(64, 64, 4, 1, 168)),
    (Pass.QUERIES, 256): (Tile(64, 32, 8, 2), Tile(64, 64, 8, 2), Tile(64, 32, 4, 2)),
    (Pass.KEYS, 64): (Tile(128, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 3, 168), Tile(64, 128, 8, 2)),
    (Pass.KEYS, 128): (Tile(64, 64, 4, 2), Tile(64, 128, 8, 3), Tile(32, 64, 4, 2), Tile(32, 64, 4, 3)),
    (Pass.KEYS, 256): (Tile(32, 64, 8, 2), Tile(16, 64, 8, 2), Tile(64, 64, 8, 2), Tile(32, 64, 8, 1)),
}


class Shape(NamedTuple):
    name: str
    length: int
    heads: int
    kv_heads: int
    band: Band


def shapes(kernel: Pass, dim: int) -> tuple[Shape, ...]:
    heads = 2048 // dim
    if kernel is Pass.SHORT:
        return tuple(Shape(f"32K window {window}", 2**15, heads, heads, Band.causal(window)) for window in (256, 1024, 4096))
    return (
        Shape("16K causal", 2**14, heads, heads, Band.causal()),
        Shape("16K full", 2**14, heads, heads, Band.full()),
        Shape("32K causal GQA", 2**15, 4096 // dim, 1024 // dim, Band.causal()),
    )


def tune() -> None:
    """Prints TFLOP/s of the products that each kernel computes, or why there are none: a candidate with wrong results is not
    measured. Candidates are compiled by many processes first."""
    jobs = [subprocess.Popen([sys.executable, "-m", "benchmarks.tune_attention", str(i), str(PROCESSES)]) for i in range(PROCESSES)]
    for job in jobs:
        job.wait()
    for (kernel, dim), candidates in CANDIDATES.items():
        problems = [(shape, _tensors(shape, dim)) for shape in shapes(kernel, dim)]
        print(f"{f'{kernel} d{dim}':48}" + "".join(f"{shape.name:>16}" for shape, _ in problems), flush=True)
        for tile in candidates:
            try:
                _check(kernel, dim, tile)
                line = "".join(f"{_rate(kernel, dim, tile, *problem):16.0f}" for problem in problems)
            except Exception as error:  # wrong results, or too much shared memory
                line = f"  left out: {type(error).__name__}: {str(error)[:80]}"
            print(f"  {tile!s:46}{line}", flush=True)


def _check(kernel: Pass, dim: int, tile: Tile) -> None:
    """Forward and backward with this tile against plain attention, in small on what is measured."""
    for shape in shapes(kernel, dim):
        band = Band.causal(300) if kernel is Pass.SHORT else shape.band
        case = Case(band, 1111, None, 1, 4, 4 * shape.kv_heads // shape.heads, dim)
        check_kernel(_flash(kernel, dim, tile), case, torch.bfloat16, "cuda")


def _flash(kernel: Pass, dim: int, tile: Tile) -> FlashKernel:
    return FlashKernel(tiles=TABLE | {(kernel, dim, 2): tile})


def _tensors(shape: Shape, dim: int) -> tuple[Tensor, ...]:
    q, dout = (torch.randn(1, shape.length, shape.heads, dim, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    k, v = (torch.randn(1, shape.length, shape.kv_heads, dim, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out, lse = FlashKernel().forward(q, k, v, Block(shape.band), AttentionSpec())
    return dout, q, k, v, lse, row_dot(dout, out)


def _run(kernel: Pass, dim: int, tile: Tile, shape: Shape, tensors: tuple[Tensor, ...]) -> Callable[[], Any]:
    dout, q, k, v, lse, delta = tensors
    flash, block = _flash(kernel, dim, tile), Block(shape.band)
    if kernel in (Pass.FORWARD, Pass.SHORT):
        return partial(flash.forward, q, k, v, block, AttentionSpec())
    rows, grads = (dout, *padded_rows(lse, delta)), Grads(*(torch.empty_like(x) for x in (q, k, v)))
    call = Call(flash, q, k, v, block, AttentionSpec())
    return partial(run_queries if kernel is Pass.QUERIES else run_keys, call, rows, grads)


def _rate(kernel: Pass, dim: int, tile: Tile, shape: Shape, tensors: tuple[Tensor, ...]) -> float:
    pairs, time = shape.band.pairs(shape.length, shape.length), milliseconds(_run(kernel, dim, tile, shape, tensors))
    return PRODUCTS[kernel] * 2 * pairs * shape.heads * dim / time / 1e9


def _compile(part: int, parts: int) -> None:
    jobs = [(kernel, dim, tile) for (kernel, dim), tiles in CANDIDATES.items() for tile in tiles]
    for kernel, dim, tile in jobs[part::parts]:
        try:
            _check(kernel, dim, tile)
            for shape in shapes(kernel, dim):
                short = shape._replace(length=512)
                _run(kernel, dim, tile, short, _tensors(short, dim))()
        except Exception:  # told when it is measured
            continue
    torch.cuda.synchronize()


if __name__ == "__main__":
    need_gpu()
    _compile(int(sys.argv[1]), int(sys.argv[2]))
