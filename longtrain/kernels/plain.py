"""The layers around attention in plain torch: what the fused kernels are measured against, and what runs where they cannot."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

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

    cos, sin: fp32 [B, T, 1, R/2], R <= D, any scaling already in them. Feature i turns with feature i + R/2 (Hugging Face's
    convention), computed in fp32; features from R on pass unchanged.
    """
    return _rotate(q, cos, sin), _rotate(k, cos, sin)


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """act(gate) * up (Shazeer 2020); activation: a name in ACTIVATIONS."""
    return ACTIVATIONS[activation](gate) * up


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned = 2 * cos.shape[-1]
    first, second = _wide(x[..., :turned]).chunk(2, -1)
    out = torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)
    return out if turned == x.shape[-1] else torch.cat((out, x[..., turned:]), -1)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
