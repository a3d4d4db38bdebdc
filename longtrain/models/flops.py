"""Model FLOPs of training, as integers: forward and backward, recomputation not counted. One multiply-add is two."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from math import prod
from typing import NamedTuple

from longtrain.attention import Band
from longtrain.models.config import ModelConfig
from longtrain.models.families import parameter_shapes

LOOKED_UP = frozenset({"embedding.weight", "positions.weight"})
"""Matrices of which a token takes a row and multiplies with none."""


class Flops(NamedTuple):
    """causal: what documents, band and padding leave as useful work. full: every token, and the whole square of pairs, as others
    print it."""

    causal: int
    full: int


def attention_pairs(band: Band, lengths: Iterable[int]) -> int:
    """Visible (query, key) pairs of documents of these lengths, exactly."""
    return sum(band.pairs(length, length) for length in lengths)


def matmul_parameters(config: ModelConfig) -> int:
    """Parameters that every token is multiplied with: all matrices but LOOKED_UP; the head also if tied."""
    shapes = parameter_shapes(config) | {"head.weight": (config.vocab_size, config.hidden_size)}
    return sum(prod(shape) for name, shape in shapes.items() if len(shape) == 2 and name not in LOOKED_UP)


def training_flops(config: ModelConfig, boundaries: Sequence[Sequence[int]], sequence_length: int) -> Flops:
    """FLOPs of forward and backward over packed sequences of `sequence_length` tokens.

    boundaries: as in `Batch`, per sequence the start of every document and the end of the last. Six per token and matrix parameter,
    12 D H per layer and visible pair (two products forward, four backward).
    """
    band, sequences = Band.causal(config.window), len(boundaries)
    lengths = [end - start for row in boundaries for start, end in pairwise(row)]
    per_token = 6 * matmul_parameters(config)
    per_pair = 12 * config.head_dim * config.heads * config.layers
    return Flops(
        causal=per_token * sum(lengths) + per_pair * attention_pairs(band, lengths),
        full=sequences * (per_token * sequence_length + per_pair * sequence_length**2),
    )
