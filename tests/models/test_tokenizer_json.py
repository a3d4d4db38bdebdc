from __future__ import annotations

import io
import json
import logging
import random
import shutil
import sysconfig
from dataclasses import replace
from pathlib import Path

import pytest
import sentencepiece
import torch
from tokenizers import Regex, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Tokenize
from tokenizers.models import BPE
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from longtrain.data.json_tokenizer import find_tokenizer
from longtrain.data.tokenizer import Encoder, Tokenizer, train_tokenizer
from longtrain.errors import DataError
from longtrain.models import Decoder, ModelConfig
from longtrain.models.huggingface import APART, write_folder
from longtrain.models.tokenizer_json import QWEN2_WORDS

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


FAMILIES: dict[str, dict[str, object]] = {
    "llama": {},
    "mistral": {"window": 8},
    "qwen2": {"family": "qwen2"},
    "opt": {"family": "opt", "kv_heads": 4, "tied_embeddings": True},
}
PLAIN_TEXTS = ["def foo(x):\n    return 1\n", "  12345.67\t\n\n  I'll see\r\n", " le caf\u00e9, le cafe\u0301 ▁ 中文 🙂", ""]


def byte_level(words: Regex | None = None, normalizer: object = None) -> Tokenize:
    """A tokenizer.json as GPT-2's with <s>, </s> and <pad>, or with other words."""
    made = Tokenize(BPE())
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words is None)
    split = letters if words is None else pre_tokenizers.Sequence([pre_tokenizers.Split(words, "isolated"), letters])
    made.pre_tokenizer, made.decoder, made.normalizer = split, decoders.ByteLevel(), normalizer
    alphabet, names = pre_tokenizers.ByteLevel.alphabet(), ["<s>", "</s>", "<pad>"]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=names, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator((path.read_text("utf-8") for path in SOURCES[:8]), trainer)
    return made


TOKENIZERS = {
    "gpt2": byte_level,
    "qwen": lambda: byte_level(Regex(PRETOKENIZE_REGEX), normalizers.NFC()),
    "llama3": lambda: byte_level(Regex(PRETOKENIZE_REGEX.replace(r"\p{N}|", r"\p{N}{1,3}|", 1))),
}


