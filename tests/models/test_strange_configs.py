"""A config.json from anywhere, with any value in any field: read, or refused in words."""

from __future__ import annotations

import copy
import json
from itertools import product
from pathlib import Path

import pytest

from longtrain.errors import CheckpointError, PlanError
from longtrain.models.config_json import read_config
from longtrain.models.rope import Yarn
from longtrain.plan import make_plan
from longtrain.recipe.load import parse_recipe
from tests.models.test_pretrained import MODELS, edit, save

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


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_type": "yarn", "factor": 0, "rope_theta": 1e4}, "model.rope_scaling.factor: must be at least 1, found 0"),
        ({"rope_type": "llama3", "factor": 0.0, "rope_theta": 1e4}, "model.rope_scaling.factor: must be at least 1, found 0"),
        ({"full_attention": {"rope_type": "default"}}, "rope_parameters: has parameters of full_attention apart"),
        (False, "rope_parameters: expected an object, found False"),
        ({"rope_type": "default", "rope_theta": 1e-300}, "model.rope_theta: 1e-300 gives no usable frequencies"),
    ],
)
def test_positions_of_another_kind_are_not_passed_over(rope: object, message: str, tmp_path: Path) -> None:
    save(tmp_path, MODELS["llama"])
    edit(tmp_path, rope_parameters=rope)
    with pytest.raises((CheckpointError, PlanError), match=message):
        read_config(tmp_path)


@pytest.mark.parametrize("scaling", [False, 0, "", []])
def test_an_old_scaling_that_is_none_is_refused(scaling: object, tmp_path: Path) -> None:
    save(tmp_path, MODELS["llama"])
    edit(tmp_path, rope_scaling=scaling)
    with pytest.raises(CheckpointError, match="rope_scaling: expected an object"):
        read_config(tmp_path)


def test_what_transformers_takes_for_the_same_is_the_same(tmp_path: Path) -> None:
    save(tmp_path, MODELS["yarn"])
    wanted = read_config(tmp_path)
    scaling = json.loads((tmp_path / "config.json").read_text())["rope_parameters"]
    edit(tmp_path, hidden_act="swish", rope_parameters=scaling | {"mscale": 0, "mscale_all_dim": 0})
    assert read_config(tmp_path) == wanted
    assert isinstance(wanted.rope_scaling, Yarn)
