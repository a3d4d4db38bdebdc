"""`longtrain recipes`: what it lists and prints, and that every broken recipe is one message and exit code 2."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from longtrain.models.config import ModelConfig
from longtrain.recipe.explain import FIELDS, dotted, is_section
from longtrain.recipe.load import builtin_recipes, dump_recipe, load_recipe
from tests.plan_cases import LLAMA, folder
from tests.recipe.bad_paths import MISSING
from tests.recipe.bad_recipes import BAD_RECIPES, BASE
from tests.recipe.bad_together import SOUND
from tests.user import command


def test_ls_is_what_the_name_alone_does() -> None:
    said = command("recipes", "ls")
    assert said.code == 0
    assert said == command("recipes")
    assert [line.split()[0] for line in said.text.splitlines()[1:]] == list(builtin_recipes())


@pytest.mark.parametrize("name", builtin_recipes())
def test_show_prints_a_recipe_in_itself(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    said = command("recipes", "show", name, "--set", "seed=5")
    assert said.code == 0
    Path("mine.yaml").write_text(said.text)
    assert load_recipe("mine.yaml") == load_recipe(name, ["seed=5"])
    begun = load_recipe(name).model.init is not None
    assert all(f"{path[-1]}:" in said.text for path in FIELDS if not (begun and path[0] == "model"))


@pytest.mark.parametrize("weights", [LLAMA, replace(LLAMA, family="qwen2", tied_embeddings=True)], ids=["llama", "qwen2"])
def test_what_show_prints_goes_with_the_weights(weights: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Defaults that nobody chose would contradict them."""
    monkeypatch.chdir(tmp_path)
    folder(Path("w"), weights)
    Path("mine.yaml").write_text("extends: llama-1b-32k\nname: mine\nmodel: {init: w, window: null}\n")
    said = command("recipes", "show", "mine.yaml", "--set", "model.rope_scaling.kind=none")
    Path("again.yaml").write_text(said.text)
    assert "\nmodel:\n  init: w\n  rope_theta: 500000.0\n  window: null\n  rope_scaling:\n    kind: none\ndata:\n" in said.text
    planned = command("plan", "again.yaml")
    assert (planned.code, planned.text) == (0, command("plan", "mine.yaml").text)


def test_check_reads_all_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("child.yaml").write_text("extends: quickstart\nname: child\n")
    Path("bad.yaml").write_text(BASE.replace("steps:", "stepz:", 1))
    said = command("recipes", "check", "quickstart", "child.yaml")
    assert (said.code, said.text) == (0, "quickstart: sound\nchild.yaml: sound\n")
    said = command("recipes", "check", "quickstart", "bad.yaml", "nowhere.yaml", "child.yaml")
    assert said.code == 2
    assert said.text.splitlines() == [
        "quickstart: sound",
        "child.yaml: sound",
        "error: bad.yaml:15: training.stepz: unknown key; did you mean 'steps'?",
        "nowhere.yaml: no such file; check the path",
    ]
    assert command("recipes", "check").code == 2
    assert command("recipes", "show", "nowhere.yaml").code == 2


def test_every_broken_recipe_is_one_message_and_exit_code_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(BAD_RECIPES) >= 300
    for old, new, message in BAD_RECIPES:
        Path("x.yaml").write_text(BASE.replace(old, new, 1), encoding="utf-8")
        said = command("recipes", "check", "x.yaml")
        assert (said.code, said.text) == (2, f"error: x.yaml:{message}\n")


def test_what_is_next_to_them_is_sound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for old, new in SOUND:
        assert old in BASE
        Path("x.yaml").write_text(BASE.replace(old, new, 1), encoding="utf-8")
        assert command("recipes", "check", "x.yaml").text == "x.yaml: sound\n"


@pytest.mark.parametrize(("old", "new", "begins", "advises"), MISSING)
def test_missing_files_are_told_with_the_line_that_names_them(
    old: str, new: str, begins: str, advises: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert old in BASE
    Path("x.yaml").write_text(BASE.replace(old, new, 1), encoding="utf-8")
    said = command("train", "--recipe", "x.yaml")
    assert said.code == 2
    assert said.text.startswith(f"error: x.yaml:{begins}")
    assert advises in said.text
    assert [path.name for path in tmp_path.iterdir()] == ["x.yaml"], "nothing is written"


SECTIONS = [path for path in FIELDS if is_section(path)]


@pytest.mark.parametrize("section", SECTIONS, ids=[dotted(path) for path in SECTIONS])
def test_an_unknown_key_of_every_section_is_refused(
    section: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = dump_recipe(load_recipe("quickstart")).splitlines()
    indent = "  " * len(section)
    at = lines.index(f"{indent[2:]}{section[-1]}:") + 1
    Path("x.yaml").write_text("\n".join([*lines[:at], f"{indent}qqq: 1", *lines[at:]]))
    said = command("recipes", "check", "x.yaml")
    assert said.code == 2
    assert said.text.startswith(f"error: x.yaml:{at + 1}: {dotted(section)}.qqq: unknown key; the keys here are ")
    assert len(said.text.splitlines()) == 1
