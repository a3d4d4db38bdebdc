"""The decoder: pre-norm blocks between an embedding and a head."""

from __future__ import annotations

from torch import Tensor, nn

from longtrain.attention import Attend, AttentionMask, Keep
from longtrain.models.activations import Activations, run_block
from longtrain.models.attention import SelfAttention
from longtrain.models.config import ModelConfig
from longtrain.models.families import choose, family_of
from longtrain.models.layers import MLPS, NORMS, Embedding, Head
from longtrain.models.positions import rotary_tables

POSITIONS = {"rotary": rotary_tables}


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, attend: Attend) -> None:
        super().__init__()
        family = family_of(config)
        norm, mlp = choose("norm", family.norm, NORMS), choose("mlp", family.mlp, MLPS)
        self.attention_norm = norm(config.hidden_size, config.norm_eps)
        self.attention = SelfAttention(config, attend, family.bias)
        self.mlp_norm = norm(config.hidden_size, config.norm_eps)
        self.mlp = mlp(config.hidden_size, config.intermediate_size, family.bias)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: AttentionMask,
        keep: Keep | None = None,
        products: Keep | None = None,
    ) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin, mask, keep, products)
        return x + self.mlp(self.mlp_norm(x))


class Decoder(nn.Module):
    """A causal language model. Its parameters hold no values until `initialise` or a checkpoint fills them.

    attend: how attention is computed, `LocalAttend` or one that holds shards of the sequence; then tokens, positions and labels are
    this rank's shard, and the mask still describes the whole sequence. activations: what blocks keep (`Activations`).

    Raises:
        PlanError: the family, or one of its parts, is not implemented.
    """

    def __init__(self, config: ModelConfig, attend: Attend, activations: str = "none") -> None:
        super().__init__()
        self.config = config
        self.activations = Activations(activations)
        family = family_of(config)
        self.tables = choose("positions", family.positions, POSITIONS)
        self.embedding = Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config, attend) for _ in range(config.layers))
        self.norm = choose("norm", family.norm, NORMS)(config.hidden_size, config.norm_eps)
        self.head = Head(config, self.embedding)

    def forward(self, tokens: Tensor, positions: Tensor, mask: AttentionMask, labels: Tensor | None = None) -> Tensor:
        """tokens, positions, labels: int64 [B, T]; labels are already shifted, -100 bears no loss.

        Returns the sum of the cross entropies of the labels, an fp32 scalar (0 with a graph where there is none); without labels
        the logits, fp32 [B, T, V].
        """
        cos, sin = self.tables(positions, self.config.head_dim, self.config.rope_theta)
        x = self.embedding(tokens)
        for block in self.blocks:
            x = run_block(self.activations, block, x, cos, sin, mask)
        return self.head(self.norm(x), labels)
