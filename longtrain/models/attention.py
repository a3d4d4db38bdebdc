"""Self attention of a decoder block."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor, nn

from longtrain.attention import PLAIN, Attend, AttentionMask, AttentionSpec, Keep
from longtrain.attention.dropout import Noise
from longtrain.kernels.layers import Layers
from longtrain.models.config import ModelConfig
from longtrain.models.layers import Linear
from longtrain.models.positions import Tables


class SelfAttention(nn.Module):
    """Projections and rotary positions around an injected `attend`, which may hold a shard of the sequence.

    biases: which of the projections add one.
    """

    def __init__(self, config: ModelConfig, attend: Attend, biases: Collection[str], layers: Layers) -> None:
        super().__init__()
        hidden, self.head_dim = config.hidden_size, config.head_dim
        self.query = Linear(hidden, config.heads * config.head_dim, "query" in biases)
        self.key = Linear(hidden, config.kv_heads * config.head_dim, "key" in biases)
        self.value = Linear(hidden, config.kv_heads * config.head_dim, "value" in biases)
        self.output = Linear(config.heads * config.head_dim, hidden, "output" in biases)
        self.attend, self.rotary, self.dropout = attend, layers.rotary, config.attention_dropout

    def forward(
        self,
        x: Tensor,
        tables: Tables | None,
        mask: AttentionMask,
        noise: Noise | None = None,
        keep: Keep | None = None,
        products: Keep | None = None,
    ) -> Tensor:
        """x [B, T, C] -> [B, T, C]; tables: of rotary positions, if it has any. noise: of dropout, None where nothing is dropped.
        keep, products: stores of a recomputed block."""
        q, k, v = (
            linear(x, products, slot).unflatten(-1, (-1, self.head_dim))
            for linear, slot in ((self.query, "query"), (self.key, "key"), (self.value, "value"))
        )
        if tables is not None:
            q, k = self.rotary(q, k, *tables)
        spec = AttentionSpec(dropout=self.dropout, dropout_seed=noise.seeds) if noise is not None and self.dropout else PLAIN
        out = self.attend(q, k, v, mask, spec, keep=keep)
        return self.output(out.flatten(2), products, "output")
