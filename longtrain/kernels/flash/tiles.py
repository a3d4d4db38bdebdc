"""Tile sizes: a table, so that nothing is tuned while a run starts. `benchmarks/attention.py --tune` measures the candidates."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Pass(StrEnum):
    """The kernels: out; dq; dk and dv; dbias where it has both rows and columns."""

    FORWARD = "forward"
    QUERIES = "dq"
    KEYS = "dk, dv"
    BIAS = "dbias"


@dataclass(frozen=True)
class Tile:
    """rows: queries, columns: keys of a tile; warps a program; stages: depth of the load pipeline."""

    rows: int
    columns: int
    warps: int = 4
    stages: int = 2


Tiles = dict[tuple[Pass, int, int], Tile]
"""(kernel, head width padded to a power of two, bytes an element) -> tile."""

TABLE: Tiles = {
    (Pass.FORWARD, 64, 2): Tile(128, 128, 8, 3),
    (Pass.FORWARD, 128, 2): Tile(128, 128, 8, 2),
    (Pass.FORWARD, 256, 2): Tile(128, 64, 8, 2),
    (Pass.QUERIES, 64, 2): Tile(128, 128, 8, 2),
    (Pass.QUERIES, 128, 2): Tile(128, 64, 8, 2),
    (Pass.QUERIES, 256, 2): Tile(64, 32, 8, 2),
    (Pass.KEYS, 64, 2): Tile(64, 128, 8, 2),
    (Pass.KEYS, 128, 2): Tile(64, 64, 4, 2),
    (Pass.KEYS, 256, 2): Tile(32, 64, 8, 2),
    (Pass.BIAS, 256, 2): Tile(64, 64, 8, 1),
}
# fp32 products in IEEE precision run on the ordinary cores, from registers
WIDE = {64: Tile(32, 32, 4, 2), 128: Tile(32, 32, 8, 2), 256: Tile(16, 16, 4, 1)}
TABLE |= {(kernel, width, 4): tile for kernel in Pass for width, tile in WIDE.items()}


def tile_for(kernel: Pass, width: int, itemsize: int, tiles: Tiles = TABLE) -> Tile:
    """The tile of the next larger width in the table."""
    return tiles[kernel, min(w for k, w, size in tiles if k is kernel and size == itemsize and w >= width), itemsize]
