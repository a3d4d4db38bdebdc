"""The layers around attention in plain torch: what the fused kernels are measured against, and what runs where they cannot."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from longtrain.errors import KernelError

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}
"""By name: SwiGLU's, GeGLU's, and the approximation of the latter that some models were trained with (Shazeer 2020)."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension (Zhang and Sennrich 2019). x [..., C], weight [C].

    fp32 inside (fp64 for fp64), rounded to x's dtype before the weight, as Hugging Face's LLaMA does; the result has the dtype that
    torch gives to a product of x and weight.
    """
    wide = _wide(x)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def add_rms_norm(x: Tensor, branch: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(total), total) with total = x + branch in x's dtype: a residual stream and the norm that follows it."""
    total = (x + branch).to(x.dtype)
    return rms_norm(total, weight, eps), total


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """(x - mean(x)) / std(x) * weight + bias over the last dimension (Ba et al. 2016). x [..., C]; weight, bias [C]."""
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def add_layer_norm(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """(layer_norm(total), total) with total = x + branch in x's dtype."""
    total = (x + branch).to(x.dtype)
    return layer_norm(total, weight, bias, eps), total


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q [B, T, H, D] and k [B, T, Hkv, D] turned by the angles of their positions (Su et al. 2021), in their dtypes.

    cos, sin: fp32 [B, T, 1, R/2], R <= D, any scaling already in them; [1, T, 1, R/2] where the batch shares them. Feature i turns
    with feature i + R/2 (Hugging Face's convention), computed in fp32; features from R on pass unchanged.

    Raises:
        KernelError: shapes that do not fit.
    """
    check_rotary(q, k, cos, sin)
    return _rotate(q, cos, sin), _rotate(k, cos, sin)


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """act(gate) * up (Shazeer 2020). gate, up: of one shape; activation: a name in ACTIVATIONS.

    Raises:
        KernelError: an unknown activation, shapes that differ.
    """
    check_gated(gate, up, activation)
    return ACTIVATIONS[activation](gate) * up


def check_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Raises KernelError where `rotary`, plain or fused, cannot take these shapes."""
    fits = q.dim() == k.dim() == cos.dim() == 4 and cos.shape == sin.shape and cos.shape[0] in (1, q.shape[0])
    fits = fits and q.shape[:2] == k.shape[:2] and cos.shape[1:3] == (q.shape[1], 1)
    if not (fits and 2 * cos.shape[3] <= q.shape[3] == k.shape[3]):
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, cos, sin))
        raise KernelError(
            f"rotary: q, k, cos, sin are {shapes}, not [B, T, H, D], [B, T, Hkv, D] and twice [B or 1, T, 1, R/2] with R <= D"
        )


def check_gated(gate: Tensor, up: Tensor, activation: str) -> None:
    """Raises KernelError where `gated`, plain or fused, cannot take these."""
    if activation not in ACTIVATIONS:
        raise KernelError(f"gated layer: no activation {activation!r}; there are {', '.join(ACTIVATIONS)}")
    if gate.shape != up.shape:
        raise KernelError(f"gated layer: gate and up are {tuple(gate.shape)} and {tuple(up.shape)}: they must be of one shape")


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned = 2 * cos.shape[-1]
    first, second = _wide(x[..., :turned]).chunk(2, -1)
    out = torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)
    return out if turned == x.shape[-1] else torch.cat((out, x[..., turned:]), -1)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
