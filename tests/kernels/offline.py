"""Compiles the attention kernels for a GPU that is not there.

`python -m tests.kernels.offline BATCH LENGTH HEADS KV_HEADS DIM DTYPE [causal|full|window]`

Prints one JSON line a kernel: name, registers, stack and spills (also those between products), shared memory in bytes, counts of
instructions.
TRITON_INTERPRET must be off.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from longtrain.attention import AttentionSpec, Band, Block
from longtrain.kernels.flash import FlashKernel

HOPPER = GPUTarget("cuda", 90, 32)
SPILL = r"\b(?:STL|LDL)\b"
"""To local memory and back."""
MNEMONICS = ("HGMMA", "HMMA", "UTMALDG", "LDGSTS")


class NoGpu:
    """What compiling asks of a driver."""

    def get_current_target(self) -> GPUTarget:
        return HOPPER

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compiled(kernel: FlashKernel, block: Block, spec: AttentionSpec, shape: tuple[int, ...], dtype: torch.dtype) -> list[Any]:
    """Every kernel that forward and backward of this problem launch, compiled and not run."""
    batch, length, heads, kv_heads, dim = shape
    q = torch.zeros(batch, length, heads, dim, dtype=dtype)
    k = torch.zeros(batch, length, kv_heads, dim, dtype=dtype)
    lse = torch.zeros(batch, heads, length)
    triton.runtime.driver.set_active(NoGpu())
    results, run = [], JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        results.append(run(self, *args, grid=grid, warmup=True, **kwargs))

    JITFunction.run = compile_only  # type: ignore[method-assign]
    try:
        kernel.forward(q, k, k, block, spec)
        kernel.backward(q, q, k, k, lse, lse, block, spec)
    finally:
        JITFunction.run = run  # type: ignore[method-assign]
    return results


def report(kernel: Any) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        usage = _run(triton.knobs.nvidia.cuobjdump.path, "-res-usage", cubin.name)
        sass = _run(triton.knobs.nvidia.cuobjdump.path, "-sass", cubin.name)
    counts = Counter(re.findall(r"\b(" + "|".join(MNEMONICS) + r")\b", sass))
    registers, stack = (int(re.search(rf"{what}:(\d+)", usage).group(1)) for what in ("REG", "STACK"))  # type: ignore[union-attr]
    return {
        "kernel": kernel.metadata.name,
        "registers": registers,
        "stack": stack,
        "spilled": len(re.findall(SPILL, sass)),
        "spilled_in_loop": len(re.findall(SPILL, sass[sass.find("HGMMA") : sass.rfind("HGMMA")])),
        "shared": kernel.metadata.shared,
        **counts,
    }


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    sizes, kind, band = tuple(map(int, sys.argv[1:6])), sys.argv[6], sys.argv[7] if len(sys.argv) > 7 else "causal"
    bands = {"causal": Band.causal(), "full": Band.full(), "window": Band.causal(1024)}
    for each in compiled(FlashKernel(interpret=True), Block(bands[band]), AttentionSpec(), sizes, getattr(torch, kind)):
        print(json.dumps(report(each)), flush=True)
