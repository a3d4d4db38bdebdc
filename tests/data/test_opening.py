"""The data section of a recipe to a split: one folder, a mixture, and what is said where data is missing."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import tokenizers

from longtrain.data.json_tokenizer import JsonTokenizer, find_tokenizer
from longtrain.data.manifest import MANIFEST, TOKENIZER, TOKENIZER_JSON
from longtrain.data.mixture import Mixture
from longtrain.data.opening import compare_tokenizers, open_split, prepare_command
from longtrain.data.packed import PackedSplit
from longtrain.data.tokenizer import Encoder, Tokenizer, entry_of, train_tokenizer
from longtrain.errors import DataError, RecipeError
from longtrain.models.tokenizer_json import tokenizer_files
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


def test_weights_decide_the_vocabulary(desk: Path) -> None:
    begun = parse_recipe(re.sub("model: .*", "model: {init: weights}", RECIPE).replace("DATA", "{path: a}"), "recipe.yaml")
    with pytest.raises(DataError, match=r"^model\.init weights has 999 tokens, .*: prepare it .* the tokenizer of that model"):
        open_split(begun, "train", 999)


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


class TestTokenizers:
    """Of the data, and of the weights that training begins with."""

    @pytest.fixture
    def compare(self, desk: Path, write_prepared: Callable[..., Path]) -> Callable[..., str | None]:
        """What is said where the data has `tokenizer`, and the weights have `files`."""

        def told(tokenizer: Encoder, files: Mapping[str, bytes], data: str = "{path: data}") -> str | None:
            folder = write_prepared(Path("data"), [[1] * 9, [2] * 30])
            (folder / TOKENIZER).unlink()
            (folder / tokenizer.file).write_bytes(tokenizer.model)
            manifest = json.loads((folder / MANIFEST).read_bytes())
            (folder / MANIFEST).write_text(json.dumps(manifest | {"tokenizer": entry_of(tokenizer).model_dump()}))
            Path("weights").mkdir()
            for name, content in files.items():
                Path("weights", name).write_bytes(content)
            model = "model: {init: weights}"
            return compare_tokenizers(parse_recipe(re.sub("model: .*", model, RECIPE).replace("DATA", data), "recipe.yaml"))

        return told

    def test_the_same(self, compare: Callable[..., str | None], tiny_model: bytes) -> None:
        assert compare(Tokenizer(tiny_model), {TOKENIZER: tiny_model, TOKENIZER_JSON: b"not read"}) is None

    def test_the_same_in_another_file(self, compare: Callable[..., str | None], tiny_model: bytes, tmp_path: Path) -> None:
        (tmp_path / "given.model").write_bytes(tiny_model)
        tokenizer = Tokenizer(tiny_model)
        exported = tokenizer_files(tmp_path / "given.model", tokenizer.bos, tokenizer.eos)
        assert compare(tokenizer, {name: json.dumps(content).encode() for name, content in exported.items()}) is None

    def test_the_same_as_vocabulary_and_merges(self, compare: Callable[..., str | None], json_tokenizer: Path) -> None:
        model = json.loads(json_tokenizer.read_bytes())["model"]
        merges = "\n".join(" ".join(pair) for pair in model["merges"])
        names = b'{"bos_token": "<s>", "eos_token": "</s>"}'
        files = {"vocab.json": json.dumps(model["vocab"]).encode(), "merges.txt": merges.encode(), "tokenizer_config.json": names}
        assert compare(find_tokenizer(str(json_tokenizer)), files) is None

    @pytest.mark.parametrize("data", ["{path: data}", "{sources: {gone: 1, data: 2}}"])
    def test_another_is_refused(
        self, compare: Callable[..., str | None], tiny_model: bytes, json_tokenizer: Path, data: str
    ) -> None:
        field = "data.path" if "path" in data else "data.sources"
        message = rf"^{field}: data was prepared with another tokenizer than that of model\.init weights, .* --tokenizer weights; "
        with pytest.raises(DataError, match=rf"{message}.* move tokenizer\.json out of weights$"):
            compare(Tokenizer(tiny_model), {TOKENIZER_JSON: json_tokenizer.read_bytes()}, data)

    def test_another_of_the_same_kind_and_size_is_refused(self, compare: Callable[..., str | None], tiny_model: bytes) -> None:
        other = train_tokenizer([f"{n} green bottles hanging on the wall, für immer und # ewig\n" for n in range(50)], 320)
        with pytest.raises(DataError, match="another tokenizer"):
            compare(Tokenizer(tiny_model), {TOKENIZER: other})

    @pytest.mark.parametrize("extended", ["data", "weights"])
    def test_a_larger_vocabulary(self, compare: Callable[..., str | None], json_tokenizer: Path, extended: str) -> None:
        made = tokenizers.Tokenizer.from_file(str(json_tokenizer))
        made.add_tokens(["naïve"])
        base, more = json_tokenizer.read_bytes(), made.to_str().encode()
        of_data, of_weights = (more, base) if extended == "data" else (base, more)
        told = compare(JsonTokenizer(of_data, 0, 1), {TOKENIZER_JSON: of_weights})
        assert told == "data has the tokens of model.init weights, but its tokenizer cuts text in another way"

    def test_other_ends_of_documents(self, compare: Callable[..., str | None], json_tokenizer: Path) -> None:
        model = json_tokenizer.read_bytes()
        assert compare(JsonTokenizer(model, None, 2), {TOKENIZER_JSON: model}) == (
            "documents of data begin with their text and end with token 2; by the tokenizer of model.init weights they would begin "
            "with token 0 and end with token 1"
        )

    def test_what_cannot_be_compared(self, compare: Callable[..., str | None], tiny_model: bytes) -> None:
        told = compare(Tokenizer(tiny_model), {TOKENIZER: b"no model"})
        assert told == (
            "nobody can tell whether data was prepared with the tokenizer of model.init weights: weights/tokenizer.model: is not a "
            "SentencePiece model, or is damaged"
        )

    @pytest.mark.parametrize("data", ["{path: data}", "{path: gone}"])
    def test_nothing_to_compare(self, compare: Callable[..., str | None], tiny_model: bytes, data: str) -> None:
        assert compare(Tokenizer(tiny_model), {} if data == "{path: data}" else {TOKENIZER: b"no model"}, data) is None


def test_several_missing_folders_are_named_at_once(desk: Path) -> None:
    with pytest.raises(DataError, match=r"(?s)--out x .*--out y "):
        open_split(recipe("{sources: {x: 1, a: 1, y: 1}}"), "train", 1000)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("{}", "data.path: no data: set path"),
        ("{sources: {}}", "data.path: no data: set path"),
        ("{path: a, sources: {b: 1}}", "data.sources: path is set too"),
        ("{sources: {a: 0}}", "data.sources.a: must be greater than 0"),
        ("{sources: {a: -1}}", "data.sources.a: must be greater than 0"),
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
