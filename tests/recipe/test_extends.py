"""A recipe may be another one with some keys replaced."""

from pathlib import Path

import pytest

from longtrain.data.opening import prepare_command
from longtrain.errors import RecipeError
from longtrain.recipe.load import dump_recipe, load_recipe
from longtrain.recipe.model import ModelSection
from tests.recipe.bad_recipes import BASE

CHILD = """\
extends: ./parent.yaml
name: child
training:
  steps: 50
  precision: bf16
model:
  rope_scaling: {kind: linear, factor: 2}
"""


@pytest.fixture
def family(write) -> Path:
    write(CHILD)
    Path("parent.yaml").write_text(BASE + "output: elsewhere\n")
    return Path("x.yaml")


def refusal(*overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe("x.yaml", overrides)
    return str(caught.value)


def test_sections_are_replaced_key_by_key(family: Path) -> None:
    parent, child = load_recipe(Path("parent.yaml")), load_recipe(family)
    assert (child.name, child.output) == ("child", None)
    assert (child.training.steps, child.training.precision) == (50, "bf16")
    assert child.training.sequence_length == parent.training.sequence_length
    assert child.model.rope_scaling.factor == 2
    assert child.model.model_copy(update={"rope_scaling": parent.model.rope_scaling}) == parent.model
    assert (child.optimizer, child.schedule, child.data) == (parent.optimizer, parent.schedule, parent.data)
    assert load_recipe(family, ["training.steps=60", "name=other"]).training.steps == 60
    assert "extends" not in dump_recipe(child)


@pytest.mark.parametrize(
    ("data", "corpus"),
    [
        ("{path: mine}", None),
        ("{path: mine, corpus: hf:me/mine}", "hf:me/mine"),
        ("{path: null, sources: {mine: 1}}", None),
        ("{path: data/tiny}", "hf:some/text"),
        ("{long_documents: drop}", "hf:some/text"),
    ],
)
def test_the_corpus_goes_with_its_path(family: Path, data: str, corpus: str | None) -> None:
    """Else the command that is advised where data is missing would prepare the parent's text as the child's."""
    parent = BASE.replace("path: data/tiny", "path: data/tiny\n  corpus: hf:some/text\n  tokenizer: hf:some/tokenizer")
    Path("parent.yaml").write_text(parent)
    family.write_text(f"{CHILD}data: {data}\n")
    child = load_recipe(family)
    assert (child.data.corpus, child.data.tokenizer) == (corpus, "hf:some/tokenizer")
    advised = prepare_command(child, next(iter(child.data.folders)), None)
    assert f"--source {corpus or 'SOURCE'} --tokenizer hf:some/tokenizer --out " in advised


def shape_of(text: str, *overrides: str) -> dict[str, object]:
    Path("x.yaml").write_text(text)
    return load_recipe("x.yaml", overrides).model.model_dump()


LLAMA_3 = "name: child\nmodel: {preset: llama-3-8b%s}\ndata: {path: d}\n" + (
    "training: {sequence_length: 8, steps: 9, batch_size: 4, precision: fp32, activations: none}\noptimizer: {lr: 0.1}\n"
)


@pytest.mark.parametrize("spelled", ["", ", layers: 3", ", rope_theta: 1e6", ", kv_heads: null"])
def test_a_preset_takes_the_place_of_the_shape_below(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spelled: str) -> None:
    monkeypatch.chdir(tmp_path)
    wanted = shape_of(LLAMA_3 % spelled)
    parents = ("llama-1b-32k", "quickstart", "opt-125m-4k")
    for parent in parents:
        init = load_recipe(parent).model.init
        assert shape_of(f"extends: {parent}\nname: child\nmodel: {{preset: llama-3-8b{spelled}}}\n") == wanted | {"init": init}
        changes = [f"model.{change.replace(': ', '=')}" for change in f"preset: llama-3-8b{spelled}".split(", ")]
        assert load_recipe(parent, changes).model.model_dump() == wanted | {"init": init}
    assert shape_of("extends: opt-125m-4k\nname: child\nmodel: {preset: opt-125m}\n")["positions"] == {"extend": "interpolate"}
    kept = shape_of("extends: quickstart\nname: child\nmodel: {dropout: 0.25}\n", "model.preset=llama-7b")
    assert (kept["dropout"], kept["tied_embeddings"]) == (0.25, False)


def test_weights_take_the_place_of_the_shape_below(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for parent in ("quickstart", "llama-1b-32k"):
        wanted = ModelSection(init="hf/llama", rope_theta=load_recipe(parent).model.rope_theta)
        assert shape_of(f"extends: {parent}\nname: child\nmodel: {{init: hf/llama}}\n") == wanted.model_dump()
        assert load_recipe(parent, ["model.init=hf/llama"]).model == wanted
    assert load_recipe("quickstart", ["model.init=hf/llama", "model.window=9"]).model == ModelSection(init="hf/llama", window=9)
    # more of the same model: how its context is extended stays
    further = shape_of("extends: llama3-8b-512k\nname: child\nmodel: {init: runs/256k/huggingface}\n")
    assert further == load_recipe("llama3-8b-512k").model.model_dump() | {"init": "runs/256k/huggingface"}


@pytest.mark.parametrize(
    ("child", "overrides", "tokenizer"),
    [
        ("model: {init: weights/other}", [], None),
        ("model: {init: weights/other}\ndata: {tokenizer: hf:my/own}", [], "hf:my/own"),
        ("model: {init: weights/opt-125m}", [], "hf:facebook/opt-125m"),
        ("model: {init: null}", [], "hf:facebook/opt-125m"),
        ("seed: 3", ["model.init=weights/other"], None),
        ("seed: 3", ["model.init=weights/other", "data.tokenizer=hf:my/own"], "hf:my/own"),
    ],
)
def test_the_tokenizer_goes_with_the_weights(write, child: str, overrides: list[str], tokenizer: str | None) -> None:
    recipe = load_recipe(write(f"extends: opt-125m-4k\nname: child\n{child}\n"), overrides)
    assert recipe.data.tokenizer == tokenizer
    wanted = tokenizer or recipe.model.init
    assert f" --tokenizer {wanted} " in prepare_command(recipe, "data/fineweb-opt", None)


def test_a_built_in_recipe_is_extended_by_its_name(write) -> None:
    path = write("extends: llama-7b-32k\nname: mine\ntraining: {steps: 2000}\n")
    assert load_recipe(path).training.steps == 2000
    assert load_recipe(path).model == load_recipe("llama-7b-32k").model


def test_problems_name_the_file_that_has_the_key(family: Path) -> None:
    Path("parent.yaml").write_text(
        BASE.replace("lr: 1e-3", "lr: fast").replace("seed: 3", "seed: 017").replace("heads: 4", "heads: 5")
    )
    family.write_text(CHILD.replace("steps: 50", "stepz: 50"))
    assert refusal().split("\n") == [
        "x.yaml:4: training.stepz: unknown key; did you mean 'steps'?",
        "parent.yaml:2: seed: 017 begins with a zero, which YAML may take for octal; drop the zero, or quote it as text",
        "parent.yaml:8: model.heads: 5 heads do not divide hidden_size 32; change one of them, or set head_dim",
        "parent.yaml:9: model.kv_heads: 2 key/value heads do not divide 5 heads; choose a divisor of heads",
        "parent.yaml:21: optimizer.lr: expected a number, found the text 'fast'",
    ]


@pytest.mark.parametrize(
    ("child", "message"),
    [
        ("extends: [a, b]\nname: c\n", "x.yaml:1: extends: expected one recipe, by the name of a built-in one or by its path"),
        ("name: c\nextends: llama-7b-23k\n", "x.yaml:2: extends: no built-in recipe 'llama-7b-23k'; did you mean 'llama-7b-32k'?"),
        ("name: c\nextends: ./none.yaml\n", "x.yaml:2: extends: none.yaml: no such file"),
        ("name: c\nextends: ./x.yaml\n", "x.yaml:2: extends: x.yaml extends another recipe itself; extend that one directly"),
        ("extends: ./parent.yaml\n", "x.yaml:1: name: required key is missing"),
    ],
)
def test_refusals(family: Path, child: str, message: str) -> None:
    family.write_text(child)
    assert refusal().startswith(message)
