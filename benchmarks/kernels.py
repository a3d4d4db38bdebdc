"""The registry's attention kernels beside each other on one device: `python -m benchmarks.kernels [--device cuda]`,
after `pip install -e '.[dev]'`.

What it measures is the source of longtrain/kernels/measured.py, which decides what `attention.kernel: auto` takes. First a
correctness gate: on a red one nothing is measured. Then milliseconds of forward + backward, the least of several runs, and a JSON
file in benchmarks/results. On a CPU one thread works, as for one rank of several.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import torch

from benchmarks.gate import Case, check_kernel
from benchmarks.refusals import need_gpu
from longtrain.attention import AttentionKernel, AttentionMask, Band, Needs, band_kind
from longtrain.kernels.local import LocalAttend
from longtrain.kernels.registry import kernels

RESULTS = Path(__file__).parent / "results"
LENGTHS = {"cpu": (128, 512, 2048), "cuda": (512, 2048, 8192)}
DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.bfloat16, torch.float32)}
BANDS = {"full": Band.full(), "causal": Band.causal(), "window 128": Band.causal(128)}
DIMS = (32, 64, 128)
CHANNELS = 512
"""Heads times head dimension."""


def able(kernel: AttentionKernel, band: Band, dim: int, dtype: torch.dtype, device: str) -> bool:
    return not kernel.refuses(Needs(frozenset((band_kind(band),)), False, frozenset(), dim, dim, dtype, device))


def milliseconds(
    kernel: AttentionKernel, length: int, dim: int, band: Band, dtype: torch.dtype, device: str, budget: float
) -> float:
    """Forward and backward of one sequence: the least of at least 3 runs in `budget` seconds."""
    q, k, v = (torch.randn(1, length, CHANNELS // dim, dim, dtype=dtype, device=device, requires_grad=True) for _ in range(3))
    dout, attend, mask = torch.randn_like(q), LocalAttend(kernel), AttentionMask(band)
    times: list[float] = []

    def run() -> None:
        torch.autograd.grad(attend(q, k, v, mask), (q, k, v), dout)
        if device == "cuda":
            torch.cuda.synchronize()

    run()
    while len(times) < 3 or (sum(times) < budget and len(times) < 50):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times) * 1e3


def compare(device: str, budget: float) -> None:
    for kernel, dtype in product(kernels(), DTYPES[device]):
        if able(kernel, Band.causal(), 64, dtype, device):
            window = Band.causal(100)
            band = window if able(kernel, window, 64, dtype, device) else Band.causal()
            check_kernel(kernel, Case(band, 600, None, 1, 4, 2, 64), dtype, device)
    print("correctness gate: green", flush=True)
    rows = []
    for dtype, dim, (name, band), length in product(DTYPES[device], DIMS, BANDS.items(), LENGTHS[device]):
        found = {
            kernel.name: milliseconds(kernel, length, dim, band, dtype, device, budget)
            for kernel in kernels()
            if able(kernel, band, dim, dtype, device)
        }
        dtype_name = str(dtype).removeprefix("torch.")
        print(f"{dtype_name:9}{dim:5}{name:>12}{length:7}  " + "  ".join(f"{k} {t:.2f}" for k, t in found.items()), flush=True)
        rows.append({"dtype": dtype_name, "dim": dim, "mask": name, "length": length, "milliseconds": found})
    what = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    path = RESULTS / f"kernels-{device}.json"
    path.write_text(json.dumps({"device": what, "torch": torch.__version__, "rows": rows}, indent=1) + "\n")
    print(f"milliseconds of forward and backward, {CHANNELS} channels; wrote {path}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--budget", type=float, default=0.5, help="seconds of runs a figure")
    given = parser.parse_args(arguments)
    if given.device == "cuda":
        need_gpu("--device cpu measures there")
    torch.set_num_threads(1)
    compare(given.device, given.budget)


if __name__ == "__main__":
    main()
