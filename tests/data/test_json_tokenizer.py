from __future__ import annotations

import json
import pickle
import random
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from longtrain.data.json_tokenizer import JsonTokenizer, find_tokenizer, open_tokenizer
from longtrain.data.tokenizer import Tokenizer, entry_of
from longtrain.errors import DataError

TEXTS = ["", " ", "a b", "  the\tfox\n", "für alle 漢字🎉", "</s>", "<s>a</s>b<pad>", "\0", "▁"]


@pytest.fixture(scope="session")
def tokenizer(json_tokenizer: Path) -> JsonTokenizer:
    found = find_tokenizer(str(json_tokenizer))
    assert isinstance(found, JsonTokenizer)
    return found


def test_bos_and_eos_of_a_file_alone_are_the_usual_names(tokenizer: JsonTokenizer, json_tokenizer: Path) -> None:
    assert (tokenizer.bos, tokenizer.eos) == (0, 1)
    assert tokenizer.file == "tokenizer.json"
    assert tokenizer.model == json_tokenizer.read_bytes()


@given(text=st.text() | st.sampled_from(TEXTS))
def test_any_text_is_restored_and_spells_no_special_token(tokenizer: JsonTokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert not {0, 1, 2} & set(ids)
    assert tokenizer.decode([0, *ids, 1]) == text
    assert all(index < tokenizer.vocab_size for index in ids)


def test_encode_many_and_pickled_copies_agree(tokenizer: JsonTokenizer) -> None:
    one = [tokenizer.encode(text) for text in TEXTS]
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert one == tokenizer.encode_many(TEXTS) == tokenizer.encode_many(TEXTS, threads=1) == copy.encode_many(TEXTS)
    assert (copy.bos, copy.eos, copy.sha256) == (tokenizer.bos, tokenizer.eos, tokenizer.sha256)


def test_what_the_file_would_add_or_cut_is_left_out(json_tokenizer: Path, tmp_path: Path, tokenizer: JsonTokenizer) -> None:
    changed = tokenizers.Tokenizer.from_file(str(json_tokenizer))
    changed.enable_truncation(3)
    changed.enable_padding(length=64)
    changed.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    changed.save(str(tmp_path / "tokenizer.json"))
    text = "the quick brown fox jumps"
    assert find_tokenizer(str(tmp_path)).encode(text) == tokenizer.encode(text)


@pytest.mark.parametrize(
    ("config", "options", "expected"),
    [
        ({"bos_token": "<pad>", "eos_token": "</s>"}, {}, (2, 1)),
        ({"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": {"content": "</s>"}}, {}, (0, 1)),
        ({"bos_token": None, "eos_token": "</s>"}, {}, (None, 1)),
        ({"eos_token": "<pad>"}, {"bos": "<s>"}, (0, 2)),
        ({"bos_token": "<s>", "eos_token": "</s>"}, {"bos": "none"}, (None, 1)),
        ({"bos_token": "<s>", "eos_token": "</s>"}, {"bos": "none", "eos": "<s>"}, (None, 0)),
        ({"model_max_length": 9}, {}, (0, 1)),
    ],
)
def test_who_decides_on_bos_and_eos(
    json_tokenizer: Path, tmp_path: Path, config: dict[str, object], options: dict[str, str], expected: tuple[int | None, int]
) -> None:
    (tmp_path / "tokenizer.json").write_bytes(json_tokenizer.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    for name in (tmp_path, tmp_path / "tokenizer.json"):
        found = find_tokenizer(str(name), **options)
        assert (found.bos, found.eos) == expected


def test_opening_again_needs_the_manifest_alone(tokenizer: JsonTokenizer, tmp_path: Path, tiny_model: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(tokenizer.model)
    (tmp_path / "tokenizer.model").write_bytes(tiny_model)
    again = open_tokenizer(tmp_path, entry_of(tokenizer))
    assert (again.bos, again.eos, again.encode("a b")) == (0, 1, tokenizer.encode("a b"))
    other = open_tokenizer(tmp_path, entry_of(Tokenizer(tiny_model)))
    assert (other.file, other.bos) == ("tokenizer.model", 1)


def write(folder: Path, content: bytes) -> str:
    (folder / "tokenizer.json").write_bytes(content)
    return str(folder / "tokenizer.json")


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"{}", b"[]", b"null", b'{"model": 1}', b"\xff\xfe", b"[" * 100_000, random.Random(1).randbytes(500)],
    ids=range(9),
)
def test_broken_files_are_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(DataError, match=r"tokenizer\.json: is not a tokenizer\.json"):
        find_tokenizer(write(tmp_path, content))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "none.json",
            {},
            r"--tokenizer .*none\.json: no such file or folder; name one of these: a SentencePiece \.model, .* hf:NAME",
        ),
        ("empty", {}, r"empty: holds none of tokenizer\.json, tokenizer\.model, vocab\.json"),
        ("FILE", {"eos": "<nope>"}, r"has no token '<nope>'; choose another with --eos"),
        ("FILE", {"bos": "<nope>"}, r"has no token '<nope>'; choose another with --bos"),
        ("SENTENCEPIECE", {"eos": "</s>"}, r"--bos and --eos go with a tokenizer\.json"),
        ("no-eos", {}, r"says nowhere which token ends a document: name one with --eos TOKEN; its special tokens are <x>, <y>"),
        ("bare", {}, r"name one with --eos TOKEN$"),
    ],
)
def test_refusals(
    json_tokenizer: Path, tmp_path: Path, tiny_model: bytes, name: str, options: dict[str, str], message: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "sp.model").write_bytes(tiny_model)
    text = json_tokenizer.read_text()
    for folder, change in (("no-eos", ("<x>", "<y>")), ("bare", None)):
        (tmp_path / folder).mkdir()
        content = json.loads(text)
        content["added_tokens"] = [
            token | {"content": change[token["id"]]} for token in content["added_tokens"] if change and token["id"] < 2
        ]
        (tmp_path / folder / "tokenizer.json").write_text(json.dumps(content))
    path = {"FILE": json_tokenizer, "SENTENCEPIECE": tmp_path / "sp.model"}.get(name, tmp_path / name)
    with pytest.raises(DataError, match=message):
        find_tokenizer(str(path), **options)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON, so it is damaged"),
        ("[]", "is not a JSON object, so it is damaged"),
        (
            '{"bos_token": 3, "eos_token": "</s>"}',
            "bos_token: 3 is no token, which is text or an object with text as 'content'; mend",
        ),
        ('{"bos_token": "<s>", "eos_token": []}', r"eos_token: \[\] is no token"),
        ('{"bos_token": "<s>", "eos_token": {"content": null}}', r'eos_token: {"content": null} is no token'),
    ],
)
@pytest.mark.parametrize("vocabulary", [False, True])
def test_a_broken_config_is_refused(json_tokenizer: Path, tmp_path: Path, content: str, message: str, vocabulary: bool) -> None:
    (tmp_path / "tokenizer_config.json").write_text(content)
    name = write(tmp_path, json_tokenizer.read_bytes())
    if vocabulary:
        tokenizers.Tokenizer.from_file(name).model.save(str(tmp_path))
        name = str(tmp_path / "vocab.json")
    with pytest.raises(DataError, match=rf"tokenizer_config\.json: {message}"):
        find_tokenizer(name)


