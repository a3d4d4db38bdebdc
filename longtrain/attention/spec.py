"""What is done to the scores, apart from who sees whom."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf, isfinite

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class AttentionSpec:
    """Score modifiers, applied in this order: scale, soft-cap, ALiBi, bias; dropout falls on the probabilities.

    scale: finite, None is 1 / sqrt(D). softcap: finite, scores become cap * tanh(score / cap) (Gemma 2). alibi_slopes: fp32 [H],
    adds -slope * |query position - key position| (Press et al. 2022). bias: floats broadcastable to [B, H, Tq, Tk], of which -inf
    hides a key; may require gradients.
    dropout: probability of dropping, in [0, 1); dropout_seed: int64 [B], one a row, so that the mask is a function of the sequence
    and of the positions alone (`attention.dropout`).
    sinks: [H], any float dtype, may require gradients: one more score a row, of a key whose value is 0, so that a head can look at
    nothing (a learned logit a head as in gpt-oss; Xiao et al. 2023). An `Attend` applies them once, after the last merge
    (`merge.add_sinks_`); kernels never see them.
    """

    scale: float | None = None
    softcap: float | None = None
    alibi_slopes: Tensor | None = None
    bias: Tensor | None = None
    dropout: float = 0.0
    dropout_seed: Tensor | None = None
    sinks: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("alibi_slopes", "bias", "dropout_seed", "sinks"):
            x = getattr(self, name)
            if x is not None and not isinstance(x, Tensor):
                raise ValueError(f"{name} is of type {type(x).__name__}, must be a tensor")
        if self.scale is not None and not isfinite(self.scale):
            raise ValueError(f"scale {self.scale} must be finite, or None for 1 / sqrt(D)")
        if self.softcap is not None and not 0 < self.softcap < inf:
            raise ValueError(f"softcap {self.softcap} must be above 0 and finite, or None for none")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout {self.dropout} must be in [0, 1)")
        if self.dropout and self.dropout_seed is None:
            raise ValueError("dropout needs dropout_seed, int64 [B]")
        if self.dropout_seed is not None and self.dropout_seed.dtype != torch.int64:
            raise ValueError(f"dropout_seed is {self.dropout_seed.dtype}, must be int64 [B]")
        if self.alibi_slopes is not None and self.alibi_slopes.requires_grad:
            raise ValueError("alibi_slopes are constants, no kernel returns their gradient: detach them")
        if self.sinks is not None and (self.sinks.ndim != 1 or not self.sinks.is_floating_point()):
            raise ValueError(f"sinks are {self.sinks.dtype} {list(self.sinks.shape)}, must be floats [H]")

    def scale_for(self, head_dim: int) -> float:
        return head_dim**-0.5 if self.scale is None else self.scale

    @property
    def positional(self) -> bool:
        """Scores depend on global positions, so that blocks must be arithmetic progressions of them."""
        return self.alibi_slopes is not None or self.dropout > 0

    @property
    def features(self) -> frozenset[str]:
        """The modifiers in use, by name; what a kernel may refuse. Sinks are not among them."""
        used = {
            "softcap": self.softcap is not None,
            "alibi": self.alibi_slopes is not None,
            "bias": self.bias is not None,
            "dropout": self.dropout > 0,
        }
        return frozenset(name for name, on in used.items() if on)

    @property
    def without_sinks(self) -> AttentionSpec:
        """What kernels get."""
        return self if self.sinks is None else replace(self, sinks=None)

    def narrow(self, q_start: int, q_length: int, k_start: int, k_length: int) -> AttentionSpec:
        """The spec of a sub-rectangle: only the bias depends on it."""
        if self.bias is None:
            return self
        return replace(self, bias=narrow_bias(self.bias, q_start, q_length, k_start, k_length))


def narrow_bias(bias: Tensor, q_start: int, q_length: int, k_start: int, k_length: int) -> Tensor:
    """A view of the part of a broadcastable [B, H, Tq, Tk] tensor; broadcast dimensions stay whole."""
    bias = bias[(None,) * (4 - bias.ndim)]
    if bias.shape[2] != 1:
        bias = bias.narrow(2, q_start, q_length)
    if bias.shape[3] != 1:
        bias = bias.narrow(3, k_start, k_length)
    return bias
