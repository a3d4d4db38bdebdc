"""Which attention kernel is the fastest, as measured: what `attention.kernel: auto` goes by.

`python -m benchmarks.kernels` measures the registry's kernels beside each other and writes what stands here as the source;
benchmarks.attention measures the fast ones beside those of others.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from longtrain.attention.protocol import Needs

CPU = "benchmarks/results/kernels-cpu.json"
H100 = "benchmarks/results/attention-nvidia-h100-80gb-hbm3.json"
HALF = frozenset((torch.bfloat16, torch.float16))


@dataclass(frozen=True)
class Measured:
    """An order of kernels, the fastest first, for a class of problems. None is any.

    dtypes: of q, k, v. kinds: all block kinds of a schedule are among these. widest: head dimension, of keys and values. longest:
    in tokens; a length that nobody knows is longer than any. source: the file with the figures, None where there are none yet.
    """

    device: str
    order: tuple[str, ...]
    source: str | None
    dtypes: frozenset[torch.dtype] | None = None
    kinds: frozenset[str] | None = None
    widest: int | None = None
    longest: int | None = None

    def covers(self, needs: Needs) -> bool:
        return (
            needs.device == self.device
            and (self.dtypes is None or needs.dtype in self.dtypes)
            and (self.kinds is None or needs.kinds <= self.kinds)
            and (self.widest is None or max(needs.head_dim, needs.value_dim) <= self.widest)
            and (self.longest is None or (needs.length is not None and needs.length <= self.longest))
        )

    def behind(self, name: str, taken: str) -> str:
        """Why `taken` goes before `name`, in words."""
        if self.source is None or not {name, taken} <= set(self.order):
            return f"not measured against {taken}"
        return f"slower than {taken}: see {self.source}"


TABLE = (
    # within 5% of cuDNN's time, forward and backward together, and the same bits in every run
    Measured("cuda", ("triton", "cudnn", "flash"), H100, HALF, frozenset(("full", "causal")), 64),
    # cuDNN takes 0.79 to 0.91 of its time, 0.99 at 1K tokens
    Measured("cuda", ("cudnn", "triton", "flash"), H100, HALF, frozenset(("full", "causal")), 128),
    # windows and packed documents: 0.53 to 0.65 of FlashAttention-2's time; plain ones of width 256: 0.97 of it. There cuDNN needs
    # 0.6 of ours, but kernels/vendor.py takes it up to 128 only
    Measured("cuda", ("triton", "flash", "cudnn"), H100, HALF),
    Measured("cuda", ("triton", "flash", "cudnn", "memory_efficient", "reference"), None),
    # medians of 18 cases each, 0.90 of memory_efficient's time at 128 tokens, 0.91 at 512 (0.66 to 1.54), 3.1 times it at 2048
    Measured("cpu", ("reference", "memory_efficient"), CPU, longest=512),
    Measured("cpu", ("memory_efficient", "reference"), CPU),
)
"""The first that covers a problem counts."""

NOBODY = Measured("", (), None)


def measured(needs: Needs) -> Measured:
    """The order for this problem; an empty one for a device that nobody has measured."""
    return next((entry for entry in TABLE if entry.covers(needs)), NOBODY)
