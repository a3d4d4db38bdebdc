"""The layers decoders are made of. Their parameters hold no values until `initialise` or a checkpoint fills them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longtrain.attention import Keep
from longtrain.kernels.linear_cross_entropy import linear_cross_entropy
from longtrain.models.activations import KeptProduct
from longtrain.models.config import ModelConfig


class Linear(nn.Module):
    """y = x W^T + b over the last dimension; weight [outputs, inputs]."""

    def __init__(self, inputs: int, outputs: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None

    def forward(self, x: Tensor, keep: Keep | None = None, slot: str = "") -> Tensor:
        """keep, slot: where a recomputed block keeps this product, so that it is not computed again."""
        if keep is None:
            return F.linear(x, self.weight, self.bias)
        return KeptProduct.apply(x, self.weight, self.bias, keep, slot)


class Embedding(nn.Module):
    """Rows of weight [vocabulary, hidden] by token."""

    def __init__(self, vocabulary: int, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocabulary, hidden))

    def forward(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.weight)


class RMSNorm(nn.Module):
    """Zhang and Sennrich 2019. fp32 inside, rounded to the input's dtype before the weight, as Hugging Face's LLaMA does."""

    def __init__(self, hidden: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020)."""

    def __init__(self, hidden: int, inner: int, bias: bool = False) -> None:
        super().__init__()
        self.gate = Linear(hidden, inner, bias)
        self.up = Linear(hidden, inner, bias)
        self.down = Linear(inner, hidden, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Head(nn.Module):
    """Logits, or their loss without the logits. A tied head registers the embedding's parameter itself, so that whatever gathers
    parameters by module (ZeRO-3) finds it here too."""

    def __init__(self, config: ModelConfig, embedding: Embedding) -> None:
        super().__init__()
        tied = config.tied_embeddings
        self.weight = embedding.weight if tied else nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))

    def forward(self, hidden: Tensor, labels: Tensor | None = None) -> Tensor:
        """hidden [B, T, C], labels int64 [B, T] -> the sum of cross entropies, fp32 scalar; no labels -> logits, fp32 [B, T, V]."""
        if labels is None:
            return F.linear(hidden, self.weight).float()
        return linear_cross_entropy(hidden.flatten(0, 1), self.weight, labels.flatten())


NORMS = {"rmsnorm": RMSNorm}
MLPS = {"swiglu": SwiGLU}