def test_options_go_before_a_broken_config(json_tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": 3, "eos_token": []}')
    found = find_tokenizer(write(tmp_path, json_tokenizer.read_bytes()), bos="<s>", eos="</s>")
    assert (found.bos, found.eos) == (0, 1)


def test_a_folder_may_be_named_as_the_source_is(json_tokenizer: Path) -> None:
    assert find_tokenizer(f"hf:{json_tokenizer.parent}").sha256 == find_tokenizer(str(json_tokenizer)).sha256


def test_vocabulary_and_merges_become_a_file(json_tokenizer: Path, tmp_path: Path, tokenizer: JsonTokenizer) -> None:
    tokenizers.Tokenizer.from_file(str(json_tokenizer)).model.save(str(tmp_path))
    config = {"bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    found = find_tokenizer(str(tmp_path))
    assert (found.bos, found.eos, found.vocab_size) == (1, 1, tokenizer.vocab_size)
    assert found.encode_many(TEXTS) == tokenizer.encode_many(TEXTS)
    assert found.model == find_tokenizer(str(tmp_path / "vocab.json")).model
    assert [found.decode(found.encode(text)) for text in TEXTS] == TEXTS
    (tmp_path / "merges.txt").write_text("x")
    with pytest.raises(DataError, match=r"vocab\.json: is no vocabulary of a byte-level BPE with its merges\.txt"):
        find_tokenizer(str(tmp_path))


def test_an_unreachable_hub_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def unreachable(*words: object, **options: object) -> str:
        raise ConnectionError("nobody there\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(DataError, match=r"^--tokenizer hf:a/b: the hub does not give it \(nobody there\); check the name"):
        find_tokenizer("hf:a/b")


def test_a_model_of_the_hub_is_a_folder(monkeypatch: pytest.MonkeyPatch, json_tokenizer: Path) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, allow_patterns: str(json_tokenizer.parent))
    assert find_tokenizer("hf:a/b").encode("a b") == find_tokenizer(str(json_tokenizer)).encode("a b")


def test_a_tokenizer_that_was_trained_with_dropout_gives_the_same_tokens_each_time() -> None:
    pieces = [chr(ord("a") + index) for index in range(4)]
    merges = [("a", "b"), ("ab", "c"), ("abc", "d")]
    vocab = {piece: index for index, piece in enumerate(["</s>", *pieces, "ab", "abc", "abcd"])}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges, dropout=0.5))
    chosen = JsonTokenizer(made.to_str().encode(), None, 0)
    assert {tuple(chosen.encode("abcd")) for _ in range(20)} == {(vocab["abcd"],)}
