"""Attention of this project beside torch's, in one run on one GPU: `python -m benchmarks.attention` from the repository root, after
`pip install -e '.[dev]'`.

First a correctness gate, every problem of the table in small: on a red one nothing is measured. Then a table of TFLOP/s, forward /
backward, everyone in turns, what falls short of benchmarks/targets.py, and of a whole run a JSON file and a plot in
benchmarks/results. Rates count visible (query, key) pairs only: 4 D FLOP a pair and head forward, 10 D backward; what a mask wastes
in touched tiles is not counted. `--tune` measures candidates for longtrain/kernels/flash/tiles.py instead.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import targets
from benchmarks.gate import Case, check_kernel
from benchmarks.plots import attention_plot
from benchmarks.refusals import need_gpu
from benchmarks.timing import ROUNDS, compile_anew, in_turns
from benchmarks.tune_attention import tune
from longtrain.attention import AttentionKernel, AttentionMask, Band
from longtrain.kernels.flash import FlashKernel
from longtrain.kernels.flash.tiles import Pass, tile_for
from longtrain.kernels.language import triton
from longtrain.kernels.local import LocalAttend

RESULTS = Path(__file__).parent / "results"
DEVICE = "cuda"
SMALL = 1104
"""Tokens of a problem in small: with a rest in every tile, and divisible by 16 as the table's lengths are (others are compiled
apart)."""
HEAT = {"forward": 2000.0, "backward": 500.0}
"""Milliseconds of work before a row is measured: rows are compared with each other, and an H100 that comes from rest starts 10% to
15% above what it keeps up at its limit of power. Backward follows forward at once."""
Attention = Callable[["Problem", Tensor, Tensor, Tensor], Tensor]

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
        lengths = torch.tensor(self.documents, device=DEVICE)
        ids = torch.arange(len(self.documents), dtype=torch.int32, device=DEVICE).repeat_interleave(lengths)[None]
        return AttentionMask(self.band, ids, ids, (self.ends,))

    @cached_property
    def bias(self) -> Tensor:
        """[T, T]: what masking adds to scores in plain torch, where there are no documents."""
        distance = torch.arange(self.length, device=DEVICE)[:, None] - torch.arange(self.length, device=DEVICE)
        lo, hi = (-self.length if self.band.lo is None else self.band.lo), (self.length if self.band.hi is None else self.band.hi)
        return torch.zeros_like(distance, dtype=torch.bfloat16).masked_fill_((distance < lo) | (distance > hi), -torch.inf)

    def small(self) -> Case:
        """The same kind of problem, for plain attention to check."""
        band = self.band if self.band.hi is None else Band.causal(300)
        documents = ((600, 1, SMALL - 601),) if self.documents else None
        return Case(band, SMALL, None, 1, self.heads, self.kv_heads, self.dim, q_documents=documents)

    @cached_property
    def ends(self) -> tuple[int, ...]:
        return tuple(accumulate(self.documents or (self.length,), initial=0))

    def pairs(self) -> int:
        """Visible pairs of one head, of all rows."""
        return self.batch * sum(self.band.pairs(length, length) for length in self.documents or (self.length,))

    def touched(self) -> float:
        """Pairs in the forward's tiles that hold a visible pair, a visible pair."""
        short = self.documents or self.band.hi is not None
        tile = tile_for(Pass.SHORT if short else Pass.FORWARD, self.dim, 2)
        i, j = torch.arange(0, self.length, tile.rows)[:, None], torch.arange(0, self.length, tile.columns)[None, :]
        seen = torch.zeros(len(i), j.shape[1], dtype=torch.bool)
        for start, end in pairwise(self.ends):
            q0, q1 = i.clamp(min=start), (i + tile.rows).clamp(max=end)
            k0, k1 = j.clamp(min=start), (j + tile.columns).clamp(max=end)
            inside = (q0 < q1) & (k0 < k1)
            if self.band.lo is not None:
                inside &= q1 - 1 - k0 >= self.band.lo
            if self.band.hi is not None:
                inside &= q0 - (k1 - 1) <= self.band.hi
            seen |= inside
        return int(seen.sum()) * tile.rows * tile.columns * self.batch / self.pairs()


def packed(mean: int, length: int = 2**15) -> tuple[int, ...]:
    draw = torch.Generator().manual_seed(mean)
    lengths: list[int] = []
    while (left := length - sum(lengths)) > 0:
        lengths.append(min(left, 1 + int(torch.empty(1).exponential_(1 / mean, generator=draw))))
    return tuple(lengths)


