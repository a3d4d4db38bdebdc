"""What a tokenizer is to the rest, and SentencePiece: a tokenizer that restores its input exactly, and its training."""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar, Protocol

import sentencepiece

from longtrain.data.manifest import TOKENIZER, TokenizerEntry
from longtrain.errors import DataError

SPACE = "▁"
"""SentencePiece's own sign for a space (U+2581), which text may also contain literally."""

PART_CHARACTERS = 1 << 20
"""Longer texts are encoded in parts: SentencePiece needs about 100 bytes of memory for a character it is working on."""

_LONE_SPACE = re.compile(r"(?<=\S) (?=\S)")

SAMPLE_PIECE = 2000
"""Characters of one training sentence; SentencePiece skips sentences above its limit, set below to 4 bytes a character."""


class Encoder(Protocol):
    """Text to token ids and back. `model`: the bytes of its file, `file` in prepared data; bos None: none is put in front.

    unk: the token that stands for text without one of its own; None where there is no such token. Encoding raises DataError, and
    names the character, where text would be lost without a trace.
    """

    file: ClassVar[str]
    model: bytes
    sha256: str
    vocab_size: int

    @property
    def bos(self) -> int | None: ...
    @property
    def eos(self) -> int: ...
    @property
    def unk(self) -> int | None: ...
    def encode(self, text: str) -> list[int]: ...
    def encode_many(self, texts: Sequence[str], threads: int | None = None) -> list[list[int]]: ...
    def decode(self, ids: Sequence[int]) -> str: ...


def entry_of(tokenizer: Encoder) -> TokenizerEntry:
    """What a manifest says of a tokenizer."""
    return TokenizerEntry.model_validate(
        {"file": tokenizer.file, "sha256": tokenizer.sha256, "vocab_size": tokenizer.vocab_size}
        | {"bos": tokenizer.bos, "eos": tokenizer.eos}
    )


class Tokenizer:
    """A SentencePiece model.

    Models from `train_tokenizer` restore every text exactly: decode(encode(text)) == text. Models made elsewhere may normalise.
    """

    file: ClassVar[str] = TOKENIZER

    def __init__(self, model: bytes, name: str = "tokenizer") -> None:
        """`model`: the content of a .model file; `name` stands in messages. DataError where it is not usable."""
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(model)
        except (RuntimeError, ValueError):
            raise DataError(f"{name}: is not a SentencePiece model, or is damaged") from None
        self.model = model
        self.sha256 = hashlib.sha256(model).hexdigest()
        self.vocab_size: int = self._model.vocab_size()
        self.bos: int = self._model.bos_id()
        self.eos: int = self._model.eos_id()
        self.unk: int = self._model.unk_id()
        if self.bos < 0 or self.eos < 0:
            raise DataError(f"{name}: has no BOS or no EOS token; train it with bos_id and eos_id")
        self._prefix = "".join(self._model.encode("a", out_type=str)).startswith(SPACE)
        self._space_ids = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        # With a dummy prefix every part would gain a space, and without byte pieces there is nothing to write the sign with.
        self._escapes = not self._prefix and all(self._model.is_byte(index) for index in self._space_ids)

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[bytes]]:
        return Tokenizer, (self.model,)

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """DataError where the file is missing or is no SentencePiece model with BOS and EOS."""
        try:
            model = Path(path).read_bytes()
        except OSError as error:
            raise DataError(f"{path}: the tokenizer cannot be read ({error.strerror})") from None
        return cls(model, str(path))

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without BOS and EOS."""
        return self.encode_many([text])[0]

    def encode_many(self, texts: Sequence[str], threads: int | None = None) -> list[list[int]]:
        """`encode` of every text, on so many threads; None: on all cores."""
        runs = [list(self._runs(text)) for text in texts]
        flat = [run for text in runs for run in text if run is not None]
        encoded = iter(self._model.encode(flat, num_threads=threads or os.cpu_count() or 1) if flat else [])
        return [[token for run in text for token in (self._space_ids if run is None else next(encoded))] for text in runs]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids; BOS and EOS leave no trace."""
        return self._model.decode(list(ids))

    def _runs(self, text: str) -> Iterator[str | None]:
        """Parts to encode one by one; None stands for SPACE where the text contains it literally."""
        if not self._escapes:
            yield from self._parts(text)
            return
        for position, run in enumerate(text.split(SPACE)):
            if position:
                yield None
            yield from self._parts(run)

    def _parts(self, text: str) -> Iterator[str]:
        """Cuts before lone spaces: pieces begin there anyway, so the cuts do not change the tokens."""
        start = 0
        while len(text) - start > PART_CHARACTERS:
            cut = _LONE_SPACE.search(text, start + PART_CHARACTERS)
            if cut is None:
                break
            yield text[start : cut.start()]
            start = cut.end() if self._prefix else cut.start()  # a dummy prefix is itself the space
        if text[start:]:
            yield text[start:]


def sample_pieces(text: str) -> Iterator[str]:
    """A text as training sentences of whole lines, at most SAMPLE_PIECE characters each."""
    piece = ""
    for line in text.splitlines(keepends=True):
        if piece and len(piece) + len(line) > SAMPLE_PIECE:
            yield piece
            piece = ""
        piece += line
        while len(piece) > SAMPLE_PIECE:
            yield piece[:SAMPLE_PIECE]
            piece = piece[SAMPLE_PIECE:]
    if piece:
        yield piece


def train_tokenizer(sentences: Iterable[str], vocab_size: int) -> bytes:
    """The content of a .model file: BPE over the given sentences, as LLaMA's tokenizer but keeping every space.

    unk, bos, eos are 0, 1, 2; bytes stand in for unseen characters; every digit is a token. The same sentences give the same
    bytes. DataError where the sentences do not support the vocabulary.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(  # pyright: ignore[reportAttributeAccessIssue]
            sentence_iterator=iter(sentences),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            character_coverage=0.99995,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            max_sentence_length=4 * SAMPLE_PIECE,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise DataError(_training_problem(str(error), vocab_size)) from None
    return model.getvalue()


def _training_problem(message: str, vocab_size: int) -> str:
    if found := re.search(r"value <= (\d+)", message):
        return f"--vocab-size {vocab_size} is more than this text supports: use at most {found[1]}, or more text"
    if found := re.search(r"required_chars\. \d+ vs (\d+)", message):
        return f"--vocab-size {vocab_size} is too small: bytes and frequent characters alone need {found[1]}"
    if "vocab_size()) > (0)" in message:
        return f"--vocab-size {vocab_size} must be positive"
    return f"the text is too small to train a tokenizer on: add text or give --tokenizer ({message.strip()})"
