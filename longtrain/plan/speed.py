"""How fast a device could be: the denominator of MFU."""

from __future__ import annotations

import re

import torch

# dense matrix rates of the vendors' datasheets, FLOP/s in bf16 and fp16, without sparsity; the longest name that fits counts
PEAK_FLOPS = {
    "H200": 989e12,
    "H200 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100 80GB HBM2e": 756e12,  # the PCIe card under another name
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800 PCIe": 756e12,
    "H800": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "GB200": 2500e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "A6000": 155e12,
    "RTX 4090": 165e12,
}


# parts of a GPU, and cards that share only the name with the one above
_OTHER_CARDS = re.compile(r"\b(MIG|Laptop|Max-Q|D)\b")


def peak_flops(device_name: str, dtype: torch.dtype) -> float | None:
    """FLOP/s of one device in `dtype`; None where it is not known (CPUs, other GPUs, fp32), and then MFU is not told.

    device_name: as torch.cuda.get_device_name says it, e.g. "NVIDIA H100 80GB HBM3".
    """
    if dtype not in (torch.bfloat16, torch.float16) or _OTHER_CARDS.search(device_name):
        return None
    fitting = [name for name in PEAK_FLOPS if re.search(rf"\b{name}\b", device_name)]
    return PEAK_FLOPS[max(fitting, key=len)] if fitting else None