def problems(quick: bool) -> list[Problem]:
    every, masked, causal, full = ("flash", "cudnn", "flex"), ("varlen", "flex"), Band.causal(), Band.full()
    table = [
        Problem("naive 1K", 1024, 16, 16, 128, causal, batch=4, peers=("flash", "cudnn", "naive")),
        Problem("naive 4K", 4096, 16, 16, 128, causal, batch=2, peers=("flash", "cudnn", "naive")),
    ]
    for dim, heads in ((64, 32), (128, 16)):
        table.append(Problem(f"4K causal d{dim}", 4096, heads, heads, dim, causal, batch=4, peers=every))
        table.append(Problem(f"16K causal d{dim}", 2**14, heads, heads, dim, causal, peers=every))
        table.append(Problem(f"16K full d{dim}", 2**14, heads, heads, dim, full, peers=every))
        table.append(Problem(f"32K causal GQA d{dim}", 2**15, 32, 8, dim, causal, peers=every))
        if not quick:
            table.append(Problem(f"128K causal d{dim}", 2**17, heads // 4, heads // 4, dim, causal, peers=every))
            table.append(Problem(f"128K causal GQA d{dim}", 2**17, 8, 2, dim, causal))
    table.append(Problem("32K window 1024 d128", 2**15, 16, 16, 128, Band.causal(1024), peers=masked))
    for mean in (8192, 2048, 512):
        table.append(Problem(f"32K packed {mean} d128", 2**15, 16, 16, 128, causal, packed(mean), peers=masked))
    if not quick:
        table.append(Problem("16K causal d256", 2**14, 8, 8, 256, causal))
        table.append(Problem("16K causal d80", 2**14, 16, 16, 80, causal))
    return table


def naive(p: Problem, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As people write it: the mask is made once, for all layers."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = (q @ k.transpose(-2, -1)) * p.dim**-0.5 + p.bias
    return (torch.softmax(scores, -1) @ v).transpose(1, 2)


def ours(p: Problem, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ATTEND(q, k, v, p.mask)


def sdpa(backend: SDPBackend, p: Problem, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(backend):
        out = scaled_dot_product_attention(q, k, v, is_causal=p.band.lo == 0, enable_gqa=p.heads != p.kv_heads)
    return out.transpose(1, 2)


def varlen(p: Problem, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """FlashAttention-2 over documents or under a window."""
    from torch.nn.attention.varlen import varlen_attn

    ends = torch.tensor(p.ends, dtype=torch.int32, device=DEVICE)
    longest = max(p.documents or (p.length,))
    window = (-1 if p.band.hi is None else p.band.hi, 0)
    return varlen_attn(q[0], k[0], v[0], ends, ends, longest, longest, window_size=window)[None]  # type: ignore[index]


def flexed(p: Problem, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    kind = (p.length, p.band, p.documents)
    if p.band.lo is not None and kind not in MASKS:
        MASKS[kind] = flex_mask(p)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return flex(q, k, v, block_mask=MASKS.get(kind), enable_gqa=p.heads != p.kv_heads).transpose(1, 2)  # type: ignore[union-attr]


def flex_mask(p: Problem) -> Any:
    ids, hi = p.mask.q_segments, p.length if p.band.hi is None else p.band.hi

    def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen = (i >= j) if p.band.hi is None else (i >= j) & (i - j <= hi)
        return seen if ids is None else seen & (ids[0, i] == ids[0, j])

    # as it is, it sums [T, T] decisions as int64: 128 GiB at 128K tokens
    create = torch.compile(create_block_mask) if p.length > 2**15 else create_block_mask
    return create(sees, None, None, p.length, p.length, device=DEVICE)


ATTEND = LocalAttend(FlashKernel())
MASKS: dict[tuple[int, Band, tuple[int, ...]], Any] = {}
PEERS: dict[str, Attention] = {
    "flash": partial(sdpa, SDPBackend.FLASH_ATTENTION),
    "cudnn": partial(sdpa, SDPBackend.CUDNN_ATTENTION),
    "flex": flexed,
    "varlen": varlen,
    "naive": naive,
}


def measure(p: Problem, ways: dict[str, Attention]) -> dict[str, dict[str, Any]]:
    """TFLOP/s, milliseconds, and the memory that forward and backward take beside q, k, v, of every way; or why there are none."""
    q = torch.randn(p.batch, p.length, p.heads, p.dim, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    k, v = (
        torch.randn(p.batch, p.length, p.kv_heads, p.dim, device=DEVICE, dtype=torch.bfloat16, requires_grad=True) for _ in range(2)
    )
    found: dict[str, dict[str, Any]] = {}
    forwards: dict[str, Callable[[], Any]] = {}
    backwards: dict[str, Callable[[], Any]] = {}
    for name, attention in ways.items():
        try:
            found[name] = {"memory_mib": memory(p, attention, q, k, v) / 2**20}
            out = attention(p, q, k, v)
        except Exception as error:  # a peer that cannot do this is a line of the table
            if attention is ours:
                raise
            found[name] = {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"}
            torch.cuda.empty_cache()
            continue
        forwards[name] = torch.no_grad()(partial(attention, p, q, k, v))
        backwards[name] = partial(torch.autograd.grad, out, (q, k, v), torch.randn_like(out), retain_graph=True)
    flop = 4 * p.pairs() * p.heads * p.dim
    for direction, runs, work in (("forward", forwards, flop), ("backward", backwards, 2.5 * flop)):
        for name, time in in_turns(runs, heat=HEAT[direction]).items():
            found[name] |= {f"{direction}_ms": time, direction: work / time / 1e9}
    return found


def memory(p: Problem, attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> int:
    """Bytes, of the second run: what the first one makes for good is not among them."""
    before = 0
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = attention(p, q, k, v)
        torch.autograd.grad(out, (q, k, v), torch.randn_like(out))
        del out
    return torch.cuda.max_memory_allocated() - before


def gate(table: Sequence[Problem], kernel: AttentionKernel) -> None:
    """Every kind of problem that is measured, in small: outputs and gradients by the rule of the tests."""
    for case in dict.fromkeys(p.small() for p in table):
        check_kernel(kernel, case, torch.bfloat16, DEVICE)
    print("correctness gate: green")


def cell(result: dict[str, Any]) -> str:
    if "forward" not in result:
        return result.get("error", "")[:22]
    return f"{result['forward']:.0f} / {result['backward']:.0f} ({result['memory_mib']:.0f})"


def compare(table: Sequence[Problem], whole: bool) -> None:
    gate(table, FlashKernel())
    rows: list[dict[str, Any]] = []
    print(f"{'TFLOP/s forward / backward (MiB)':34}" + "".join(f"{name:>22}" for name in ("ours", *PEERS)), flush=True)
    for p in table:
        found = measure(p, {"ours": ours} | {name: PEERS[name] for name in p.peers})
        cells = "".join(f"{cell(found.get(name, {})):>22}" for name in ("ours", *PEERS))
        touched = p.touched()
        print(f"{p.name:28}{f'x{touched:.2f}':6}" + cells, flush=True)
        rows.append({"problem": asdict(p), "touched": touched, "results": found})
    print("xN: pairs in touched tiles a visible pair; " + (write(rows) if whole else "part of a run: no file"))
    short = [f"{target}: {', '.join(names)}" for target, names in targets.attention(rows).items()]
    print("\n".join(["short of the targets:", *short]) if short else "none of these rows misses a target of benchmarks/targets.py")


def write(rows: list[dict[str, Any]]) -> str:
    """The files of a whole run; says where they are."""
    device = torch.cuda.get_device_name()
    versions = {"torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda}
    path = RESULTS / f"attention-{device.lower().replace(' ', '-')}.json"
    command = " ".join(["python -m benchmarks.attention", *sys.argv[1:]])
    found = {"device": device, "versions": versions, "command": command, "rounds": ROUNDS, "heat_ms": HEAT, "rows": rows}
    path.write_text(json.dumps(found, indent=1) + "\n")
    return f"wrote {path} and {attention_plot(path)}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="leave out the longest and the odd ones; writes no file")
    parser.add_argument("--only", default="", help="problems whose name holds this text; writes no file")
    parser.add_argument("--tune", action="store_true", help="measure candidates for the table of tiles")
    given = parser.parse_args(arguments)
    need_gpu()
    compile_anew()
    chosen = [p for p in problems(given.quick) if given.only in p.name]
    tune() if given.tune else compare(chosen, not given.quick and not given.only)


if __name__ == "__main__":
    main()
