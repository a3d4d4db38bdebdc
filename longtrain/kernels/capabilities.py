"""What each attention kernel can do, asked of the registry: `python -m longtrain.kernels.capabilities docs/attention.md` writes the
table into the page, between its two markers."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path

import torch

from longtrain.attention.protocol import AttentionKernel, Needs
from longtrain.kernels.registry import kernels

BEGIN = "<!-- generated: python -m longtrain.kernels.capabilities docs/attention.md -->"
END = "<!-- end of the generated table -->"
DEVICES = ("cuda", "cpu")
PLAIN = Needs(frozenset(("causal",)), False, frozenset(), 64, 64, torch.bfloat16, DEVICES[0])
EVERY: tuple[Needs, ...] = ()
"""What no kernel is asked, since the primitive demands it of all of them, or an Attend does it for them."""

ROWS: dict[str, tuple[Needs, ...]] = {
    "CUDA GPUs": (PLAIN,),
    "CPUs": (replace(PLAIN, device="cpu"),),
    "full": (replace(PLAIN, kinds=frozenset(("full",))),),
    "causal": (PLAIN,),
    "sliding window": (replace(PLAIN, kinds=frozenset(("window",))),),
    "any other band (rings: striped, windows)": (replace(PLAIN, kinds=frozenset(("band",))),),
    "packed documents": (replace(PLAIN, documents=True),),
    "cross attention, keys of another length": EVERY,
    "grouped heads (GQA, MQA)": EVERY,
    "own scale": EVERY,
    "soft-cap": (replace(PLAIN, features=frozenset(("softcap",))),),
    "ALiBi": (replace(PLAIN, features=frozenset(("alibi",))),),
    "bias, with gradient": (replace(PLAIN, features=frozenset(("bias",))),),
    "dropout": (replace(PLAIN, features=frozenset(("dropout",))),),
    "sinks, with gradient": EVERY,
    "head dimensions 1 to 256": tuple(replace(PLAIN, head_dim=n, value_dim=n) for n in range(1, 257)),
    "head dimension 512": (replace(PLAIN, head_dim=512, value_dim=512),),
    "values of another dimension": (replace(PLAIN, value_dim=96),),
    "bf16": (PLAIN,),
    "fp16": (replace(PLAIN, dtype=torch.float16),),
    "fp32": (replace(PLAIN, dtype=torch.float32),),
    "fp64": (replace(PLAIN, dtype=torch.float64),),
    "fp32 partial results (rings)": (replace(PLAIN, fp32_partials=True),),
}
ON_A_DEVICE = ("CUDA GPUs", "CPUs")


def table() -> str:
    """A row a feature, a column a kernel; a kernel is asked on the first of `DEVICES` that it runs on."""
    columns = kernels()
    lines = ["| | " + " | ".join(kernel.name for kernel in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for row, needs in ROWS.items():
        cells = [_cell(kernel, needs, row in ON_A_DEVICE) for kernel in columns]
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(kernel: AttentionKernel, needs: tuple[Needs, ...], as_asked: bool) -> str:
    device = next((d for d in DEVICES if not kernel.refuses(replace(PLAIN, device=d))), DEVICES[0])
    reasons = {why: None for n in needs for why in kernel.refuses(n if as_asked else replace(n, device=device))}
    return "; ".join(reasons) or "yes"


def with_table(page: str) -> str:
    """The page with the table of today between its markers."""
    return re.sub(f"(?<={re.escape(BEGIN)}\n).*?(?={re.escape(END)})", lambda _: f"\n{table()}\n\n", page, count=1, flags=re.DOTALL)


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(with_table(path.read_text()))
