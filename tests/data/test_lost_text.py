"""Text that a tokenizer cannot write is refused or counted, and the name of a special token inside a text stays text."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from tokenizers import models, pre_tokenizers

from longtrain.data import prepare as module
from longtrain.data import sources
from longtrain.data.json_tokenizer import JsonTokenizer, find_tokenizer
from longtrain.data.opening import SAMPLE, _sample_ids
from longtrain.data.prepare import prepare
from longtrain.errors import DataError
from tests.interrupted import interrupt_preparation

NAMES = ["<unk>", "<s>", "</s>"]
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def entries(extra: Iterable[str] = ()) -> dict[str, int]:
    return {token: index for index, token in enumerate([*NAMES, *LETTERS, *extra])}


def bpe(unk: str | None = None, extra: Iterable[str] = (), byte_fallback: bool = False) -> models.Model:
    vocab = entries([*extra, "th", "the"])
    return models.BPE(vocab=vocab, merges=[("t", "h"), ("th", "e")], unk_token=unk, byte_fallback=byte_fallback)


def unigram(unk: int | None = None) -> models.Model:
    pieces = [*NAMES, *LETTERS, "the", "▁", "<", "</", "s>", ">"]
    return models.Unigram([(piece, 0.0 if piece in NAMES else -2.0) for piece in pieces], unk, False)


def made(model: models.Model, special: Iterable[str] = NAMES) -> bytes:
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace() if isinstance(model, models.Unigram) else pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(special))
    return tokenizer.to_str().encode()


LOSING: dict[str, Callable[[], models.Model]] = {
    "bpe": bpe,
    "bpe whose unknown token is not there": lambda: bpe("<nowhere>"),
    "bpe with some bytes": lambda: bpe(extra=["<0xC3>"], byte_fallback=True),
    "unigram": unigram,
}


@pytest.mark.parametrize(("name", "workers"), [*((name, 1) for name in LOSING), ("bpe", 2)])
def test_text_that_would_be_lost_is_refused(tmp_path: Path, name: str, workers: int) -> None:
    (tmp_path / "tokenizer.json").write_bytes(made(LOSING[name]()))
    texts = [f"the fox {LETTERS[n % 26]}" for n in range(40)]
    texts[7] = texts[9] = "the naïve fox"
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    options = {"tokenizer": tmp_path / "tokenizer.json", "held_out": 0.2, "workers": workers}
    message = (
        r"a\.jsonl:8: the tokenizer has no token for 'ï' \(U\+00EF\), no bytes .* would be lost; choose .* leave --tokenizer out$"
    )
    with pytest.raises(DataError, match=message):
        prepare(str(tmp_path / "a.jsonl"), tmp_path / "out", **options)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts if "ï" not in text))
    assert prepare(str(tmp_path / "a.jsonl"), tmp_path / "out", **options).unknown == 0


def test_where_words_are_tokens_the_word_is_named() -> None:
    model = made(models.WordLevel(entries(["the", "fox"]), unk_token="<nowhere>"))
    with pytest.raises(DataError, match="no token for 'quick', no bytes"):
        JsonTokenizer(model, 1, 2).encode("the quick fox")


def test_bytes_and_unknown_tokens_lose_nothing_silently() -> None:
    everything = bpe(extra=[f"<0x{byte:02X}>" for byte in range(256)], byte_fallback=True)
    found = JsonTokenizer(made(everything), 1, 2)
    assert found.encode("ï") == [len(entries()) + byte for byte in "ï".encode()]
    assert found.unk is None
    for model in (bpe("<unk>"), unigram(0), models.WordLevel(entries(), unk_token="<unk>")):
        tokenizer = JsonTokenizer(made(model), 1, 2)
        assert tokenizer.unk == pickle.loads(pickle.dumps(tokenizer)).unk == 0
        assert 0 in tokenizer.encode("ï")


@pytest.mark.parametrize("special", [NAMES, [*NAMES, *entries()]])
def test_a_vocabulary_of_special_tokens_alone_is_refused(tmp_path: Path, special: list[str]) -> None:
    content = json.loads(made(bpe(), special))
    content["model"] |= {"vocab": {}, "merges": []}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"tokenizer\.json: has no tokens but special ones, so it can write no text; choose"):
        find_tokenizer(str(tmp_path))


def characters() -> bytes:
    """A SentencePiece model without bytes."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(  # pyright: ignore[reportAttributeAccessIssue]
        sentence_iterator=iter([LETTERS] * 9), model_writer=model, model_type="char", vocab_size=30, minloglevel=2
    )
    return model.getvalue()


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_unknown_tokens_are_counted(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "PIECE_BYTES", 200)
    monkeypatch.setattr(module, "JOURNAL_SECONDS", -1)
    (tmp_path / name).write_bytes(made(bpe("<unk>")) if name.endswith("json") else characters())
    texts = [f"aïb{'cd' * n}" + "é" * (n == 5) for n in range(40)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    options = {"tokenizer": tmp_path / name, "held_out": 0.2, "workers": 1}
    straight = prepare(str(tmp_path / "a.jsonl"), tmp_path / "straight", **options)
    total = sum(int(lengths.sum()) for lengths in straight.lengths.values())
    assert straight.unknown == 41
    assert f"warning: 41 of {total:,} tokens are unknown, so the text" in straight.report()

    interrupt_preparation(str(tmp_path / "a.jsonl"), tmp_path / "out", 30, **options)
    assert prepare(str(tmp_path / "a.jsonl"), tmp_path / "out", **options).unknown == 41


def test_an_end_that_is_the_unknown_token_too_is_not_counted(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(made(bpe("</s>")))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"the {letter}"}) + "\n" for letter in LETTERS))
    options = {"tokenizer": tmp_path, "held_out": 0.2, "bos": "</s>", "eos": "</s>"}
    prepared = prepare(str(tmp_path / "a.jsonl"), tmp_path / "out", **options)
    assert prepared.unknown == 0
    assert "warning: " not in prepared.report()


