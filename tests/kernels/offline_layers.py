"""Compiles the fused layers for a GPU that is not there.

`python -m tests.kernels.offline_layers HIDDEN INNER HEADS KV_HEADS DIM DTYPE`

Prints one JSON line a kernel, as tests/kernels/offline.py, with the widths of its global loads and stores. TRITON_INTERPRET must
be off.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton.runtime.jit import JITFunction

from longtrain.kernels import gated, norms, plain, rotary
from tests.kernels.offline import NoGpu, report

ROWS = 1024


def calls(hidden: int, inner: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> Iterator[tuple[str, Any]]:
    """What is computed, and the launch of it."""

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    x, weight, stats = empty(ROWS, hidden), empty(hidden), torch.empty(2 * ROWS)
    for centred in (False, True):
        for added in (None, x):
            name = ("add_" if added is not None else "") + ("layer_norm" if centred else "rms_norm")
            bias, few = (weight, stats) if centred else (None, stats[:ROWS])
            yield name, lambda a=added, b=bias, c=centred: norms._forward(x, a, weight, b, 1e-5, c)
            yield name, lambda a=added, s=few, c=centred: norms._backward_launch(x, a, x, weight, s, c, 1 + c)
    q, k, table = empty(1, ROWS, heads, dim), empty(1, ROWS, kv_heads, dim), torch.empty(1, ROWS, 1, dim // 2)
    yield "rotary", lambda: rotary._launch(q, k, table, table, True)
    gate = empty(ROWS, inner)
    for activation in plain.ACTIVATIONS:
        yield activation, lambda a=activation: gated._forward_launch(gate, gate, a)
        yield activation, lambda a=activation: gated._backward_launch(gate, gate, gate, a)


def widths(kernel: Any) -> dict[str, int]:
    """How many global loads and stores of how many bits the kernel's code has; asynchronous copies are loads."""
    found = re.findall(r"\b(ld|st)\.global[\w.:]*?(?:\.v(\d))?\.b(\d+)", kernel.asm["ptx"])
    counts = Counter(f"{kind} {int(many or 1) * int(bits)}" for kind, many, bits in found)
    copies = re.findall(r"cp\.async\.\w+\.shared\.global.*?, (0x[0-9a-f]+|\d+)[,;]", kernel.asm["ptx"])
    return dict(counts + Counter(f"ld {8 * int(size, 0)}" for size in copies))


if __name__ == "__main__":
    sizes, kind = tuple(map(int, sys.argv[1:6])), sys.argv[6]
    triton.runtime.driver.set_active(NoGpu())
    made: list[Any] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        made.append(run(self, *args, grid=grid, warmup=True, **kwargs))

    with patch.object(JITFunction, "run", compile_only):
        for layer, call in calls(*sizes, getattr(torch, kind)):
            made.clear()
            call()
            print(json.dumps({"layer": layer} | report(made[0]) | {"global": widths(made[0])}), flush=True)
