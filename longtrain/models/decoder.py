"""The decoder: pre-norm blocks between an embedding and a head."""

from __future__ import annotations

from torch import Tensor, nn

from longtrain.attention import Attend, AttentionMask, Keep
from longtrain.attention.dropout import Noise
from longtrain.kernels.layers import Layers, choose_layers
from longtrain.models.activations import Activations, run_block
from longtrain.models.attention import SelfAttention
from longtrain.models.config import ModelConfig
from longtrain.models.families import choose, family_of
from longtrain.models.layers import MLPS, NORMS, Embedding, Head
from longtrain.models.positions import POSITIONS, Tables

PLAIN_LAYERS = choose_layers()


class Block(nn.Module):
    """x + dropout(attention(norm(x))), then x + dropout(mlp(norm(x)))."""

    def __init__(self, config: ModelConfig, attend: Attend, layers: Layers) -> None:
        super().__init__()
        family = family_of(config)
        norm, mlp = choose("norm", family.norm, NORMS), choose("mlp", family.mlp, MLPS)
        self.attention_norm = norm(config.hidden_size, config.norm_eps, layers)
        self.attention = SelfAttention(config, attend, family.biases, layers)
        self.mlp_norm = norm(config.hidden_size, config.norm_eps, layers)
        self.mlp = mlp(config, family.biases, layers)
        self.dropout = config.dropout

    def forward(
        self,
        x: Tensor,
        tables: Tables | None,
        mask: AttentionMask,
        noise: Noise | None = None,
        keep: Keep | None = None,
        products: Keep | None = None,
    ) -> Tensor:
        y, x = self.attention_norm(x)
        added = self.attention(y, tables, mask, None if noise is None else noise.branch(0), keep, products)
        y, x = self.mlp_norm(x, self._drop(added, noise, 1))
        return x + self._drop(self.mlp(y), noise, 2)

    def _drop(self, x: Tensor, noise: Noise | None, place: int) -> Tensor:
        return x if noise is None else noise.branch(place).drop(x, self.dropout)


class Decoder(nn.Module):
    """A causal language model. Its parameters hold no values until `initialise` or a checkpoint fills them.

    attend: how attention is computed, `LocalAttend` or one that holds shards of the sequence; then tokens, positions and labels are
    this rank's shard, and the mask still describes the whole sequence. activations: what blocks keep (`Activations`). layers: the
    functions that compute everything else, plain torch by default.

    Raises:
        PlanError: the family, or one of its parts, is not implemented.
    """

    def __init__(self, config: ModelConfig, attend: Attend, activations: str = "none", layers: Layers = PLAIN_LAYERS) -> None:
        super().__init__()
        self.config = config
        self.activations = Activations(activations)
        family = family_of(config)
        norm, positions = choose("norm", family.norm, NORMS), choose("positions", family.positions, POSITIONS)
        self.embedding = Embedding(config.vocab_size, config.hidden_size)
        self.positions = positions(config)
        self.blocks = nn.ModuleList(Block(config, attend, layers) for _ in range(config.layers))
        self.norm = norm(config.hidden_size, config.norm_eps, layers)
        self.head = Head(config, self.embedding, layers)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        mask: AttentionMask,
        labels: Tensor | None = None,
        noise: Noise | None = None,
    ) -> Tensor:
        """tokens, positions, labels: int64 [B, T]; labels are already shifted, -100 bears no loss. noise: what dropout depends on;
        it is needed, and used, in training mode of a model that has dropout.

        Returns the sum of the cross entropies of the labels, an fp32 scalar (0 with a graph where there is none); without labels
        the logits, fp32 [B, T, V].
        """
        drops = self.training and (self.config.dropout > 0 or self.config.attention_dropout > 0)
        if drops and noise is None:
            raise ValueError("a model with dropout needs noise in training mode")
        x, tables = self.positions(self.embedding(tokens), positions)
        for number, block in enumerate(self.blocks):
            own = noise.branch(number) if drops and noise is not None else None
            x = run_block(self.activations, block, x, tables, mask, own)
        return self.head(self.norm(x)[0], labels)
