"""Small decoders that differ in everything a configuration can say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from longtrain.attention import AttentionMask, Band
from longtrain.attention.reference import ReferenceKernel
from longtrain.kernels.layers import Layers, choose_layers
from longtrain.kernels.local import LocalAttend
from longtrain.models import Decoder, ModelConfig, initialise
from longtrain.models.rope import Yarn

PLAIN = choose_layers()
SMALL = ModelConfig(
    family="llama",
    vocab_size=97,
    hidden_size=32,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=8,
    intermediate_size=48,
    max_positions=64,
    init_std=0.2,
)


@pytest.fixture
def small() -> ModelConfig:
    return SMALL


@pytest.fixture(
    params=[
        {},
        {"kv_heads": 4, "tied_embeddings": True},
        {"kv_heads": 1, "head_dim": 16, "rope_theta": 500000.0, "norm_eps": 1e-6},
        {"window": 5, "hidden_act": "gelu_pytorch_tanh"},
        {"heads": 3, "kv_heads": 1, "head_dim": 4},
        {"family": "qwen2", "rope_scaling": Yarn(4.0, 16), "hidden_act": "gelu"},
        {"family": "opt", "kv_heads": 4, "tied_embeddings": True},
    ],
    ids=["gqa", "tied", "wide-heads", "window-geglu-tanh", "odd-heads", "qwen2-yarn-geglu", "opt"],
)
def config(request: pytest.FixtureRequest) -> ModelConfig:
    return replace(SMALL, **request.param)


@pytest.fixture
def build() -> Callable[..., Decoder]:
    def _build(config: ModelConfig, activations: str = "none", attend: object = None, layers: Layers = PLAIN) -> Decoder:
        model = Decoder(config, attend or LocalAttend(ReferenceKernel()), activations, layers)  # type: ignore[arg-type]
        initialise(model, seed=1)
        return model

    return _build


@pytest.fixture
def plain_batch() -> Callable[..., tuple[Tensor, Tensor, AttentionMask, Tensor]]:
    """tokens, positions, mask, labels of rows that are one document each."""

    def _batch(config: ModelConfig, length: int = 17, rows: int = 2) -> tuple[Tensor, Tensor, AttentionMask, Tensor]:
        tokens = torch.randint(config.vocab_size, (rows, length))
        labels = torch.randint(config.vocab_size, (rows, length))
        labels[0, 3] = labels[1, -1] = -100
        positions = torch.arange(length).expand(rows, length)
        return tokens, positions, AttentionMask(Band.causal(config.window)), labels

    return _batch
