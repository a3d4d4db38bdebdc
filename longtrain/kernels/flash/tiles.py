"""Tile sizes: tables, so that nothing is tuned while a run starts. `python -m benchmarks.attention --tune` measures candidates."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Pass(StrEnum):
    """The kernels: out, also of queries that see a document or a window; dq; dk and dv; dbias where it has rows and columns."""

    FORWARD = "forward"
    SHORT = "forward, short"
    QUERIES = "dq"
    KEYS = "dk, dv"
    BIAS = "dbias"


@dataclass(frozen=True)
class Tile:
    """rows: queries, columns: keys of a tile; warps a program; stages: depth of the load pipeline; registers: most a thread, 0 is
    as many as the compiler likes. Two programs that fit one multiprocessor compute each other's products and exponentials at the
    same time: 128 registers at 8 warps, 255 at 4."""

    rows: int
    columns: int
    warps: int = 4
    stages: int = 2
    registers: int = 0


GRID = 65535
"""Largest second and third dimension of a grid in CUDA."""

Tiles = dict[tuple[Pass, int, int], Tile]
"""(kernel, head width padded to a power of two, bytes an element) -> tile."""

# fp32 products in IEEE precision run on the ordinary cores, from registers
WIDE: Tiles = {(kernel, 64, 4): Tile(32, 32, 4, 2) for kernel in Pass}
WIDE |= {(kernel, 128, 4): Tile(32, 32, 8, 2) for kernel in Pass}
WIDE |= {(kernel, 256, 4): Tile(16, 16, 4, 1) for kernel in Pass}

TABLE: Tiles = WIDE | {
    (Pass.FORWARD, 64, 2): Tile(64, 128, 4, 2),
    (Pass.FORWARD, 128, 2): Tile(128, 64, 4, 2),
    (Pass.FORWARD, 256, 2): Tile(128, 64, 8, 2),
    (Pass.SHORT, 64, 2): Tile(64, 128, 4, 2),
    (Pass.SHORT, 128, 2): Tile(64, 64, 4, 3),
    (Pass.SHORT, 256, 2): Tile(128, 64, 8, 2),
    (Pass.QUERIES, 64, 2): Tile(128, 64, 8, 3, 128),
    (Pass.QUERIES, 128, 2): Tile(64, 64, 4, 2),
    (Pass.QUERIES, 256, 2): Tile(64, 32, 4, 2),
    (Pass.KEYS, 64, 2): Tile(128, 64, 4, 2),
    (Pass.KEYS, 128, 2): Tile(64, 64, 4, 2),
    (Pass.KEYS, 256, 2): Tile(64, 64, 8, 2),
    (Pass.BIAS, 256, 2): Tile(64, 64, 8, 1),
}
"""For GPUs with SHARED bytes; measured on an H100 (`python -m benchmarks.attention --tune`). At widths of 64 and 128 two programs
and more share a multiprocessor; one program of 8 warps with larger tiles is 20% slower there. Tiles of 64 rows waste less where a
document or a window begins and ends; over long rows the L2 cache bounds them."""

COMPACT: Tiles = WIDE | {
    (Pass.FORWARD, 64, 2): Tile(128, 64, 4, 2),
    (Pass.FORWARD, 128, 2): Tile(128, 32, 4, 2),
    (Pass.FORWARD, 256, 2): Tile(64, 32, 4, 1),
    (Pass.SHORT, 64, 2): Tile(64, 64, 4, 2),
    (Pass.SHORT, 128, 2): Tile(64, 32, 4, 2),
    (Pass.SHORT, 256, 2): Tile(64, 32, 4, 1),
    (Pass.QUERIES, 64, 2): Tile(64, 64, 4, 2),
    (Pass.QUERIES, 128, 2): Tile(64, 32, 4, 2),
    (Pass.QUERIES, 256, 2): Tile(32, 32, 4, 1),
    (Pass.KEYS, 64, 2): Tile(64, 64, 4, 2),
    (Pass.KEYS, 128, 2): Tile(32, 64, 4, 2),
    (Pass.KEYS, 256, 2): Tile(32, 32, 4, 1),
    (Pass.BIAS, 256, 2): Tile(32, 32, 4, 1),
}
"""All others: chosen to fit 99 KiB of shared memory (compute capabilities 8.6, 8.9 and 12.0), never measured for speed."""

SHARED = 227 << 10
"""Bytes of shared memory that a program may have on compute capabilities 9.0 and 10; 8.0 has 163 KiB."""


def tiles_for(shared: int) -> Tiles:
    """The table of a GPU whose programs may have `shared` bytes of shared memory."""
    return TABLE if shared >= SHARED else COMPACT


def tile_for(kernel: Pass, width: int, itemsize: int, tiles: Tiles = TABLE) -> Tile:
    """The tile of the next larger width in the table."""
    return tiles[kernel, min(w for k, w, size in tiles if k is kernel and size == itemsize and w >= width), itemsize]


def longest(width: int, itemsize: int, tiles: Tiles = TABLE) -> int:
    """Tokens of a block: tiles of queries, and of keys for dk and dv, are a dimension of a grid."""
    rows = [tile_for(kernel, width, itemsize, tiles).rows for kernel in (Pass.FORWARD, Pass.SHORT, Pass.QUERIES)]
    return GRID * min(*rows, tile_for(Pass.KEYS, width, itemsize, tiles).columns)
