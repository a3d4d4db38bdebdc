"""Attention of this project beside torch's, in one run on one GPU: `python -m benchmarks.attention` from the repository root, after
`pip install -e '.[dev]'`.

First a correctness gate: on a red one nothing is measured. Then a table of TFLOP/s, forward / backward, and of a whole run a JSON
file and a plot in benchmarks/results. Rates count visible (query, key) pairs only: 4 D FLOP a pair and head forward, 10 D backward;
what a mask wastes in touched tiles is not counted. `--tune` measures candidates for longtrain/kernels/flash/tiles.py instead.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config as functorch_config
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.gate import Case, check_kernel
from benchmarks.plots import attention_plot
from benchmarks.timing import milliseconds
from benchmarks.tune_attention import tune
from longtrain.attention import AttentionMask, AttentionSpec, Band
from longtrain.kernels.flash import FlashKernel
from longtrain.kernels.flash.tiles import Pass, tile_for
from longtrain.kernels.local import LocalAttend
from tests.parity import naive_attention

RESULTS = Path(__file__).parent / "results"
TARGETS = {"forward": {"cudnn": 0.85, "flex": 1.25, "flash": 1.4}, "backward": {"flex": 1.0, "flash": 1.2}}
"""How many times a peer's rate ours should be."""

torch._dynamo.config.recompile_limit = 64  # every problem compiles FlexAttention anew
functorch_config.donated_buffer = False  # FlexAttention's backward is run many times
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
        return AttentionMask(self.band, ids, ids, (self.ends,))

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
        table.append(Problem(f"4K causal d{dim}", 4096, heads, heads, dim, causal, batch=4))
        table.append(Problem(f"16K causal d{dim}", 2**14, heads, heads, dim, causal, peers=every))
        table.append(Problem(f"16K full d{dim}", 2**14, heads, heads, dim, full, peers=every))
        table.append(Problem(f"32K causal GQA d{dim}", 2**15, 32, 8, dim, causal, peers=every))
        if not quick:
            table.append(Problem(f"128K causal d{dim}", 2**17, heads // 4, heads // 4, dim, causal))
            table.append(Problem(f"128K causal GQA d{dim}", 2**17, 8, 2, dim, causal))
    table.append(Problem("32K window 1024 d128", 2**15, 16, 16, 128, Band.causal(1024), peers=masked))
    for mean in (8192, 2048, 512):
        table.append(Problem(f"32K packed {mean} d128", 2**15, 16, 16, 128, causal, packed(mean), peers=masked))
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


def varlen(p: Problem, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """FlashAttention-2 over documents or under a window."""
    from torch.nn.attention.varlen import varlen_attn

    ends = torch.tensor(p.ends, dtype=torch.int32, device="cuda")
    longest = max(p.documents or (p.length,))
    window = (-1 if p.band.hi is None else p.band.hi, 0)
    return varlen_attn(q[0], k[0], v[0], ends, ends, longest, longest, window_size=window)[None]  # type: ignore[index]


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
    "varlen": varlen,
    "naive": naive,
}


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


def cell(result: dict[str, Any]) -> str:
    if "forward" not in result:
        return result.get("error", "")[:22]
    return f"{result['forward']:.0f} / {result['backward']:.0f} ({result['memory_mib']:.0f})"


def missed(found: dict[str, dict[str, Any]]) -> list[str]:
    """Targets that a problem's rates fall short of."""
    lines = []
    for direction, peers in TARGETS.items():
        for name, factor in peers.items():
            if name in found and direction in found[name] and direction in found["ours"]:
                ratio = found["ours"][direction] / found[name][direction]
                if ratio < factor:
                    lines.append(f"{direction} {ratio:.2f}x {name} (target {factor})")
    return lines


def compare(quick: bool, only: str) -> None:
    gate()
    rows, short = [], []
    print(f"{'TFLOP/s forward / backward (MiB)':34}" + "".join(f"{name:>22}" for name in ("ours", *PEERS)), flush=True)
    for p in problems(quick):
        if only not in p.name:
            continue
        found = {"ours": measure(p, ours)} | {name: measure(p, PEERS[name]) for name in p.peers}
        touched = p.touched()
        cells = "".join(f"{cell(found.get(name, {})):>22}" for name in ("ours", *PEERS))
        print(f"{p.name:28}{f'x{touched:.2f}':6}" + cells, flush=True)
        rows.append({"problem": asdict(p), "touched": touched, "results": found})
        short += [f"{p.name}: {line}" for line in missed(found)]
    print("xN: pairs in touched tiles a visible pair; " + (write(rows) if not quick and not only else "part of a run: no file"))
    print("\n".join(["short of the targets:", *short]) if short else "every target is met")


def write(rows: list[dict[str, Any]]) -> str:
    """The files of a whole run; says where they are."""
    device = torch.cuda.get_device_name()
    versions = {"torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda}
    path = RESULTS / f"attention-{device.lower().replace(' ', '-')}.json"
    command = " ".join(["python -m benchmarks.attention", *sys.argv[1:]])
    path.write_text(json.dumps({"device": device, "versions": versions, "command": command, "rows": rows}, indent=1) + "\n")
    return f"wrote {path} and {attention_plot(path)}"


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--quick", action="store_true", help="leave out the longest and the odd ones; writes no file")
    arguments.add_argument("--only", default="", help="problems whose name holds this text; writes no file")
    arguments.add_argument("--tune", action="store_true", help="measure candidates for the table of tiles")
    given = arguments.parse_args()
    tune() if given.tune else compare(given.quick, given.only)