@pytest.fixture(scope="module")
def trained(model: bytes, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders with a tokenizer each."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("sentencepiece", *TOKENIZERS)}
    (folders["sentencepiece"] / "tokenizer.model").write_bytes(model)
    for name, build in TOKENIZERS.items():
        build().save(str(folders[name] / "tokenizer.json"))
    return folders


def carry(folder: Path, out: Path, config: ModelConfig, **options: str) -> tuple[Encoder, list[str]]:
    """What documents are prepared with from a folder's tokenizer, exported; and the warnings."""
    ours, said = find_tokenizer(str(folder), **options), []
    model = Decoder(config, attend=None).named_parameters()  # type: ignore[arg-type]
    path = out.with_name(ours.file)
    path.write_bytes(ours.model)
    write_folder(out, config, model, tokenizer_model=path, bos=ours.bos, eos=ours.eos, dtype=torch.float32, warn=said.append)
    return ours, said


def check_same(theirs: PreTrainedTokenizerBase, ours: Encoder) -> None:
    before = [] if ours.bos is None else [ours.bos]
    for text in PLAIN_TEXTS:
        ids = ours.encode(text)
        assert theirs.encode(text) == before + ids, repr(text)
        assert theirs.encode(text, add_special_tokens=False) == ids
        assert theirs.decode(ids) == ours.decode(ids)
    assert (theirs.bos_token_id, theirs.eos_token_id, len(theirs)) == (ours.bos, ours.eos, ours.vocab_size)


@pytest.mark.parametrize("name", ["sentencepiece", *TOKENIZERS])
@pytest.mark.parametrize("family", FAMILIES)
def test_autotokenizer_gives_the_ids_of_training(
    trained: dict[str, Path], tmp_path: Path, small: ModelConfig, family: str, name: str
) -> None:
    out = tmp_path / "out"
    ours, said = carry(trained[name], out, replace(small, **FAMILIES[family]))
    # transformers puts Qwen's rules in the place of others, and nothing in the folder can keep it from that
    replaced = family == "qwen2" and name != "qwen"
    check_same(AutoTokenizer.from_pretrained(out / APART if replaced else out), ours)
    check_same(PreTrainedTokenizerFast.from_pretrained(out), ours)
    assert (out / APART).exists() == replaced
    assert len(said) == replaced
    assert all(
        f"AutoTokenizer.from_pretrained('{out / APART}') or PreTrainedTokenizerFast.from_pretrained('{out}')" in a for a in said
    )


def test_a_large_vocabulary_is_not_taken_for_mistrals(
    tmp_path: Path, small: ModelConfig, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The advice of transformers, fix_mistral_regex=True, would give other ids."""
    letters = [*pre_tokenizers.ByteLevel.alphabet(), "<s>", "</s>", *(f"more{number}" for number in range(100_000))]
    made = Tokenize(BPE({letter: index for index, letter in enumerate(letters)}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens(["<s>", "</s>"])
    (tmp_path / "in").mkdir()
    made.save(str(tmp_path / "in" / "tokenizer.json"))
    ours, _ = carry(tmp_path / "in", tmp_path / "out", replace(small, window=8))
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    check_same(AutoTokenizer.from_pretrained(tmp_path / "out"), ours)
    assert "regex" not in caplog.text


def test_the_rules_of_qwen_are_those_of_transformers() -> None:
    assert QWEN2_WORDS == PRETOKENIZE_REGEX


def test_vocabulary_and_merges_keep_their_names(trained: dict[str, Path], tmp_path: Path, small: ModelConfig) -> None:
    """As OPT's: one token for BOS, EOS and what is unknown, and BOS in front although no file but the settings says so."""
    (tmp_path / "in").mkdir()
    Tokenize.from_file(str(trained["gpt2"] / "tokenizer.json")).model.save(str(tmp_path / "in"))
    names = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": {"content": "</s>"}, "pad_token": "<pad>"}
    (tmp_path / "in" / "tokenizer_config.json").write_text(json.dumps(names | {"add_bos_token": True}))
    ours, _ = carry(tmp_path / "in", tmp_path / "out", replace(small, **FAMILIES["opt"]))
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert ours.bos == ours.eos == theirs.unk_token_id == 1
    assert (theirs.bos_token, theirs.eos_token, theirs.unk_token, theirs.pad_token) == ("</s>", "</s>", "</s>", "<pad>")
    check_same(theirs, ours)
    assert theirs(["a", "a b c d"], padding=True).input_ids[0][-1] == theirs.pad_token_id == 2


def test_what_training_did_not_put_around_texts_is_taken_out(trained: dict[str, Path], tmp_path: Path, small: ModelConfig) -> None:
    (tmp_path / "in").mkdir()
    made = Tokenize.from_file(str(trained["gpt2"] / "tokenizer.json"))
    around = [("<s>", 0), ("</s>", 1)]
    for number, (single, options) in enumerate([("<s> $A", {"bos": "none"}), ("<s> $A </s>", {}), ("<s> $A", {})]):
        made.post_processor = processors.TemplateProcessing(single=single, special_tokens=around)
        made.save(str(tmp_path / "in" / "tokenizer.json"))
        ours, _ = carry(tmp_path / "in", tmp_path / str(number), small, **options)
        check_same(AutoTokenizer.from_pretrained(tmp_path / str(number)), ours)


def test_a_tokenizer_json_is_exported_as_it_is_but_for_bos(tmp_path: Path, small: ModelConfig) -> None:
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
    assert loaded("abba").input_ids == [3, 2, 1, 0]
    write("no-bos", None, 4)
    assert AutoTokenizer.from_pretrained(tmp_path / "no-bos").bos_token is None
    assert (tmp_path / "no-bos" / "tokenizer.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()
    shutil.copy(tmp_path / "out" / "tokenizer.json", tmp_path)
    write("again", 3, 4)
    assert (tmp_path / "again" / "tokenizer.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()
    with pytest.raises(DataError, match=r"tokenizer.json: has no token 9"):
        write("bad", 3, 9)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match=r"tokenizer.json: cannot be read"):
        write("bad", 3, 4)
    assert not (tmp_path / "bad").exists()
