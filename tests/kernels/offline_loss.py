"""Compiles the kernels of the fused loss for a GPU that is not there.

`python -m tests.kernels.offline_loss TOKENS HIDDEN VOCABULARY DTYPE`

Prints one JSON line a kernel, as tests/kernels/offline.py, with the widths of its global loads and stores. TRITON_INTERPRET must
be off.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton.runtime.jit import JITFunction

from longtrain.kernels import cross_entropy
from longtrain.kernels.cross_entropy import Terms, fused_parts, scale_into
from tests.kernels.offline import NoGpu, report


def compiled(tokens: int, hidden: int, vocabulary: int, dtype: torch.dtype, terms: Terms) -> list[Any]:
    """Every kernel that loss and gradients launch, compiled and not run; products are left out."""
    kernels: dict[str, Any] = {}
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        kernels[kernel.hash] = kernel

    triton.runtime.driver.set_active(NoGpu())
    x, w, one = torch.empty(tokens, hidden, dtype=dtype), torch.empty(vocabulary, hidden, dtype=dtype), torch.ones(())
    with patch.object(JITFunction, "run", compile_only), patch.object(cross_entropy, "product_", lambda *_, **__: None):
        fused_parts(x, w, torch.zeros(tokens, dtype=torch.int64), terms, True, True)
        scale_into(x, x, one)
        scale_into(torch.empty(vocabulary, hidden), w, one)
    return list(kernels.values())


def widths(kernel: Any) -> dict[str, int]:
    """How many loads and stores of how many bits the kernel's code has."""
    found = re.findall(r"\b(ld|st)\.global[\w.:]*?(?:\.v(\d))?\.b(\d+)", kernel.asm["ptx"])
    return dict(Counter(f"{kind} {int(many or 1) * int(bits)}" for kind, many, bits in found))


if __name__ == "__main__":
    sizes, kind = tuple(map(int, sys.argv[1:4])), sys.argv[4]
    for terms in (Terms(), Terms(1e-4, 30.0, 0.1)):
        for each in compiled(*sizes, getattr(torch, kind), terms):
            print(json.dumps(report(each) | {"global": widths(each)}), flush=True)
