"""The data section of a recipe to a split: one folder, a mixture, and what is said where data is missing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from longtrain.data.mixture import Mixture
from longtrain.data.opening import open_split, prepare_command
from longtrain.data.packed import PackedSplit
from longtrain.errors import DataError, RecipeError
from longtrain.recipe.load import dump_recipe, parse_recipe
from longtrain.recipe.schema import LongDocuments, Recipe

RECIPE = """
name: tiny
device: cpu
model: {family: llama, vocab_size: 1000, hidden_size: 32, layers: 2, heads: 4, kv_heads: 2, intermediate_size: 48}
data: DATA
training: {sequence_length: 4, steps: 10, batch_size: 4, precision: fp32, activations: none}
optimizer: {lr: 0.01}
"""


def recipe(data: str) -> Recipe:
    return parse_recipe(RECIPE.replace("DATA", data), "recipe.yaml")


@pytest.fixture
def desk(tmp_path: Path, write_prepared: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_prepared(Path("a"), [[1] * 9, [2] * 30], [[3] * 9])
    write_prepared(Path("b"), [[5] * 20], [[6] * 9])
    return tmp_path


def test_one_folder(desk: Path) -> None:
    for data in ("{path: a}", "{sources: {a: 3}}"):
        split = open_split(recipe(data), "train", 1000)
        assert isinstance(split, PackedSplit)
        assert split.fingerprint == split.manifest.fingerprint("train")
    assert open_split(recipe("{path: a}"), "heldout", 1000).split == "heldout"


@pytest.mark.parametrize("mode", LongDocuments)
def test_a_mixture(desk: Path, mode: LongDocuments) -> None:
    chosen = recipe(f"{{sources: {{a: 0.75, b: 0.25}}, long_documents: {mode}}}")
    if mode is LongDocuments.DROP:
        with pytest.raises(DataError, match=r"0 tokens after data\.long_documents drop"):
            open_split(chosen, "train", 1000)
        return
    split = open_split(chosen, "train", 1000)
    assert isinstance(split, Mixture)
    assert split.splits[0].long_documents is mode
    turned = recipe(f"{{sources: {{b: 1, a: 3}}, long_documents: {mode}}}")
    assert open_split(turned, "train", 1000).fingerprint == split.fingerprint
    assert parse_recipe(dump_recipe(chosen), "again") == chosen
    with pytest.raises(DataError, match=r"model\.vocab_size to 1000"):
        open_split(chosen, "train", 999)


@pytest.mark.parametrize(
    ("data", "command"),
    [
        ("{path: gone}", "--source SOURCE --vocab-size 1000 --out gone --sequence-length 4"),
        ("{path: gone, corpus: stdlib}", "--source stdlib --vocab-size 1000 --out gone --sequence-length 4"),
        (
            "{path: my data, corpus: 'hf:emozilla/pg19', tokenizer: some/model}",
            "--source hf:emozilla/pg19 --tokenizer some/model --out 'my data' --sequence-length 4",
        ),
        ("{sources: {a: 1, gone: 2}}", "--source SOURCE --vocab-size 1000 --out gone --sequence-length 4"),
    ],
)
def test_missing_data_names_the_command(desk: Path, data: str, command: str) -> None:
    with pytest.raises(DataError) as refusal:
        open_split(recipe(data), "train", 1000)
    assert f"\n  python scripts/prepare_data.py {command}\n" in str(refusal.value)
    assert "no such data folder" in str(refusal.value)
    path = recipe(data).data.path
    assert path is None or prepare_command(recipe(data), path, 1000) in str(refusal.value)


def test_several_missing_folders_are_named_at_once(desk: Path) -> None:
    with pytest.raises(DataError, match=r"(?s)--out x .*--out y "):
        open_split(recipe("{sources: {x: 1, a: 1, y: 1}}"), "train", 1000)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("{}", "data.path: no data: set path"),
        ("{sources: {}}", "data.path: no data: set path"),
        ("{path: a, sources: {b: 1}}", "data.sources: path is set too"),
        ("{sources: {a: 0}}", "data.sources: must be greater than 0"),
        ("{sources: {a: -1}}", "data.sources: must be greater than 0"),
        ("{sources: {a: .nan}}", "data.sources"),
        ("{sources: {a: .inf}}", "data.sources"),
        ("{path: a, long_documents: cut}", "data.long_documents: expected one of keep, split, drop"),
        ("{path: a, long_document: keep}", "did you mean 'long_documents'"),
    ],
)
def test_data_sections_that_are_refused(data: str, message: str) -> None:
    with pytest.raises(RecipeError) as refusal:
        recipe(data)
    assert f"recipe.yaml:5: {message}" in str(refusal.value) or message in str(refusal.value)
    assert "recipe.yaml:5: data" in str(refusal.value)
