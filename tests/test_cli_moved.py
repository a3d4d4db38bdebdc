"""The recipe.yaml of a run's folder that lies elsewhere than that recipe says."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.user import command, snapshot

pytest_plugins = ("tests.desks",)
pytestmark = pytest.mark.usefixtures("trained")

LONGER = ("--set", "training.steps=4")


def _from(recipe: str, *arguments: str) -> tuple[int, str]:
    said = command("train", "--recipe", recipe, *LONGER, *arguments)
    return said.code, said.text


def _moved(place: str = "moved/elsewhere") -> str:
    Path(place).parent.mkdir(exist_ok=True)
    shutil.move("run", place)
    return f"{place}/recipe.yaml"


@pytest.mark.parametrize("place", ["moved/elsewhere", "my run"])
def test_a_moved_run_does_not_begin_again(place: str) -> None:
    recipe = _moved(place)
    before = snapshot()
    setting = f"'output={place}'" if " " in place else f"output={place}"
    # the recipe names its output, so that another name leads to no other folder
    for arguments in ((), ("--set", "name=other"), ("--until", "4")):
        code, text = _from(recipe, *arguments)
        assert code == 2
        assert f"{recipe}:4: output: {place} holds this recipe and checkpoints, " in text
        assert f"its run would begin again in run; to go on from them, give --set {setting}; to begin another run" in text
    assert snapshot() == before
    code, text = _from(recipe, "--set", f"output={place}")
    assert code == 0, text
    assert "step 4/4" in text
    assert "step 1/4" not in text
    assert not Path("run").exists()


def test_nor_where_another_run_took_its_place() -> None:
    shutil.copytree("run", "copy")
    code, text = _from("copy/recipe.yaml")
    assert code == 2
    assert "--set output=copy;" in text


def test_nor_does_one_seen_from_another_working_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Path("run").resolve()
    monkeypatch.chdir(run)
    code, text = _from("recipe.yaml")
    assert code == 2
    # the folder of a run is none to work in
    assert f"to go on from them, give --set output={run} in a folder outside it;" in text


def test_what_a_person_asked_for_is_done() -> None:
    for number, arguments in enumerate((("--set", "output=next-0"), ("--set", "output=next-1", "--resume", "never"))):
        code, text = _from("run/recipe.yaml", *arguments)
        assert code == 0, text
        assert "step 1/4" in text
        assert Path(f"next-{number}/checkpoints").is_dir()
    code, text = _from(_moved(), "--resume", "moved/elsewhere")
    assert code == 0, text
    assert "step 4/4" in text
    assert "step 1/4" not in text


def test_a_name_is_asked_for_where_it_names_the_folder() -> None:
    recipe = Path("run/recipe.yaml")
    recipe.write_text(recipe.read_text().replace("output: run\n", "output: null\n"))
    assert "its run would begin again in runs/tiny;" in _from(str(recipe))[1]
    code, text = _from(str(recipe), "--set", "name=other")
    assert code == 0, text
    assert Path("runs/other/checkpoints").is_dir()


def test_a_link_is_the_same_folder() -> None:
    Path("linked").symlink_to("run")
    for recipe in ("linked/recipe.yaml", str(Path("run/recipe.yaml").resolve())):
        code, text = _from(recipe)
        assert code == 0, text
    assert not Path("runs").exists()


def test_a_recipe_beside_unfinished_checkpoints_begins() -> None:
    recipe = Path(_moved())
    for step in recipe.parent.glob("checkpoints/step-*"):
        step.rename(f"{step}.tmp")
    code, text = _from(str(recipe))
    assert code == 0, text
    assert "step 1/4" in text
