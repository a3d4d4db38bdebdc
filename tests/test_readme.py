"""The README says what there is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

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
