"""The README says what there is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from longtrain.attention import AttentionMask, AttentionSpec, Band

ROOT = Path(__file__).parents[1]
TREE = (ROOT / "README.md").read_text().split("## The tree")[1]
UNITS = sorted(path.parent.name for path in (ROOT / "longtrain").glob("*/__init__.py"))


def section(start: str) -> str:
    """The lines of the tree from one that begins so to the next unit."""
    found = re.search(rf"(?m)^{start}.*\n(?: {{6,}}.*\n)*", TREE)
    assert found is not None, start
    return found[0]


@pytest.mark.parametrize("unit", UNITS)
def test_every_module_is_in_the_tree(unit: str) -> None:
    told = section(f"  {unit}/")
    folder = ROOT / "longtrain" / unit
    there = {path.name for path in folder.rglob("*.py")} - {"__init__.py"}
    named = set(re.findall(r"\w+\.py", told))
    assert named == there


def test_every_script_and_recipe_is_in_the_tree() -> None:
    assert set(re.findall(r"\S+\.(?:py|sh)", section("scripts/"))) == {path.name for path in (ROOT / "scripts").glob("*.*")}
    assert set(re.findall(r"[\w.]+-[\w.-]+|quickstart", section("recipes/"))) == {
        path.stem for path in (ROOT / "recipes").glob("*.yaml")
    }


def test_its_python_runs() -> None:
    blocks = re.findall(r"(?s)```python\n(.*?)```", (ROOT / "README.md").read_text())
    assert blocks
    for block in blocks:
        names: dict[str, Any] = {}
        exec(block, names)
        assert names["out"].shape == names["q"].shape


def test_every_mask_of_the_table_is_there() -> None:
    table = (ROOT / "README.md").read_text().split("What other libraries")[1]
    masks = re.findall(r"`(Attention(?:Mask|Spec)[(.].*?\))`", table)
    names = {"Tq": 3, "Tk": 5, "W": 2, "documents": torch.zeros(1, 3, dtype=torch.int32), "bias": torch.zeros(3, 3)}
    names |= {
        "p": 0.1,
        "seeds": torch.zeros(2, dtype=torch.int64),
        "lengths": [3, 1],
        "band": Band(),
        "seen": torch.ones(3, 3) > 0,
        "torch": torch,
    }
    masks = [mask for mask in masks if "..." not in mask]
    assert len(masks) == 9
    for mask in masks:
        eval(mask, {"AttentionMask": AttentionMask, "AttentionSpec": AttentionSpec, "Band": Band}, names)
