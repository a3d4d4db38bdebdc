"""The tokenizer of an exported folder: a tokenizer.json as it is, a SentencePiece BPE model as one with the same ids."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import sentencepiece

from longtrain.errors import DataError

SPACE = "▁"
"""SentencePiece's sign for a space inside pieces (U+2581)."""

BPE, IDENTITY = 2, "identity"


def tokenizer_files(model: Path, bos: int | None, eos: int | None) -> dict[str, dict[str, object]]:
    """The contents of the JSON files beside a tokenizer. bos, eos: token ids that begin and end documents.

    Raises:
        DataError: the tokenizer is damaged, lacks these ids, or cannot be written exactly.
    """
    return {"tokenizer_config.json": _names_of(model, bos, eos)} if model.suffix == ".json" else _from_sentencepiece(model)


def _names_of(tokenizer: Path, bos: int | None, eos: int | None) -> dict[str, object]:
    """tokenizer_config.json for a tokenizer.json."""
    try:
        content = json.loads(tokenizer.read_bytes())
        names = {index: name for name, index in dict(content["model"]["vocab"]).items()}
        names |= {token["id"]: token["content"] for token in content.get("added_tokens", [])}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{tokenizer}: cannot be read as a tokenizer.json, so it is damaged: {error}") from None
    unknown = [index for index in (bos, eos) if index is not None and index not in names]
    if unknown:
        raise DataError(f"{tokenizer}: has no token {unknown[0]}, with which documents begin or end")
    tokens = {f"{what}_token": names[index] for what, index in (("bos", bos), ("eos", eos)) if index is not None}
    return {"tokenizer_class": "PreTrainedTokenizerFast", **tokens, "clean_up_tokenization_spaces": False}


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
