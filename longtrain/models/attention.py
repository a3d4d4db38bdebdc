"""Self attention of a decoder block."""

from __future__ import annotations

from torch import Tensor, nn

from longtrain.attention import PLAIN, Attend, AttentionMask, Keep
from longtrain.models.config import ModelConfig
from longtrain.models.layers import Linear
from longtrain.models.positions import rotate


class SelfAttention(nn.Module):
    """Projections and rotary positions around an injected `attend`, which may hold a shard of the sequence."""

    def __init__(self, config: ModelConfig, attend: Attend, bias: bool = False) -> None:
        super().__init__()
        hidden, self.head_dim = config.hidden_size, config.head_dim
        self.query = Linear(hidden, config.heads * config.head_dim, bias)
        self.key = Linear(hidden, config.kv_heads * config.head_dim, bias)
        self.value = Linear(hidden, config.kv_heads * config.head_dim, bias)
        self.output = Linear(config.heads * config.head_dim, hidden, bias)
        self.attend = attend

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: AttentionMask,
        keep: Keep | None = None,
        products: Keep | None = None,
    ) -> Tensor:
        """x [B, T, C] -> [B, T, C]; cos, sin: `rotary_tables` of its positions. keep, products: stores of a recomputed block."""
        q, k, v = (
            linear(x, products, slot).unflatten(-1, (-1, self.head_dim))
            for linear, slot in ((self.query, "query"), (self.key, "key"), (self.value, "value"))
        )
        out = self.attend(rotate(q, cos, sin), rotate(k, cos, sin), v, mask, PLAIN, keep=keep)
        return self.output(out.flatten(2), products, "output")
