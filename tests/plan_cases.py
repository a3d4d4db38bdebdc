"""A small recipe to plan, and a plan as a dictionary."""

from __future__ import annotations

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


def small(*overrides: str) -> Recipe:
    return parse_recipe(TEXT, "small", overrides)


def words(plan: Plan) -> dict[str, str]:
    return {what.strip(): value for what, value in describe(plan)}
