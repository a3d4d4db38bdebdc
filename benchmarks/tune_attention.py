"""Candidates for longtrain/kernels/flash/tiles.py, measured: each kernel alone, over a few shapes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

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
    """Prints TFLOP/s of the products that each kernel computes; candidates are compiled by many processes first."""
    jobs = [subprocess.Popen([sys.executable, "-m", "benchmarks.tune_attention", str(i), str(PROCESSES)]) for i in range(PROCESSES)]
    for job in jobs:
        job.wait()
    for (kernel, dim), candidates in CANDIDATES.items():
        problems = [(shape, _tensors(shape, dim)) for shape in shapes(kernel, dim)]
        print(f"{f'{kernel} d{dim}':48}" + "".join(f"{shape.name:>16}" for shape, _ in problems), flush=True)
        for tile in candidates:
            rates = [_rate(kernel, dim, tile, shape, tensors) for shape, tensors in problems]
            print(f"  {tile!s:46}" + "".join(f"{rate:16.0f}" for rate in rates), flush=True)


def _tensors(shape: Shape, dim: int) -> tuple[Tensor, ...]:
    q, dout = (torch.randn(1, shape.length, shape.heads, dim, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    k, v = (torch.randn(1, shape.length, shape.kv_heads, dim, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out, lse = FlashKernel().forward(q, k, v, Block(shape.band), AttentionSpec())
    return dout, q, k, v, lse, row_dot(dout, out)


def _run(kernel: Pass, dim: int, tile: Tile, shape: Shape, tensors: tuple[Tensor, ...]) -> Callable[[], Any]:
    dout, q, k, v, lse, delta = tensors
    flash, block = FlashKernel(tiles=TABLE | {(kernel, dim, 2): tile}), Block(shape.band)
    if kernel in (Pass.FORWARD, Pass.SHORT):
        return partial(flash.forward, q, k, v, block, AttentionSpec())
    rows, grads = (dout, *padded_rows(lse, delta)), Grads(*(torch.empty_like(x) for x in (q, k, v)))
    call = Call(flash, q, k, v, block, AttentionSpec())
    return partial(run_queries if kernel is Pass.QUERIES else run_keys, call, rows, grads)


def _rate(kernel: Pass, dim: int, tile: Tile, shape: Shape, tensors: tuple[Tensor, ...]) -> float:
    pairs = shape.band.pairs(shape.length, shape.length)
    try:
        time = milliseconds(_run(kernel, dim, tile, shape, tensors))
    except Exception as error:  # too much shared memory, mostly
        print(f"  {tile}: {type(error).__name__}: {str(error)[:80]}")
        return 0.0
    return PRODUCTS[kernel] * 2 * pairs * shape.heads * dim / time / 1e9


def _compile(part: int, parts: int) -> None:
    jobs = [
        (kernel, dim, tile, shape) for (kernel, dim), tiles in CANDIDATES.items() for tile in tiles for shape in shapes(kernel, dim)
    ]
    for kernel, dim, tile, shape in jobs[part::parts]:
        short = shape._replace(length=512)
        try:
            _run(kernel, dim, tile, short, _tensors(short, dim))()
        except Exception:  # told when it is measured
            continue
    torch.cuda.synchronize()


if __name__ == "__main__":
    _compile(int(sys.argv[1]), int(sys.argv[2]))
