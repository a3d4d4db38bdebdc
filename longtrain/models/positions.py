"""Rotary position embeddings (Su et al. 2021), in Hugging Face's convention: feature i turns with feature i + D/2."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_tables(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin, fp32 [B, T, 1, D/2], of int64 positions [B, T] of any order.

    Frequencies are rounded to fp32 as elsewhere; their products with positions are not: at a million positions fp32 products
    would be wrong by up to 0.06 radian, in fp64 an angle is as exact as its cosine.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    frequencies = 1.0 / (theta**exponents)
    angles = positions[..., None, None].double() * frequencies.double()
    angles = angles.remainder_(2 * torch.pi).float()
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, T, H, D] turned by its positions: computed in fp32, returned in x's dtype."""
    first, second = x.float().chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)
