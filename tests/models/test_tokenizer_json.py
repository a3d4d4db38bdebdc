from __future__ import annotations

import io
import random
import sysconfig
from dataclasses import replace
from pathlib import Path

import pytest
import sentencepiece
import torch
from tokenizers import Tokenizer as Tokenize
from tokenizers.models import BPE
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from longtrain.data.tokenizer import Tokenizer, train_tokenizer
from longtrain.errors import DataError
from longtrain.models import Decoder, ModelConfig
from longtrain.models.huggingface import write_folder

SOURCES = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))

TEXTS = [
    "",
    " ",
    "  ",
    "\n",
    "\t\tdef f(x):\n\t\t\treturn x\n",
    "Hello, world",
    " leading and trailing ",
    "    four\n        eight\n            twelve     five",
    "x = 12345.6789e-10  # numbers",
    "naïve café, Ελληνικά, русский, 中文字符, 日本語, العربية",
    "emoji 🙂👩‍👩‍👧 and a combining e\u0301",
    "<s> </s> <unk> <0x41> <0x0A>",
    "a literal ▁ and ▁▁ and x▁y",
    "null \x00 bell \x07 replacement \ufffd bom \ufeff line\u2028separator nbsp\u00a0.",
    "\r\n windows\r\nlines\r\n",
    *(" " * n + "x" for n in range(1, 70)),
    *("ab" * n + "a" * n for n in range(1, 20)),
    "=" * 79 + "\n" + "-" * 80 + "\n" + "#" * 33,
]


@pytest.fixture(scope="module")
def model() -> bytes:
    return train_tokenizer((path.read_text("utf-8") for path in SOURCES[:40]), 2000)


def exported(model: bytes, folder: Path, build_config: ModelConfig) -> PreTrainedTokenizerBase:
    (folder / "trained.model").write_bytes(model)
    decoder = Decoder(build_config, attend=None)  # type: ignore[arg-type]
    write_folder(
        folder / "out",
        build_config,
        decoder.named_parameters(),
        tokenizer_model=folder / "trained.model",
        bos=1,
        eos=2,
        dtype=torch.float32,
    )
    return AutoTokenizer.from_pretrained(folder / "out")


def random_texts(count: int) -> list[str]:
    generator = random.Random(0)
    alphabet = "    \n\t_ab01=-#(){}é中🙂▁<s>/"
    return ["".join(generator.choices(alphabet, k=generator.randrange(60))) for _ in range(count)]


@pytest.mark.parametrize("window", [None, 8])
def test_ids_and_text_equal_those_of_training(model: bytes, tmp_path: Path, small: ModelConfig, window: int | None) -> None:
    theirs, ours = exported(model, tmp_path, replace(small, window=window)), Tokenizer(model)
    for text in [*TEXTS, *random_texts(2000), *(path.read_text("utf-8") for path in SOURCES[40:60])]:
        ids = ours.encode(text)
        assert theirs.encode(text, add_special_tokens=False) == ids, repr(text[:200])
        assert theirs.encode(text) == [ours.bos, *ids]
        assert theirs.decode(ids) == text
    assert theirs.decode([ours.bos, *ours.encode("text"), ours.eos], skip_special_tokens=True) == "text"
    assert (theirs.bos_token_id, theirs.eos_token_id, len(theirs)) == (ours.bos, ours.eos, ours.vocab_size)
    assert theirs(["pair"], ["of texts"])["input_ids"][0].count(ours.bos) == 2


def test_a_model_with_a_dummy_prefix(tmp_path: Path, small: ModelConfig) -> None:
    """LLaMA 2's tokenizer has one; a literal sign for a space is a space there."""
    theirs = exported(_train(add_dummy_prefix=True), tmp_path, small)
    ours = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "trained.model"))
    for text in [*TEXTS, *random_texts(500)]:
        ids = ours.encode(text)
        assert theirs.encode(text, add_special_tokens=False) == ids, repr(text)
        assert theirs.decode(ids) == ours.decode(ids)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"model_type": "unigram"}, "not a BPE model"),
        ({"byte_fallback": False}, "no byte fallback"),
        ({"normalization_rule_name": "nmt_nfkc"}, "normalises"),
        ({"remove_extra_whitespaces": True}, "normalises"),
        ({"user_defined_symbols": ["<tool>"]}, "user-defined"),
        ({"eos_id": -1}, "no BOS or EOS"),
    ],
)
def test_what_cannot_be_written_exactly_is_refused(
    tmp_path: Path, small: ModelConfig, options: dict[str, object], reason: str
) -> None:
    with pytest.raises(DataError, match=reason):
        exported(_train(**options), tmp_path, small)


def _train(**options: object) -> bytes:
    lines = [line for path in SOURCES[:8] for line in path.read_text("utf-8").splitlines()]
    model = io.BytesIO()
    defaults = {
        "vocab_size": 600,
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(  # pyright: ignore[reportAttributeAccessIssue]
        sentence_iterator=iter(lines), model_writer=model, **(defaults | options)
    )
    return model.getvalue()


def test_a_tokenizer_json_is_exported_as_it_is(tmp_path: Path, small: ModelConfig) -> None:
    tokenizer = Tokenize(BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    model = Decoder(small, attend=None)  # type: ignore[arg-type]

    def write(name: str, bos: int | None, eos: int) -> None:
        named = model.named_parameters()
        path = tmp_path / "tokenizer.json"
        write_folder(tmp_path / name, small, named, tokenizer_model=path, bos=bos, eos=eos, dtype=torch.float32)

    write("out", 3, 4)
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (loaded.bos_token_id, loaded.eos_token_id) == (3, 4)
    assert loaded("abba", add_special_tokens=False).input_ids == [2, 1, 0]
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()
    write("no-bos", None, 4)
    assert AutoTokenizer.from_pretrained(tmp_path / "no-bos").bos_token is None
    with pytest.raises(DataError, match=r"tokenizer.json: has no token 9"):
        write("bad", 3, 9)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match=r"tokenizer.json: cannot be read"):
        write("bad", 3, 4)
    assert not (tmp_path / "bad").exists()
