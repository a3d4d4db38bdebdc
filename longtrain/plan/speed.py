"""How fast a device could be: the denominator of MFU."""

from __future__ import annotations

import torch

# dense matrix rates of the vendors' datasheets, FLOP/s in bf16 and fp16, without sparsity; the longest name that fits counts
PEAK_FLOPS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "A6000": 155e12,
    "RTX 4090": 165e12,
}


def peak_flops(device_name: str, dtype: torch.dtype) -> float | None:
    """FLOP/s of one device in `dtype`; None where it is not known (CPUs, other GPUs, fp32), and then MFU is not told."""
    if dtype not in (torch.bfloat16, torch.float16):
        return None
    fitting = [name for name in PEAK_FLOPS if name in device_name]
    return PEAK_FLOPS[max(fitting, key=len)] if fitting else None
