"""The layers decoders are made of. Their parameters hold no values until `initialise` or a checkpoint fills them.

What they compute with parameters happens inside the module that owns these, so that whatever gathers parameters by module (ZeRO-3)
finds them; the functions that compute it are injected.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longtrain.attention import Keep
from longtrain.kernels.layers import Layers
from longtrain.models.activations import KeptProduct
from longtrain.models.config import HIDDEN_ACTS, ModelConfig


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

    def __init__(self, hidden: int, eps: float, layers: Layers) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden))
        self.eps, self.layers = eps, layers

    def forward(self, x: Tensor, branch: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(norm of the sum, the sum) of a residual stream and the branch that joins it, both [..., C]; None: nothing joins it."""
        if branch is None:
            return self.layers.rms_norm(x, self.weight, self.eps), x
        return self.layers.add_rms_norm(x, branch, self.weight, self.eps)


class LayerNorm(nn.Module):
    """Ba et al. 2016."""

    def __init__(self, hidden: int, eps: float, layers: Layers) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden))
        self.bias = nn.Parameter(torch.empty(hidden))
        self.eps, self.layers = eps, layers

    def forward(self, x: Tensor, branch: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As RMSNorm's."""
        if branch is None:
            return self.layers.layer_norm(x, self.weight, self.bias, self.eps), x
        return self.layers.add_layer_norm(x, branch, self.weight, self.bias, self.eps)


class GatedMLP(nn.Module):
    """down(act(gate(x)) * up(x)) (Shazeer 2020): SwiGLU or GeGLU by config.hidden_act. biases: which linear layers add one."""

    def __init__(self, config: ModelConfig, biases: Collection[str], layers: Layers) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate = Linear(hidden, inner, "gate" in biases)
        self.up = Linear(hidden, inner, "up" in biases)
        self.down = Linear(inner, hidden, "down" in biases)
        self.gated, self.activation = layers.gated, HIDDEN_ACTS[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.gated(self.gate(x), self.up(x), self.activation))


class ReLU(nn.Module):
    """down(relu(up(x))). biases: which of the linear layers add one."""

    def __init__(self, config: ModelConfig, biases: Collection[str], layers: Layers) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.up = Linear(hidden, inner, "up" in biases)
        self.down = Linear(inner, hidden, "down" in biases)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x)))


class Head(nn.Module):
    """Logits, or their loss without the logits. A tied head registers the embedding's parameter itself, so that whatever gathers
    parameters by module (ZeRO-3) finds it here too."""

    def __init__(self, config: ModelConfig, embedding: Embedding, layers: Layers) -> None:
        super().__init__()
        tied = config.tied_embeddings
        self.weight = embedding.weight if tied else nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.loss = layers.linear_cross_entropy

    def forward(self, hidden: Tensor, labels: Tensor | None = None) -> Tensor:
        """hidden [B, T, C], labels int64 [B, T] -> the sum of cross entropies, fp32 scalar; no labels -> logits, fp32 [B, T, V]."""
        if labels is None:
            return F.linear(hidden, self.weight).float()
        return self.loss(hidden.flatten(0, 1), self.weight, labels.flatten()).loss


NORMS = {"rmsnorm": RMSNorm, "layernorm": LayerNorm}
MLPS = {"gated": GatedMLP, "relu": ReLU}
