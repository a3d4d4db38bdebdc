"""The loss without logits beside its peers, in one run on one GPU: `python -m benchmarks.loss` from the repository root.

First a correctness gate: on a red one nothing is measured. Then forward + backward of linear + cross entropy in bf16, gradient of
the loss 1 / tokens: milliseconds, TFLOP/s of the three products that it needs (logits, dx, dW: 6 N V C FLOP; nobody's recomputation
counts), the rate as a share of those three products alone, each whole, with fp32 results and with bf16 ones, which are quicker to
write, and memory beside inputs, dx and one fp32 dW (negative: no fp32 dW). All are measured in turns. A JSON file goes to
benchmarks/results. `--tune` measures sizes for longtrain/kernels/cross_entropy.py.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from benchmarks import targets
from benchmarks.plots import loss_plot
from benchmarks.refusals import need_gpu
from benchmarks.timing import ROUNDS, in_turns, milliseconds
from longtrain.kernels import cross_entropy as kernels
from longtrain.kernels.cross_entropy import SIZES, Sizes, Terms, fused_parts, scale_, scaled_weight_gradient_
from longtrain.kernels.language import triton
from longtrain.kernels.linear_cross_entropy import linear_cross_entropy
from tests.loss_cases import LossCase, check_loss

RESULTS = Path(__file__).parent / "results"
DEVICE = "cuda"


@dataclass(frozen=True)
class Problem:
    tokens: int
    vocabulary: int
    hidden: int = 4096

    @property
    def name(self) -> str:
        return f"{self.tokens // 1024}K tokens, {self.vocabulary // 1024}K vocabulary"

    @property
    def tflop(self) -> float:
        return 6 * self.tokens * self.vocabulary * self.hidden / 1e12

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        x = torch.randn(self.tokens, self.hidden, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
        w = torch.empty(self.vocabulary, self.hidden, device=DEVICE, dtype=torch.bfloat16).normal_(std=self.hidden**-0.5)
        return x, w.requires_grad_(), torch.randint(self.vocabulary, (self.tokens,), device=DEVICE)


PROBLEMS = (Problem(8192, 131072), Problem(32768, 32768))


def fused(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return linear_cross_entropy(x, w, y, fused=True).loss


def chunked(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return linear_cross_entropy(x, w, y).loss


def materialised(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    """As Hugging Face computes it: bf16 logits, fp32 loss."""
    return cross_entropy(linear(x, w).float(), y, reduction="sum")


def liger(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return LIGER.apply(x, w, y, None, None, -100, 0.0, 0.0, "sum")[0]


def liger_fp32(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    """With dW summed in fp32, as ours is."""
    return LIGER.apply(x, w, y, None, None, -100, 0.0, 0.0, "sum", None, False, torch.float32)[0]


LIGER: Any = None
compiled = torch.compile(materialised, dynamic=False)
WAYS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "ours": fused,
    "ours in torch": chunked,
    "Liger": liger,
    "Liger, fp32 dW": liger_fp32,
    "torch.compile": compiled,
    "torch": materialised,
}


def bare(p: Problem) -> dict[torch.dtype, dict[str, float]]:
    """Milliseconds of the products alone, each whole, of bf16 inputs: by the dtype of their results."""
    x, w, _ = (t.detach() for t in p.inputs())
    dlogits = torch.randn(p.tokens, p.vocabulary, device=DEVICE, dtype=torch.bfloat16)

    def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Callable[[], Tensor]:
        out = torch.empty(a.shape[0], b.shape[1], device=DEVICE, dtype=dtype)
        return partial(torch.mm, a, b, out=out, **({} if dtype == a.dtype else {"out_dtype": dtype}))

    pairs = {"logits": (x, w.t()), "dx": (dlogits, w), "dw": (dlogits.t(), x)}
    found: dict[torch.dtype, dict[str, float]] = {torch.float32: {}, torch.bfloat16: {}}
    for name, (a, b) in pairs.items():
        times = in_turns({str(dtype): product(a, b, dtype) for dtype in found}, 300)
        for dtype, products in found.items():
            products[name] = times[str(dtype)]
    return found


def measure(p: Problem) -> dict[str, dict[str, Any]]:
    """Of every way; or why there is no figure."""
    x, w, y = p.inputs()
    scale = torch.full((), 1 / p.tokens, device=DEVICE)

    def run(way: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        loss = way(x, w, y)
        loss.backward(scale.to(loss.dtype))
        x.grad = w.grad = None
        return loss.detach()

    found: dict[str, dict[str, Any]] = {}
    for name, way in WAYS.items():
        if "Liger" in name and LIGER is None:
            found[name] = {"error": "absent"}
            continue
        try:
            loss = run(way).item() / p.tokens
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            run(way)
            memory = torch.cuda.max_memory_allocated() - before - 2 * x.numel() - 4 * w.numel()
            found[name] = {"extra_mib": memory / 2**20, "mean_loss": loss}
        except Exception as error:  # a peer that cannot do this is a line of the table
            if way is fused:
                raise
            found[name] = {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"}
            x.grad = w.grad = None
    for name, time in in_turns({name: partial(run, WAYS[name]) for name, r in found.items() if "error" not in r}, 800).items():
        found[name] |= {"ms": time, "tflops": p.tflop / time * 1e3}
    return found


def gate() -> None:
    for case in (
        LossCase(1111, 256, 4097, 1e-4, 30.0, 0.1),
        LossCase(3000, 512, 32000),
        LossCase(1024, 512, 131072, z_loss=1e-4),
    ):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            check_loss(case, dtype, True, DEVICE)
    print("correctness gate: green")


def compare() -> None:
    global LIGER
    gate()
    if find_spec("liger_kernel") is not None:
        LIGER = import_module("liger_kernel.ops.fused_linear_cross_entropy").LigerFusedLinearCrossEntropyFunction
    rows = []
    for p in PROBLEMS:
        torch.cuda.empty_cache()
        products = bare(p)
        torch.cuda.empty_cache()
        totals = [sum(times.values()) for times in products.values()]
        for (dtype, times), total in zip(products.items(), totals, strict=True):
            parts = ", ".join(f"{name} {time:.2f}" for name, time in times.items())
            print(f"\n{p.name}: products alone, {dtype}: {total:.2f} ms ({parts}), {p.tflop / total * 1e3:.0f} TFLOP/s", end="")
        print(f"\n{'':20}{'ms':>8}{'TFLOP/s':>10}{'of bare, fp32 / bf16':>24}{'extra MiB':>12}")
        found = measure(p)
        for name, r in found.items():
            shares = " / ".join(f"{total / r['ms']:.1%}" for total in totals) if "ms" in r else ""
            cells = f"{r['ms']:8.2f}{r['tflops']:10.0f}{shares:>24}{r['extra_mib']:12.0f}" if "ms" in r else r["error"]
            print(f"{name:20}{cells}", flush=True)
        bares = {"bare_ms": products[torch.float32], "bare_outputs": "fp32", "bare_bf16_ms": products[torch.bfloat16]}
        rows.append({"problem": asdict(p), **bares, "results": found})
    print("\n".join(["short of the targets:", *short]) if (short := targets.loss(rows)) else "every target is met")
    device = torch.cuda.get_device_name()
    versions = {"torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda}
    if LIGER is not None:
        versions["liger_kernel"] = version("liger_kernel")
    path = RESULTS / f"loss-{device.lower().replace(' ', '-')}.json"
    command = " ".join(["python -m benchmarks.loss", *sys.argv[1:]])
    result = {"device": device, "versions": versions, "command": command, "rounds": ROUNDS, "dtype": "bfloat16", "rows": rows}
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\nwrote {path} and {loss_plot(path)}")


CANDIDATES = {
    "columns": [
        replace(SIZES, columns=columns, warps=warps, logits=max(SIZES.logits, 8192 * columns))
        for columns, warps in ((1024, 1), (1024, 2), (2048, 2), (2048, 4), (4096, 4), (4096, 8), (8192, 8), (8192, 16))
    ],
    "logits": [replace(SIZES, columns=1024, warps=1, logits=2**power) for power in (23, 24, 25, 26)],
    "block": [replace(SIZES, block=2**power) for power in (13, 14, 15)],
    "memory": [replace(SIZES, tokens=tokens) for tokens in (1024, 2048, 2816, 4096)],
}


def tune() -> None:
    for p in PROBLEMS:
        x, w, y = (t.detach() for t in p.inputs())
        scale = torch.full((), 1 / p.tokens, device=DEVICE)

        def run(sizes: Sizes, x: Tensor = x, w: Tensor = w, y: Tensor = y, scale: Tensor = scale) -> None:
            parts = fused_parts(x, w, y, Terms(), True, True, sizes)
            scale_(parts.dx, scale)
            scaled_weight_gradient_(parts.upper, parts.lower, scale, w.dtype)

        print(f"\n{p.name}")
        for what, candidates in CANDIDATES.items():
            for sizes in candidates:
                time = milliseconds(lambda sizes=sizes: run(sizes), 300)
                print(f"{what:10}{time:8.2f} ms{p.tflop / time * 1e3:6.0f} TFLOP/s  {sizes}", flush=True)
        profile(lambda: run(SIZES))
        kernels_alone(p)


def kernels_alone(p: Problem, rows: int = 2**15, columns: int = 4096) -> None:
    """The Triton kernels alone, in TB/s."""
    logits = torch.randn(rows, columns, device=DEVICE)
    scores = torch.empty(rows, columns, device=DEVICE, dtype=torch.float16)
    labels = torch.zeros(rows, device=DEVICE, dtype=torch.int64)
    table, lse = torch.empty(3, columns // 512, rows, device=DEVICE), torch.zeros(rows, device=DEVICE)
    dlogits = torch.empty_like(scores, dtype=torch.bfloat16)
    flags = {"SOFTCAP": False, "SMOOTH": False}
    for block, warps in ((1024, 1), (1024, 2), (2048, 2), (2048, 4), (4096, 4), (4096, 8)):
        grid = (rows, columns // block)

        def first(block: int = block, warps: int = warps, grid: tuple[int, int] = grid) -> None:
            kernels.scores_kernel[grid](
                logits, scores, labels, table[0], table[1], table[2], lse, columns, columns, rows, 0, 0, columns, columns, 0.0,
                STORE=True, BLOCK=block, num_warps=warps, **flags,
            )  # fmt: skip

        def second(block: int = block, warps: int = warps, grid: tuple[int, int] = grid) -> None:
            kernels.dlogits_kernel[grid](
                scores, dlogits, labels, table[0], lse, columns, rows, 0, 0, columns, columns, 0.0, 0.0, 1.0, 0.0,
                BLOCK=block, num_warps=warps, **flags,
            )  # fmt: skip

        rates = (bytes_ * rows * columns / milliseconds(run, 50) / 1e9 for bytes_, run in ((6, first), (4, second)))
        print(f"{block} columns, {warps} warps: " + ", ".join(f"{rate:.2f} TB/s" for rate in rates), flush=True)


def profile(run: Callable[[], None]) -> None:
    """Where the device's time goes."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        run()
        torch.cuda.synchronize()
    for event in sorted(trace.key_averages(), key=lambda event: -event.self_device_time_total)[:10]:
        print(f"{event.self_device_time_total / 1e3:8.2f} ms {event.count:5} x {event.key[:100]}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tune", action="store_true", help="measure sizes of chunks and programs, and profile one run")
    given = parser.parse_args(arguments)
    need_gpu()
    tune() if given.tune else compare()


if __name__ == "__main__":
    main()
