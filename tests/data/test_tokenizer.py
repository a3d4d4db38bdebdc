from __future__ import annotations

import io
import random
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from longtrain.data import tokenizer as module
from longtrain.data.tokenizer import SAMPLE_PIECE, SPACE, Tokenizer, sample_pieces, train_tokenizer
from longtrain.errors import DataError

AWKWARD = [
    "",
    " ",
    "  a ",
    "\0",
    "\t\tx",
    "a▁b",
    "▁▁",
    "\r\n",
    "<s></s><unk><0x41>",
    "\ufffd",
    "\ufeffx",
    "漢字🎉",
    "▅",
    "\U0010ffff",
    " ⁇ ",
]


@pytest.fixture(scope="module")
def tokenizer(tiny_model: bytes) -> Tokenizer:
    return Tokenizer(tiny_model)


@pytest.mark.parametrize("text", AWKWARD)
def test_awkward_text_is_restored(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(deadline=None, max_examples=300)
@given(text=st.text() | st.text(alphabet=" ▁\n\tab1é"))
def test_any_text_is_restored(tiny_model: bytes, text: str) -> None:
    tokenizer = Tokenizer(tiny_model)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(2 < index < tokenizer.vocab_size for index in ids)


def test_encode_many_equals_encode_of_each(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode_many(AWKWARD) == [tokenizer.encode(text) for text in AWKWARD]
    assert tokenizer.encode_many([]) == []


def test_bos_and_eos_leave_no_trace(tokenizer: Tokenizer) -> None:
    assert (tokenizer.bos, tokenizer.eos, tokenizer.vocab_size) == (1, 2, 320)
    assert tokenizer.decode([tokenizer.bos, *tokenizer.encode("a b"), tokenizer.eos]) == "a b"


def _llama_like() -> bytes:
    """A model made elsewhere: with a dummy prefix, as LLaMA's."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(  # pyright: ignore[reportAttributeAccessIssue]
        sentence_iterator=iter(["the quick brown fox jumps over it"] * 9),
        model_writer=model,
        model_type="bpe",
        vocab_size=300,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return model.getvalue()


@pytest.mark.parametrize("foreign", [False, True])
def test_parts_of_a_long_text_give_the_tokens_of_the_whole(
    tiny_model: bytes, foreign: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _llama_like() if foreign else tiny_model
    words = random.Random(0)
    text = "".join(words.choice(["the", "quick", "fox", " ", " ", "  ", "\n", "é"]) for _ in range(3000))
    whole = Tokenizer(model).encode(text)
    monkeypatch.setattr(module, "PART_CHARACTERS", 50)
    parts = Tokenizer(model)
    assert len(list(parts._runs(text))) > 20
    assert parts.encode(text) == whole
    assert parts.decode(whole) == text


def test_a_foreign_model_reads_the_literal_sign_as_a_space() -> None:
    tokenizer = Tokenizer(_llama_like())
    assert tokenizer.decode(tokenizer.encode(SPACE)) == " "


def test_training_is_deterministic(tiny_model: bytes) -> None:
    sentences = [f"word{n % 7} and more\n" for n in range(100)]
    assert train_tokenizer(sentences, 290) == train_tokenizer(sentences, 290)
    assert Tokenizer(tiny_model).sha256 == Tokenizer(tiny_model).sha256


def test_training_learns_indentation_and_single_digits() -> None:
    tokenizer = Tokenizer(train_tokenizer(["        deep\n    less\n2024 2024 2024\n"] * 50, 285))
    assert len(tokenizer.encode("        ")) == 1
    assert len(tokenizer.encode("2024")) == 4


@pytest.mark.parametrize(
    ("sentences", "vocab_size", "message"),
    [
        (["hello"], 4096, "use at most"),
        (["hello"], 100, "too small"),
        (["hello"], 0, "must be positive"),
        ([], 300, "add text"),
        (["\0"], 300, "add text"),
    ],
)
def test_training_refusals(sentences: list[str], vocab_size: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        train_tokenizer(sentences, vocab_size)


@pytest.mark.parametrize("damage", ["empty", "text", "noise", "head", "tail"])
def test_broken_models_are_refused(tiny_model: bytes, tmp_path: Path, damage: str) -> None:
    content = {
        "empty": b"",
        "text": b"not a model\n" * 9,
        "noise": random.Random(3).randbytes(2000),
        "head": tiny_model[:1000],
        "tail": tiny_model[:-7],
    }[damage]
    path = tmp_path / "broken.model"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"broken\.model"):
        Tokenizer.load(path)


def test_missing_model_and_model_without_bos(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        Tokenizer.load(tmp_path / "none.model")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(  # pyright: ignore[reportAttributeAccessIssue]
        sentence_iterator=iter(["abc abc"]),
        model_writer=model,
        model_type="char",
        vocab_size=8,
        bos_id=-1,
        minloglevel=2,
        hard_vocab_limit=False,
    )
    with pytest.raises(DataError, match="no BOS"):
        Tokenizer(model.getvalue())


@given(text=st.text(max_size=50), repeats=st.integers(1, 200))
@settings(deadline=None, max_examples=50)
def test_sample_pieces_are_the_text(text: str, repeats: int) -> None:
    pieces = list(sample_pieces(text * repeats))
    assert "".join(pieces) == text * repeats
    assert all(0 < len(piece) <= SAMPLE_PIECE for piece in pieces)