SPELLING: dict[str, Callable[[], models.Model]] = {
    "unigram": lambda: unigram(0),
    "words": lambda: models.WordLevel(entries(["the"]), unk_token="<unk>"),
    "bpe of whole words": lambda: models.BPE(vocab=entries(["<", ">", "/", "s>"]), merges=[("s", ">")], ignore_merges=True),
}


@pytest.mark.parametrize("special", [NAMES, []], ids=["special", "not marked"])
@pytest.mark.parametrize("name", SPELLING)
def test_no_text_spells_a_special_token(name: str, special: list[str]) -> None:
    tokenizer = JsonTokenizer(made(SPELLING[name](), special), 1, 2)
    for text in ("<s>", "the</s>the", "the <s> </s>"):
        assert not {1, 2} & set(tokenizer.encode(text)), text
    plain = tokenizers.Tokenizer.from_buffer(tokenizer.model)
    if name != "bpe of whole words":
        for text in ("the fox < a", "s> the", "</ s>"):
            assert tokenizer.encode(text) == plain.encode(text, add_special_tokens=False).ids, "cut where nothing is spelt"


def test_the_ends_are_no_text_where_the_file_does_not_mark_them_as_special() -> None:
    content = json.loads(made(bpe(extra="<>/")))
    content["added_tokens"] = [token | {"special": False} for token in content["added_tokens"]]
    tokenizer = JsonTokenizer(json.dumps(content).encode(), 1, 2)
    assert tokenizer.decode(tokenizer.encode("a</s>b")).replace(" ", "") == "a</s>b"
    assert not {1, 2} & set(tokenizer.encode("a</s>b <s>"))


def test_two_that_cannot_write_the_sample_are_compared_by_characters() -> None:
    one, other = (JsonTokenizer(made(bpe(extra=extra)), 1, 2) for extra in ("()", ")("))
    assert _sample_ids(one) == _sample_ids(JsonTokenizer(one.model, 1, 2))
    assert _sample_ids(one) != _sample_ids(other)
    assert len(_sample_ids(one)) == len(SAMPLE)
