"""Compiles the attention kernels for GPUs that are not there.

`python -m tests.kernels.offline BATCH LENGTH HEADS KV_HEADS DIM DTYPE [--band causal|full|window] [--on 90 86]
[--everything runs|segments]`

Prints one JSON line a kernel: capability and the bytes of shared memory that a program may have there, name, registers, stack and
spills (also those between products), bytes of shared memory, counts of instructions. `--everything`: soft-cap, ALiBi, a bias of
rows and columns and dropout under a window, over documents that are runs and into accumulators, or over segments in any order.
TRITON_INTERPRET must be off.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections import Counter
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from longtrain.attention import AttentionSpec, Band, Block
from longtrain.attention.merge import empty_partial, zero_grads
from longtrain.kernels.flash import FlashKernel
from longtrain.kernels.flash.tiles import tiles_for

HOPPER = 90
SHARED = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
"""Bytes of shared memory that a program may have, by compute capability times ten."""
SPILL = r"\b(?:STL|LDL)\b"
"""To local memory and back."""
BANDS = {"causal": Band.causal(), "full": Band.full(), "window": Band.causal(1024)}
MNEMONICS = ("HGMMA", "HMMA", "UTMALDG", "LDGSTS")


class NoGpu:
    """What compiling asks of a driver."""

    def __init__(self, capability: int = HOPPER) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # what is compiled for one GPU is kept under its number

    def get_current_stream(self, device: int) -> int:
        return 0


def compiled(
    kernel: FlashKernel, block: Block, spec: AttentionSpec, shape: tuple[int, ...], dtype: torch.dtype, into: bool = False
) -> list[Any]:
    """Every kernel that forward and backward of this problem launch, compiled and not run."""
    batch, length, heads, kv_heads, dim = shape
    q = torch.zeros(batch, length, heads, dim, dtype=dtype)
    k = torch.zeros(batch, length, kv_heads, dim, dtype=dtype)
    lse = torch.zeros(batch, heads, length)
    results, run = [], JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        results.append(run(self, *args, grid=grid, warmup=True, **kwargs))

    with patch.object(JITFunction, "run", compile_only):
        kernel.forward(q, k, k, block, spec, into=empty_partial(q, dim) if into else None)
        kernel.backward(q, q, k, k, lse, lse, block, spec, into=zero_grads(q, k, k, spec.bias) if into else None)
    return results


def kernel_on(capability: int) -> FlashKernel:
    """As such a GPU gets it: its tiles, and descriptors where it has a tensor memory accelerator."""
    return FlashKernel(interpret=True, tiles=tiles_for(SHARED[capability]), descriptors=capability >= HOPPER)


def everything(runs: bool, shape: tuple[int, ...]) -> tuple[Block, AttentionSpec]:
    """All that changes a kernel's code, at once."""
    batch, length, heads, _, _ = shape
    segments = torch.zeros(batch, length, dtype=torch.int32)
    block = Block(Band.causal(length // 2), segments, segments, runs=runs)
    bias, seed = torch.zeros(1, heads, length, length), torch.zeros(batch, dtype=torch.int64)
    return block, AttentionSpec(None, 20.0, torch.zeros(heads), bias, 0.1, seed)


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


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for size in ("batch", "length", "heads", "kv_heads", "dim"):
        arguments.add_argument(size, type=int)
    arguments.add_argument("dtype")
    arguments.add_argument("--band", choices=BANDS, default="causal")
    arguments.add_argument("--on", type=int, nargs="+", choices=SHARED, default=[HOPPER], help="compute capabilities, times ten")
    arguments.add_argument("--everything", choices=("runs", "segments"))
    given = arguments.parse_args()
    shape = (given.batch, given.length, given.heads, given.kv_heads, given.dim)
    block, spec = Block(BANDS[given.band]), AttentionSpec()
    if given.everything:
        block, spec = everything(given.everything == "runs", shape)
    for capability in given.on:
        triton.runtime.driver.set_active(NoGpu(capability))
        kernels = compiled(kernel_on(capability), block, spec, shape, getattr(torch, given.dtype), given.everything == "runs")
        for each in kernels:
            print(json.dumps({"capability": capability, "most_shared": SHARED[capability]} | report(each)), flush=True)


if __name__ == "__main__":
    main()
