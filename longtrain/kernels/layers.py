"""The layers that models are built from, each plain or fused: one switch, by name, for using them and for bisecting."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from longtrain.errors import KernelError
from longtrain.kernels import gated, norms, plain, rotary
from longtrain.kernels.language import has_triton, interprets
from longtrain.kernels.linear_cross_entropy import linear_cross_entropy

FUSABLE = ("norm", "rotary", "mlp", "loss")
"""What can be fused: norms and the additions before them, rotary positions, the gated product of an MLP, head and cross entropy."""


@dataclass(frozen=True)
class Layers:
    """The functions of kernels/plain.py and kernels/linear_cross_entropy.py, or others of the same signatures."""

    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    layer_norm: Callable[[Tensor, Tensor, Tensor | None, float], Tensor]
    add_layer_norm: Callable[[Tensor, Tensor, Tensor, Tensor | None, float], tuple[Tensor, Tensor]]
    rotary: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    gated: Callable[[Tensor, Tensor, str], Tensor]
    linear_cross_entropy: Callable[..., Any]


def choose_layers(fused: Collection[str] = ()) -> Layers:
    """The fused layers of these names (FUSABLE), all others plain.

    Raises:
        KernelError: a name that is not in FUSABLE, or a string in the place of a collection of names.
    """
    if isinstance(fused, str):
        raise KernelError(f"the fused layers are a list of names, such as {[fused]}, not the string {fused!r}")
    unknown = [name for name in fused if name not in FUSABLE]
    if unknown:
        raise KernelError(f"no fused layer is called {', '.join(unknown)}; there are {', '.join(FUSABLE)}")
    norm = norms if "norm" in fused else plain
    return Layers(
        rms_norm=norm.rms_norm,
        add_rms_norm=norm.add_rms_norm,
        layer_norm=norm.layer_norm,
        add_layer_norm=norm.add_layer_norm,
        rotary=(rotary if "rotary" in fused else plain).rotary,
        gated=(gated if "mlp" in fused else plain).gated,
        linear_cross_entropy=partial(linear_cross_entropy, fused=True) if "loss" in fused else linear_cross_entropy,
    )


def fusable(device: str) -> tuple[str, ...]:
    """Which of FUSABLE run on "cuda" or "cpu" here: all of them with Triton on a GPU of compute capability 8.0 or above (one that
    cannot be seen from here is taken for such), and on a CPU only in Triton's interpreter."""
    if not has_triton():
        return ()
    if device == "cuda":
        old = torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0)
        return () if old else FUSABLE
    return FUSABLE if interprets() else ()
