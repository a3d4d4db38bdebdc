"""A small recipe to plan, weights to begin with, and a plan as a dictionary."""

from __future__ import annotations

import json
from pathlib import Path

from longtrain.models.config import ModelConfig
from longtrain.models.config_json import config_json
from longtrain.plan import Plan
from longtrain.plan.describe import describe
from longtrain.recipe.load import parse_recipe
from longtrain.recipe.schema import Recipe

TEXT = """
name: small
model: {family: llama, vocab_size: 50, hidden_size: 24, layers: 2, heads: 4, kv_heads: 2, intermediate_size: 40}
data: {path: data}
training: {sequence_length: 64, steps: 10, batch_size: 12, precision: fp32, activations: none}
optimizer: {lr: 0.01}
"""
LLAMA = ModelConfig("llama", 50, 24, 2, 4, 2, 6, 40, 64, rope_theta=500.0, norm_eps=1e-6, window=9, init_std=0.1)


def small(*overrides: str) -> Recipe:
    return parse_recipe(TEXT, "small", overrides)


def folder(path: Path, config: ModelConfig) -> Path:
    """A Hugging Face folder as far as plans read it."""
    import torch

    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config_json(config, torch.float32, 1, 2)))
    return path


def words(plan: Plan) -> dict[str, str]:
    return {what.strip(): value for what, value in describe(plan)}
