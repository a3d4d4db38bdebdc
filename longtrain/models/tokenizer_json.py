"""The tokenizer of an exported folder: a tokenizer.json, changed for BOS alone, or a SentencePiece BPE model as one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import sentencepiece
import tokenizers

from longtrain.errors import DataError

SPACE = "▁"
"""SentencePiece's sign for a space inside pieces (U+2581)."""

BPE = 2

QWEN2_DEFAULT = "<|endoftext|>"
"""What transformers' Qwen2Tokenizer takes for special tokens that are not named."""

QWEN2_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""How transformers' Qwen2Tokenizer cuts texts into words."""

MISTRAL_SUSPECTED = 100_000
"""Tokens beyond which transformers suspects a wrong tokenizer of Mistral's."""

_QWEN2_STEPS = [
    {"type": "Split", "pattern": {"Regex": QWEN2_WORDS}, "behavior": "Isolated", "invert": False},
    {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
]
_BPE_OPTIONS = (
    *("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"),
    *("fuse_unk", "byte_fallback", "ignore_merges"),
)


def tokenizer_files(model: Path, bos: int | None, eos: int | None) -> dict[str, dict[str, object]]:
    """The contents of the JSON files that go beside a tokenizer, or in its place. bos, eos: token ids that begin and end documents.

    What they make of a text begins with `bos`, and with nothing where there is none.

    Raises:
        DataError: the tokenizer is damaged, lacks these ids, or cannot be written exactly.
    """
    return _from_json(model, bos, eos) if model.suffix == ".json" else _from_sentencepiece(model)


def qwen2_keeps(tokenizer: Path) -> bool:
    """Whether a tokenizer.json gives the same ids through transformers' Qwen2Tokenizer.

    That class takes vocabulary, merges and special tokens from the file, and the rest is its own.
    """
    content = json.loads(tokenizer.read_bytes())
    model, steps = content["model"], (content.get("pre_tokenizer") or {}).get("pretokenizers", [])
    return (
        content.get("normalizer") == {"type": "NFC"}
        # which characters an offset counts changes no id
        and [{name: value for name, value in step.items() if name != "trim_offsets"} for step in steps] == _QWEN2_STEPS
        and (content.get("decoder") or {}).get("type") == "ByteLevel"
        and model.get("type") == "BPE"
        and not any(model.get(option) for option in _BPE_OPTIONS)
    )


def _from_json(tokenizer: Path, bos: int | None, eos: int | None) -> dict[str, dict[str, object]]:
    """tokenizer_config.json for a tokenizer.json, and another tokenizer.json where the file puts something else before a text."""
    try:
        raw = tokenizer.read_bytes()
        content, made = json.loads(raw), tokenizers.Tokenizer.from_buffer(raw)
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{tokenizer}: cannot be read as a tokenizer.json, so it is damaged: {error}") from None
    known = made.get_vocab(with_added_tokens=True)
    special: dict[str, object] = {}
    for name, index in (("bos_token", bos), ("eos_token", eos)):
        if index is not None:
            special[name] = made.id_to_token(index)
            if special[name] is None:
                raise DataError(f"{tokenizer}: has no token {index}, with which documents begin or end")
    model = content["model"]
    unknown = model.get("unk_token") or (None if model.get("unk_id") is None else made.id_to_token(model["unk_id"]))
    padding = (content.get("padding") or {}).get("pad_token")
    # named though there is none, or Qwen2Tokenizer would add its default, beyond the vocabulary
    default = {} if QWEN2_DEFAULT in known else dict.fromkeys(("unk_token", "pad_token"))
    named = {name: token for name, token in (("unk_token", unknown), ("pad_token", padding)) if token in known}
    config: dict[str, object] = {"tokenizer_class": "PreTrainedTokenizerFast", **special, **default, **named}
    config["clean_up_tokenization_spaces"] = False
    if len(known) > MISTRAL_SUSPECTED:
        # transformers takes every large vocabulary in a Mistral for Mistral's own, and advises to replace a part of the tokenizer
        config["fix_mistral_regex"] = False
    files = {"tokenizer_config.json": config}
    made.no_padding()
    made.no_truncation()
    bare, whole = (made.encode("a", add_special_tokens=added).ids for added in (False, True))
    if whole != ([] if bos is None else [bos]) + bare:
        template = None if bos is None else _add_bos(str(special["bos_token"]), bos)
        files["tokenizer.json"] = content | {"post_processor": template}
    return files


def _from_sentencepiece(model: Path) -> dict[str, dict[str, object]]:
    """The contents of tokenizer.json and tokenizer_config.json for a SentencePiece .model file.

    Pieces are written with plain spaces, so that a text which holds the sign for a space literally falls back to its bytes, as
    `data.tokenizer` encodes it; models that put a space before every text (LLaMA 2's) read the sign as a space, here too. Encoding
    adds BOS in front, as documents are prepared. Names of special tokens inside a text are text.

    Raises:
        DataError: not a BPE model with byte fallback and without normalisation, which is all that can be written exactly.
    """
    proto = model.read_bytes()
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(proto)
    prefix = _checked_prefix(proto, processor, model)
    pieces = [processor.id_to_piece(i) for i in range(processor.vocab_size())]
    reserved = [i for i in range(len(pieces)) if processor.is_control(i) or processor.is_unknown(i)]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    names = {"unk": pieces[processor.unk_id()], "bos": pieces[processor.bos_id()], "eos": pieces[processor.eos_id()]}
    tokenizer: dict[str, object] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": pieces[i], "special": True} | flags for i in reserved],
        "normalizer": _normalizer() if prefix else None,
        "pre_tokenizer": None,
        "post_processor": _add_bos(names["bos"], processor.bos_id()),
        "decoder": _decoder(prefix),
        "model": _bpe(processor, pieces, set(reserved)) | {"unk_token": names["unk"]},
    }
    config: dict[str, object] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{name}_token": piece for name, piece in names.items()},
        "pad_token": None,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,
    }
    return {"tokenizer.json": tokenizer, "tokenizer_config.json": config}


