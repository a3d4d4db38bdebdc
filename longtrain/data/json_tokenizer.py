"""Hugging Face's tokenizer.json, and finding the tokenizer that a user or a prepared folder names."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import tokenizers

from longtrain.data.hub import PREFIX
from longtrain.data.manifest import TOKENIZER, TOKENIZER_JSON, TokenizerEntry
from longtrain.data.records import first_line
from longtrain.data.tokenizer import Encoder, Tokenizer
from longtrain.errors import DataError

CONFIG = "tokenizer_config.json"
VOCABULARY, MERGES = "vocab.json", "merges.txt"
FILES = (TOKENIZER_JSON, TOKENIZER, VOCABULARY)
"""What a folder may hold, best first."""

NONE = "none"
"""Value of --bos for documents that begin with their text."""

ACCEPTED = (
    "A SentencePiece .model, a tokenizer.json, a folder that holds one (a Hugging Face checkpoint, prepared data), or "
    f"{PREFIX}NAME, a model of the hub"
)
"""What --tokenizer may name."""

KNOWN_PAIRS = (
    ("<s>", "</s>"),
    ("<|begin_of_text|>", "<|end_of_text|>"),
    ("<bos>", "<eos>"),
    ("[BOS]", "[EOS]"),
    (None, "<|endoftext|>"),
)
"""BOS and EOS of LLaMA 1 and 2 and Mistral, LLaMA 3, Gemma, and GPT-2 and Qwen, for a tokenizer.json that comes alone."""


class JsonTokenizer:
    """A tokenizer.json. What it would put around a text by itself, truncation and padding are left out: the ids are the text's.

    Names of special tokens inside a text are text, so that no document can end early by spelling them.
    """

    file: ClassVar[str] = TOKENIZER_JSON

    def __init__(self, model: bytes, bos: int | None, eos: int, name: str = TOKENIZER_JSON) -> None:
        """`model`: the content of the file; `name` stands in messages. DataError where it is not usable."""
        self._tokenizer = _parse(model, name)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self.model = model
        self.sha256 = hashlib.sha256(model).hexdigest()
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.bos = bos
        self.eos = eos
        for index in (eos, *([] if bos is None else [bos])):
            if not 0 <= index < self.vocab_size:
                raise DataError(f"{name}: has {self.vocab_size} tokens, so {index} cannot be its BOS or EOS")

    def __reduce__(self) -> tuple[type[JsonTokenizer], tuple[bytes, int | None, int]]:
        return JsonTokenizer, (self.model, self.bos, self.eos)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without BOS and EOS."""
        return self.encode_many([text])[0]

    def encode_many(self, texts: Sequence[str], threads: int | None = None) -> list[list[int]]:
        """`encode` of every text, on one thread, or with `threads` None on those of the library."""
        batches = [list(texts)] if threads is None else [[text] for text in texts]
        return [found.ids for batch in batches for found in self._tokenizer.encode_batch_fast(batch, add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids; BOS and EOS leave no trace."""
        return self._tokenizer.decode([index for index in ids if index not in (self.bos, self.eos)], skip_special_tokens=False)


def find_tokenizer(name: str, bos: str | None = None, eos: str | None = None) -> Encoder:
    """The tokenizer behind --tokenizer: a .model or tokenizer.json file, a folder that holds one, or hf:NAME, a model of the hub.

    A folder may hold GPT-2's vocab.json and merges.txt instead, as OPT's do; they become a tokenizer.json. bos, eos: tokens of a
    tokenizer.json that begin and end a document, where tokenizer_config.json beside it does not say or is to be overruled; bos
    "none": nothing in front. DataError where it is missing or damaged, or has no EOS.
    """
    path = _download(name.removeprefix(PREFIX)) if name.startswith(PREFIX) else Path(name)
    if not path.exists():
        raise DataError(f"--tokenizer {name}: no such file or folder; name one of these: {ACCEPTED[0].lower()}{ACCEPTED[1:]}")
    if path.is_dir():
        found = next((path / file for file in FILES if (path / file).is_file()), None)
        if found is None:
            raise DataError(f"--tokenizer {name}: holds none of {', '.join(FILES)}; name the file itself")
        path = found
    if path.name == VOCABULARY:
        return _from_json(_of_vocabulary(path), path, bos, eos)
    if path.suffix == ".json":
        return _from_json(_read(path), path, bos, eos)
    if bos is not None or eos is not None:
        raise DataError(f"--bos and --eos go with a tokenizer.json; {path} brings its own")
    return Tokenizer.load(path)


def open_tokenizer(folder: Path, entry: TokenizerEntry) -> Encoder:
    """The tokenizer of a prepared data folder. DataError where it is missing or damaged."""
    path = folder / entry.file
    return Tokenizer.load(path) if entry.file == TOKENIZER else JsonTokenizer(_read(path), entry.bos, entry.eos, str(path))


def _from_json(model: bytes, path: Path, bos: str | None, eos: str | None) -> JsonTokenizer:
    parsed = _parse(model, str(path))
    config = _config(path.with_name(CONFIG))
    special = [token.content for _, token in sorted(parsed.get_added_tokens_decoder().items()) if token.special]
    pair = next((pair for pair in KNOWN_PAIRS if pair[1] in special and (pair[0] is None or pair[0] in special)), (None, None))
    first = bos or (_content(config.get("bos_token")) if "eos_token" in config else pair[0])
    last = eos or _content(config.get("eos_token")) or pair[1]
    if last is None:
        named = f"; its special tokens are {', '.join(special[:8])}" if special else ""
        raise DataError(f"{path}: says nowhere which token ends a document: name one with --eos TOKEN{named}")
    ids = []
    for option, token in (("--bos", None if first == NONE else first), ("--eos", last)):
        index = None if token is None else parsed.token_to_id(token)
        if token is not None and index is None:
            raise DataError(f"{path}: has no token {token!r}; choose another with {option} TOKEN")
        ids.append(index)
    return JsonTokenizer(model, ids[0], ids[1], str(path))


def _parse(model: bytes, name: str) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_buffer(model)
    except ValueError as error:
        reason = str(error).removeprefix("Cannot instantiate Tokenizer from buffer: ")
        raise DataError(f"{name}: is not a tokenizer.json of the tokenizers library, or is damaged ({reason})") from None


def _of_vocabulary(path: Path) -> bytes:
    """The tokenizer.json of a byte-level BPE that is given as vocab.json and merges.txt."""
    try:
        model = tokenizers.models.BPE.from_file(str(path), str(path.with_name(MERGES)))
    except Exception as error:  # the library raises nothing narrower
        raise DataError(f"{path}: is no vocabulary of a byte-level BPE with its {MERGES} beside it ({error})") from None
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    config = _config(path.with_name(CONFIG))
    named = {name: _content(config.get(f"{name}_token")) for name in ("bos", "eos", "unk", "pad")}
    known = {name: token for name, token in named.items() if token and made.token_to_id(token) is not None}
    made.add_special_tokens(list(dict.fromkeys(known.values())))
    # what an export calls unk and pad; no text gains a token, as no byte is unknown and padding is left out
    if "unk" in known and made.get_vocab().keys() >= set(tokenizers.pre_tokenizers.ByteLevel.alphabet()):
        model.unk_token = known["unk"]
    if "pad" in known:
        made.enable_padding(pad_token=known["pad"], pad_id=made.token_to_id(known["pad"]))
    return made.to_str().encode()


def _config(path: Path) -> dict[str, object]:
    """tokenizer_config.json, or nothing where there is none."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(_read(path))
    except (ValueError, RecursionError):
        raise DataError(f"{path}: is not JSON, so it is damaged; copy it again, or move it away and give --bos and --eos") from None
    return content if isinstance(content, dict) else {}


def _content(token: object) -> str | None:
    """A token of tokenizer_config.json, which stands there as text or as an object."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: the tokenizer cannot be read ({error.strerror})") from None


def _download(name: str) -> Path:
    """The folder of a hub model's tokenizer files, downloaded once."""
    import huggingface_hub  # takes a while to import
    import huggingface_hub.utils.logging

    huggingface_hub.utils.logging.set_verbosity_error()  # ours is the only message
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=[*FILES, MERGES, CONFIG]))
    except (huggingface_hub.errors.HfHubHTTPError, huggingface_hub.errors.HFValidationError, OSError) as error:
        reason = first_line(error)
        raise DataError(
            f"--tokenizer {PREFIX}{name}: the hub does not give it ({reason}); check the name and the network, or name a file"
        ) from None
