"""The floors of docs/architecture.md: imports go down only, never to a sibling, and guarded modules stay where they are."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "longtrain"
FLOORS = {
    "errors": 0,
    "cores": 0,
    "batch": 0,
    "files": 0,
    "attention": 0,
    "recipe": 0,
    "kernels": 1,
    "models": 2,
    "parallel": 2,
    "data": 2,
    "components": 2,
    "doctor": 3,
    "plan": 3,
    "interop": 3,
    "train": 4,
    "evaluate": 4,
    "cli": 5,
}
# on the ground floor, the nouns that others are made of; attention and recipe know nothing of each other
GROUND = {"errors", "batch", "cores", "files"}
ONLY_IN = {
    "triton": ("kernels/",),
    "deepspeed": ("parallel/deepspeed.py",),
    "wandb": ("train/experiment.py",),
    "transformers": ("interop/",),
    "diffusers": ("interop/",),
    "yaml": ("recipe/",),
}
FILES = sorted(PACKAGE.rglob("*.py"))


def _imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            names.add(node.module)
            if node.module == "longtrain" or node.module in {f"longtrain.{unit}" for unit in FLOORS}:
                names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _unit(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    unit = _unit(path)
    if unit == "__init__":
        assert not [name for name in _imports(path) if name.startswith("longtrain")]
        return
    assert unit in FLOORS, f"{unit} stands on no floor: name it in FLOORS and in docs/architecture.md"
    for name in _imports(path):
        if not name.startswith("longtrain."):
            continue
        other = name.split(".")[1]
        if other not in FLOORS:
            continue
        down = FLOORS[other] < FLOORS[unit] or other == unit or other in GROUND
        assert down, f"{path.relative_to(PACKAGE)} (floor {FLOORS[unit]}) imports {other} (floor {FLOORS[other]})"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_guarded_modules(path: Path) -> None:
    relative = path.relative_to(PACKAGE).as_posix()
    for name in _imports(path):
        for module, places in ONLY_IN.items():
            if name.split(".")[0] == module:
                assert relative.startswith(places), f"{relative} imports {module}, which belongs into {places}"
    if relative != "parallel/launch.py":
        for node in ast.walk(ast.parse(path.read_text())):
            environ = isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "putenv")
            assert not environ, f"{relative} reads the environment; only parallel/launch.py does"


def test_recipe_imports_no_torch() -> None:
    """The recipe is pydantic and yaml only, attention torch only."""
    for path in (PACKAGE / "recipe").glob("*.py"):
        assert not {"torch", "numpy"} & {name.split(".")[0] for name in _imports(path)}
    for path in (PACKAGE / "attention").glob("*.py"):
        roots = {name.split(".")[0] for name in _imports(path)} - sys.stdlib_module_names - {"longtrain"}
        assert roots <= {"torch"}, path


def test_imports_without_optional_packages() -> None:
    """Every module imports where triton, deepspeed, wandb and transformers are missing."""
    names = [".".join(("longtrain", *path.relative_to(PACKAGE).with_suffix("").parts)) for path in FILES]
    names = [name.removesuffix(".__init__") for name in names]
    code = (
        "import sys, importlib\n"
        "for name in ('triton', 'deepspeed', 'wandb', 'transformers'): sys.modules[name] = None\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
