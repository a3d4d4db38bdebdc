"""A config.json from anywhere, with any value in any field: read, or refused in words."""

from __future__ import annotations

import copy
import json
from itertools import product
from pathlib import Path

import pytest

from longtrain.errors import CheckpointError, PlanError
from longtrain.plan import make_plan
from longtrain.recipe.load import parse_recipe
from tests.models.test_pretrained import MODELS, save

TEXT = """
name: tiny
data: {path: data}
training: {sequence_length: 16, steps: 10, batch_size: 4, precision: fp32, activations: none}
optimizer: {lr: 0.01}
model: {init: null}
"""
STRANGE = (-1, 0, -0.5, float("nan"), float("inf"), 1e30, 10**9, 10**19, True, [], {}, [1, "x"], [0.5] * 4, None, "x")


@pytest.mark.parametrize("name", ["llama", "linear", "dynamic", "yarn", "llama3", "longrope", "mistral", "qwen2-window", "opt"])
def test_a_field_of_any_value_is_read_or_refused(name: str, tmp_path: Path) -> None:
    """No other error, nothing endless, and no number that a recipe could not hold."""
    save(tmp_path, MODELS[name])
    path = tmp_path / "config.json"
    content = json.loads(path.read_text())
    recipe = parse_recipe(TEXT, "tiny", [f"model.init={tmp_path}"])
    fields = [(field,) for field in content] + [("rope_parameters", field) for field in content.get("rope_parameters") or ()]
    refused = set()
    for (*above, last), value in product(fields, STRANGE):
        changed = copy.deepcopy(content)
        (changed[above[0]] if above else changed)[last] = value
        path.write_text(json.dumps(changed))
        try:
            make_plan(recipe, 1, "cpu")
        except (CheckpointError, PlanError):
            refused.add(last)
    assert refused >= {"hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "model_type"}
    assert "factor" in refused or name in ("llama", "mistral", "qwen2-window", "opt"), name
