"""Matrix products of low-precision operands with an fp32 result. Autocast leaves them as they are, for they name their results."""

from __future__ import annotations

import torch
from torch import Tensor

WHOLE = 8
"""Elements of an inner dimension that cuBLAS reads at once; of 4097 its mixed product dropped the last (CUDA 13.0, M 488)."""


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a [M, K] @ b [K, N], of `dtype`, not rounded to the operands' in between."""
    return product_(torch.empty(a.shape[0], b.shape[1], dtype=dtype, device=a.device), a, b)


def product_(out: Tensor, a: Tensor, b: Tensor, add: bool = False) -> Tensor:
    """out = a @ b, or out += a @ b, in out's dtype; returns out [M, N]."""
    whole = a.shape[1] // WHOLE * WHOLE
    if a.dtype == out.dtype:
        return torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)
    if not a.is_cuda:  # torch has no mixed products there
        return product_(out, a.to(out.dtype), b.to(out.dtype), add)
    if whole and add:
        torch.addmm(out, a[:, :whole], b[:whole], out_dtype=out.dtype, out=out)
    elif whole:
        torch.mm(a[:, :whole], b[:whole], out_dtype=out.dtype, out=out)
    if 0 < whole == a.shape[1]:
        return out
    return product_(out, a[:, whole:].to(out.dtype), b[whole:].to(out.dtype), add or whole > 0)