def _bpe(processor: sentencepiece.SentencePieceProcessor, pieces: list[str], reserved: set[int]) -> dict[str, object]:
    vocabulary: dict[str, int] = {}
    scores: dict[str, float] = {}
    for i, piece in enumerate(pieces):
        made_of_text = not (i in reserved or processor.is_byte(i))
        name = piece.replace(SPACE, " ") if made_of_text else piece
        vocabulary[name] = i
        if made_of_text:
            scores[name] = processor.get_score(i)
    return {
        "type": "BPE",
        "dropout": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": True,
        "ignore_merges": False,
        "vocab": vocabulary,
        "merges": _merges(scores),
    }


def _merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """Every way to make a piece of two others, best score first: SentencePiece merges the pair whose result scores best."""
    return [
        (piece[:cut], piece[cut:])
        for piece in sorted(scores, key=lambda piece: -scores[piece])
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]


def _normalizer() -> dict[str, object]:
    space = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    return {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": " "}, space]}


def _decoder(prefix: bool) -> dict[str, object]:
    steps: list[dict[str, object]] = [{"type": "ByteFallback"}, {"type": "Fuse"}]
    if prefix:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}


def _add_bos(bos: str, index: int) -> dict[str, object]:
    def template(sequences: str) -> list[object]:
        parts: list[object] = []
        for kind, sequence in enumerate(sequences):
            parts += [{"SpecialToken": {"id": bos, "type_id": kind}}, {"Sequence": {"id": sequence, "type_id": kind}}]
        return parts

    return {
        "type": "TemplateProcessing",
        "single": template("A"),
        "pair": template("AB"),
        "special_tokens": {bos: {"id": bos, "ids": [index], "tokens": [bos]}},
    }


def _checked_prefix(proto: bytes, processor: sentencepiece.SentencePieceProcessor, model: Path) -> bool:
    """Whether the model puts a space before every text. Field numbers: sentencepiece_model.proto."""
    trainer = dict(_fields(dict(_fields(proto)).get(2, b"")))
    normalizer = dict(_fields(dict(_fields(proto)).get(3, b"")))
    pieces = range(processor.vocab_size())
    problems = {
        "it is not a BPE model": trainer.get(3, 1) != BPE,
        "it has no byte fallback": not trainer.get(35, 0),
        "it has no BOS or EOS": processor.bos_id() < 0 or processor.eos_id() < 0,
        "it normalises text": bool(normalizer.get(2, b"")) or bool(normalizer.get(4, 1)) or not normalizer.get(5, 1),
        "it marks spaces at the end of words": bool(trainer.get(24, 0)),
        "it has user-defined symbols": any(_piece_type(value) == 4 for number, value in _fields(proto) if number == 1),
        "it has unused pieces": any(processor.is_unused(i) for i in pieces),
    }
    reasons = [reason for reason, found in problems.items() if found]
    if reasons:
        raise DataError(f"{model}: cannot be written as a Hugging Face tokenizer with the same ids: {', '.join(reasons)}")
    return bool(normalizer.get(3, 1))


def _piece_type(piece: int | bytes) -> int | bytes:
    return dict(_fields(piece)).get(3, 1) if isinstance(piece, bytes) else 1


def _fields(message: int | bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of a protocol buffer message; fixed-size numbers come as their bytes."""
    assert isinstance(message, bytes)
    at = 0

    def varint() -> int:
        nonlocal at
        value, shift = 0, 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(message):
        key = varint()
        if key & 7 == 0:
            yield key >> 3, varint()
            continue
        size = {1: 8, 5: 4}.get(key & 7) or varint()
        yield key >> 3, message[at : at + size]
        at += size
