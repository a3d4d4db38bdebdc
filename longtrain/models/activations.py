"""What a block holds between its forward and its backward, and how the rest comes back."""

from __future__ import annotations

from collections.abc import Callable, Collection
from enum import StrEnum
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from longtrain.attention import Keep
from longtrain.models.config import ModelConfig
from longtrain.models.families import family_of


class Activations(StrEnum):
    """Named by what a block keeps. Attention runs a second time only in MINIMAL."""

    NONE = "none"
    """Nothing is recomputed."""
    SELECTIVE = "selective"
    """Block input, attention output and lse, the products of the query, key, value and output projections."""
    FULL = "full"
    """Block input, attention output and lse."""
    MINIMAL = "minimal"
    """Block input."""


class KeptProduct(torch.autograd.Function):
    """y = x W^T + b whose product a recomputation recalls. x [..., inputs], weight [outputs, inputs], bias [outputs] or None."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, keep: Keep, slot: str) -> Tensor:
        ctx.save_for_backward(x, weight)
        kept = keep.recall(slot)
        if kept is not None:
            return kept[0]
        y = F.linear(x, weight, bias)
        keep.store(slot, y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        rows = dy.flatten(0, -2)
        dx = (rows @ weight).view_as(x) if ctx.needs_input_grad[0] else None
        dweight = rows.t() @ x.flatten(0, -2) if ctx.needs_input_grad[1] else None
        dbias = rows.sum(0) if ctx.needs_input_grad[2] else None
        return dx, dweight, dbias, None, None


def run_block(mode: Activations, block: Callable[..., Tensor], x: Tensor, *context: object) -> Tensor:
    """block(x, *context, keep, products): both None, or the store for attention and the one for products of projections."""
    if mode is Activations.NONE or not torch.is_grad_enabled():
        return block(x, *context, None, None)
    keep = None if mode is Activations.MINIMAL else Keep()
    products = keep if mode is Activations.SELECTIVE else None
    # nothing in a block draws from a generator: randomness is a function of seed, step and position
    out = checkpoint(block, x, *context, keep, products, use_reentrant=False, preserve_rng_state=False)
    assert isinstance(out, Tensor)
    return out


def held_bytes(config: ModelConfig, mode: Activations, tokens: int, itemsize: int, fused: Collection[str] = ()) -> int:
    """Bytes that one block holds from its forward to its backward, for `tokens` tokens and activations of `itemsize` bytes.

    Sums what each mode names; for NONE, all that the layers save: plain norms also an fp32 copy of their inputs, a plain gated
    MLP also the activated gate, and dropout which features stay, a byte each. fused: which layers are (`kernels.layers.FUSABLE`).
    """
    hidden, family = config.hidden_size, family_of(config)
    queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
    lse = 4 * config.heads
    inner = {"gated": 3 if "mlp" in fused else 4, "relu": 1}[family.mlp] * config.intermediate_size
    of_norm = {"rmsnorm": 4, "layernorm": 8}[family.norm]
    if family.norm == "rmsnorm" and "norm" not in fused:
        of_norm += 4 * hidden
    dropped = 2 * hidden if config.dropout else 0
    per_token = {
        Activations.MINIMAL: itemsize * hidden,
        Activations.FULL: itemsize * (hidden + queries) + lse,
        Activations.SELECTIVE: itemsize * (2 * hidden + 2 * queries + 2 * keys) + lse,
        Activations.NONE: itemsize * (4 * hidden + 2 * queries + 2 * keys + inner) + 2 * of_norm + lse + dropped,
    }
    return tokens * per_token[mode]
