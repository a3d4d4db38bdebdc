"""Attention of this project beside torch's, in one run on one GPU: `python -m benchmarks.attention` from the repository root.

First a correctness gate: on a red one nothing is measured. Then a table of TFLOP/s, forward / backward, and a JSON file in
benchmarks/results. Rates count visible (query, key) pairs only: 4 D FLOP a pair and head forward, 10 D backward; what a mask wastes
in touched tiles is not counted. `--tune` measures candidates for longtrain/kernels/flash/tiles.py instead.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from longtrain.attention import AttentionMask, AttentionSpec, Band, Block
from longtrain.attention.merge import row_dot
from longtrain.kernels.flash import FlashKernel
from longtrain.kernels.flash.tiles import TABLE, Pass, Tile
from longtrain.kernels.local import LocalAttend
from tests.attention_cases import Case, check_kernel
from tests.parity import naive_attention

RESULTS = Path(__file__).parent / "results"
TILE = 128
flex = torch.compile(flex_attention, dynamic=False)


@dataclass(frozen=True)
class Problem:
    """documents: their lengths, of one packed row."""

    name: str
    length: int
    heads: int
    kv_heads: int
    dim: int
    band: Band
    documents: tuple[int, ...] = ()
    batch: int = 1
    peers: tuple[str, ...] = ("flash", "cudnn")

    @cached_property
    def mask(self) -> AttentionMask:
        if not self.documents:
            return AttentionMask(self.band)
        lengths = torch.tensor(self.documents, device="cuda")
        ids = torch.arange(len(self.documents), dtype=torch.int32, device="cuda").repeat_interleave(lengths)[None]
        return AttentionMask(self.band, ids, ids)

    def pairs(self, tile: int = 1) -> int:
        """Visible pairs of one head, or pairs in tiles that hold a visible one."""
        n = -(-self.length // tile)
        ends = [0]
        for length in self.documents or (self.length,):
            ends.append(ends[-1] + length)
        total = 0
        window = self.length if self.band.hi is None else self.band.hi + 1
        if tile == 1:
            for length in self.documents or (self.length,):
                w = min(window, length)
                total += length * length if self.band.lo is None else w * (w + 1) // 2 + (length - w) * w
            return total * self.batch
        seen = torch.zeros(n, n, dtype=torch.bool)
        i, j = torch.arange(n)[:, None] * tile, torch.arange(n)[None, :] * tile
        for start, end in pairwise(ends):
            q0, q1, k0, k1 = i.clamp(min=start), (i + tile).clamp(max=end), j.clamp(min=start), (j + tile).clamp(max=end)
            inside = (q0 < q1) & (k0 < k1)
            if self.band.lo is not None:
                inside &= q1 - 1 - k0 >= self.band.lo
            if self.band.hi is not None:
                inside &= q0 - (k1 - 1) <= self.band.hi
            seen |= inside
        return int(seen.sum()) * tile * tile * self.batch


def packed(mean: int, length: int = 2**15) -> tuple[int, ...]:
    draw = torch.Generator().manual_seed(mean)
    lengths: list[int] = []
    while (left := length - sum(lengths)) > 0:
        lengths.append(min(left, 1 + int(torch.empty(1).exponential_(1 / mean, generator=draw))))
    return tuple(lengths)


def problems(quick: bool) -> list[Problem]:
    every, causal, full = ("flash", "cudnn", "flex"), Band.causal(), Band.full()
    table = [
        Problem("naive 1K", 1024, 16, 16, 128, causal, batch=4, peers=("flash", "cudnn", "naive")),
        Problem("naive 4K", 4096, 16, 16, 128, causal, batch=2, peers=("flash", "cudnn", "naive")),
    ]
    for dim, heads in ((64, 32), (128, 16)):
        table.append(Problem(f"4K causal d{dim}", 4096, heads, heads, dim, causal, batch=4))
        table.append(Problem(f"16K causal d{dim}", 2**14, heads, heads, dim, causal, peers=every))
        table.append(Problem(f"16K full d{dim}", 2**14, heads, heads, dim, full, peers=every))
        table.append(
            Problem(f"32K causal GQA d{dim}", 2**15, 32, 8, dim, causal, peers=every if dim == 128 else ("flash", "cudnn"))
        )
        if not quick:
            table.append(Problem(f"128K causal d{dim}", 2**17, heads // 4, heads // 4, dim, causal))
    table.append(Problem("32K window 1024 d128", 2**15, 16, 16, 128, Band.causal(1024), peers=("flex",)))
    for mean in (8192, 2048, 512):
        table.append(Problem(f"32K packed {mean} d128", 2**15, 16, 16, 128, causal, packed(mean), peers=("flex",)))
    if not quick:
        table.append(Problem("16K causal d256", 2**14, 8, 8, 256, causal))
        table.append(Problem("16K causal d80", 2**14, 16, 16, 80, causal))
    return table


def naive(p: Problem, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return naive_attention(q, k, v, p.mask, AttentionSpec())[0]


def ours(p: Problem, q: Tensor, k: Tensor, v: Tensor, kernel: FlashKernel | None = None) -> Tensor:
    return LocalAttend(kernel or FlashKernel())(q, k, v, p.mask)


def sdpa(backend: SDPBackend, p: Problem, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(backend):
        out = scaled_dot_product_attention(q, k, v, is_causal=p.band.lo == 0, enable_gqa=p.heads != p.kv_heads)
    return out.transpose(1, 2)


def flexed(p: Problem, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if p.band.lo is not None and p not in MASKS:
        MASKS[p] = flex_mask(p)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return flex(q, k, v, block_mask=MASKS.get(p), enable_gqa=p.heads != p.kv_heads).transpose(1, 2)  # type: ignore[union-attr]


def flex_mask(p: Problem) -> Any:
    ids, hi = p.mask.q_segments, p.length if p.band.hi is None else p.band.hi

    def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen = (i >= j) if p.band.hi is None else (i >= j) & (i - j <= hi)
        return seen if ids is None else seen & (ids[0, i] == ids[0, j])

    return create_block_mask(sees, None, None, p.length, p.length, device="cuda")


MASKS: dict[Problem, Any] = {}
PEERS: dict[str, Callable[..., Tensor]] = {
    "flash": partial(sdpa, SDPBackend.FLASH_ATTENTION),
    "cudnn": partial(sdpa, SDPBackend.CUDNN_ATTENTION),
    "flex": flexed,
    "naive": naive,
}


def milliseconds(run: Callable[[], Any], budget: float = 250.0) -> float:
    """Median over about `budget` ms of runs, after a warm-up."""
    run()
    times: list[float] = []
    while len(times) < 5 or (sum(times) < budget and len(times) < 50):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[len(times) // 5 :])


def measure(p: Problem, attention: Callable[..., Tensor]) -> dict[str, Any]:
    """TFLOP/s, milliseconds and the memory that forward and backward take beside their inputs; or why there is no figure."""
    q = torch.randn(p.batch, p.length, p.heads, p.dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    k, v = (
        torch.randn(p.batch, p.length, p.kv_heads, p.dim, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(2)
    )
    flop = 4 * p.pairs() * p.heads * p.dim
    try:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = attention(p, q, k, v)
        dout = torch.randn_like(out)
        torch.autograd.grad(out, (q, k, v), dout)
        memory = torch.cuda.max_memory_allocated() - before
        with torch.no_grad():
            forward = milliseconds(lambda: attention(p, q, k, v))
        out = attention(p, q, k, v)
        backward = milliseconds(lambda: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True))
    except Exception as error:  # a peer that cannot do this is a line of the table
        torch.cuda.empty_cache()
        return {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"}
    return {
        "forward_ms": forward,
        "backward_ms": backward,
        "forward": flop / forward / 1e9,
        "backward": 2.5 * flop / backward / 1e9,
        "memory_mib": memory / 2**20,
    }


def gate() -> None:
    for dim in (64, 128):
        for case in (
            Case(Band.causal(), 1111, None, 1, 4, 2, dim),
            Case(Band.full(), 1024, None, 1, 2, 2, dim),
            Case(Band.causal(300), 1500, None, 1, 2, 2, dim, q_documents=((700, 1, 799),)),
        ):
            check_kernel(FlashKernel(), case, torch.bfloat16, "cuda")
    print("correctness gate: green")


def compare(quick: bool) -> None:
    gate()
    rows = []
    print(f"{'TFLOP/s forward / backward (MiB)':34}" + "".join(f"{name:>24}" for name in ("ours", *PEERS)), flush=True)
    for p in problems(quick):
        found = {"ours": measure(p, ours)} | {name: measure(p, PEERS[name]) for name in p.peers}
        touched = p.pairs(TILE) / p.pairs()
        cells = []
        for name in ("ours", *PEERS):
            r = found.get(name, {})
            cells.append(
                f"{r['forward']:.0f} / {r['backward']:.0f} ({r['memory_mib']:.0f})" if "forward" in r else r.get("error", "")[:20]
            )
        print(f"{p.name:28}{f'x{touched:.2f}':6}" + "".join(f"{cell:>24}" for cell in cells), flush=True)
        rows.append({"problem": asdict(p), "touched": touched, "results": found})
    device = torch.cuda.get_device_name()
    versions = {"torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda}
    path = RESULTS / f"attention-{device.lower().replace(' ', '-')}.json"
    path.write_text(json.dumps({"device": device, "versions": versions, "rows": rows}, indent=1) + "\n")
    print(f"xN: pairs in touched tiles of {TILE} x {TILE} a visible pair; wrote {path}")


CANDIDATES: dict[tuple[Pass, int], list[tuple[int, int, int, int]]] = {
    (Pass.FORWARD, 64): [(128, 128, 8, 3), (128, 128, 8, 2), (128, 64, 8, 3), (256, 64, 8, 2), (128, 64, 4, 3), (64, 128, 4, 3)],
    (Pass.QUERIES, 64): [(128, 128, 8, 2), (128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 4, 2)],
    (Pass.KEYS, 64): [(64, 128, 8, 2), (64, 128, 8, 3), (64, 64, 4, 2), (64, 64, 4, 3), (128, 128, 8, 2), (32, 128, 8, 3)],
    (Pass.FORWARD, 128): [(128, 128, 8, 2), (128, 64, 8, 2), (128, 64, 8, 3), (64, 64, 4, 3), (64, 64, 4, 2), (64, 128, 4, 2)],
    (Pass.QUERIES, 128): [(128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 2), (64, 128, 8, 2), (128, 32, 8, 3)],
    (Pass.KEYS, 128): [(64, 64, 4, 2), (64, 128, 8, 2), (32, 128, 8, 2), (32, 64, 4, 2), (32, 128, 8, 3), (64, 128, 8, 3)],
}


def tune(length: int = 2**14) -> None:
    """Causal, 2048 / D heads: each kernel alone, TFLOP/s of the products that it computes (2 forward, 3 dq, 4 dk and dv)."""
    for (kernel, dim), candidates in CANDIDATES.items():
        p = Problem("", length, 2048 // dim, 2048 // dim, dim, Band.causal())
        q, k, v, dout = (torch.randn(1, length, p.heads, dim, device="cuda", dtype=torch.bfloat16) for _ in range(4))
        block, spec = Block(p.band), AttentionSpec()
        out, lse = FlashKernel().forward(q, k, v, block, spec)
        delta = row_dot(dout, out)
        lines = []
        for candidate in candidates:
            flash = FlashKernel(tiles=TABLE | {(kernel, dim, 2): Tile(*candidate)})
            run = partial(flash.forward, q, k, v, block, spec)
            if kernel is not Pass.FORWARD:
                run = partial(flash.backward, dout, q, k, v, lse, delta, block, spec)
            try:
                time = milliseconds(run) if kernel is Pass.FORWARD else kernel_milliseconds(run, kernel)
            except Exception as error:
                lines.append((0.0, candidate, f"{type(error).__name__} {str(error)[:60]}"))
                continue
            products = {Pass.FORWARD: 2, Pass.QUERIES: 3, Pass.KEYS: 4}[kernel]
            lines.append((products * 2 * p.pairs() * p.heads * dim / time / 1e9, candidate, f"{time:.2f} ms"))
        for rate, candidate, text in sorted(lines, reverse=True):
            print(f"{kernel:8} d{dim:<4} {candidate!s:20} {rate:6.0f} TFLOP/s  {text}", flush=True)


def kernel_milliseconds(run: Callable[[], Any], kernel: Pass) -> float:
    """Time of one of the backward's kernels, from the profiler."""
    name = {Pass.QUERIES: "queries_kernel", Pass.KEYS: "keys_kernel"}[kernel]
    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(8):
            run()
        torch.cuda.synchronize()
    times = [event.device_time for event in profile.events() if event.name == name]
    return statistics.median(times) / 1e3


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--quick", action="store_true", help="leave out the longest and the odd ones")
    arguments.add_argument("--tune", action="store_true", help="measure candidates for the table of tiles")
    given = arguments.parse_args()
    tune() if given.tune else compare(given.quick)
