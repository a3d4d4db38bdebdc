"""How a decoder knows where a token stands: rotary angles for attention, or learned rows added to the embedding."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longtrain.models.config import ModelConfig
from longtrain.models.families import POSITION_OFFSET
from longtrain.models.rope import tables

Tables = tuple[Tensor, Tensor]
"""cos and sin, fp32 [B, T, 1, D/2]."""


class Rotary(nn.Module):
    """Su et al. 2021; without parameters."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dim, self.theta, self.scaling = config.head_dim, config.rope_theta, config.rope_scaling

    def forward(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tables | None]:
        """x [B, T, C] as it is, and the tables of int64 positions [B, T]."""
        return x, tables(positions, self.dim, self.theta, self.scaling)


class Learned(nn.Module):
    """Rows of weight [max_positions + POSITION_OFFSET, C], added to the embeddings."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.max_positions + POSITION_OFFSET, config.hidden_size))

    def forward(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tables | None]:
        """x [B, T, C] plus the rows of int64 positions [B, T]; no tables."""
        return x + F.embedding(positions + POSITION_OFFSET, self.weight), None


POSITIONS: dict[str, type[Rotary] | type[Learned]] = {"rotary": Rotary, "learned": Learned}
