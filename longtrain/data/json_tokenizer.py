"""Hugging Face's tokenizer.json, and finding the tokenizer that a user or a prepared folder names."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import tokenizers

from longtrain.data.hub import PREFIX, is_path
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

NOWHERE = "<longtrain:nowhere>"
"""A token that no vocabulary has."""

ANOTHER = "choose a tokenizer with byte fallback, or train one: leave --tokenizer out"


class JsonTokenizer:
    """A tokenizer.json. What it would put around a text by itself, truncation and padding are left out: the ids are the text's.

    Names of special tokens inside a text are text, so that no document can end early by spelling them. Text that has no token, no
    bytes and no unknown token in its place raises DataError.
    """

    file: ClassVar[str] = TOKENIZER_JSON

    def __init__(self, model: bytes, bos: int | None, eos: int, name: str = TOKENIZER_JSON) -> None:
        """`model`: the content of the file; `name` stands in messages. DataError where it is not usable."""
        self._tokenizer = _parse(model, name)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        if isinstance(self._tokenizer.model, tokenizers.models.BPE):
            self._tokenizer.model.dropout = None  # the same text must give the same tokens
        self.model = model
        self.sha256 = hashlib.sha256(model).hexdigest()
        vocab = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values(), default=-1) + 1
        self.bos = bos
        self.eos = eos
        for index in (eos, *([] if bos is None else [bos])):
            if not 0 <= index < self.vocab_size:
                raise DataError(f"{name}: has {self.vocab_size} tokens, so {index} cannot be its BOS or EOS")
        special = _make_text(self._tokenizer, [name for name, index in vocab.items() if index in (bos, eos)])
        if not vocab.keys() - special:
            raise DataError(f"{name}: has no tokens but special ones, so it can write no text; {ANOTHER}")
        self.unk = _unknown(self._tokenizer.model, model)
        if self.unk is None and isinstance(self._tokenizer.model, tokenizers.models.BPE):
            self._tokenizer.model.unk_token = NOWHERE  # where the other models raise, this one alone would leave text out

    def __reduce__(self) -> tuple[type[JsonTokenizer], tuple[bytes, int | None, int]]:
        return JsonTokenizer, (self.model, self.bos, self.eos)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without BOS and EOS."""
        return self.encode_many([text])[0]

    def encode_many(self, texts: Sequence[str], threads: int | None = None) -> list[list[int]]:
        """`encode` of every text, on one thread, or with `threads` None on those of the library."""
        batches = [list(texts)] if threads is None else [[text] for text in texts]
        try:
            return self._ids(batches)
        except Exception as error:  # the library raises nothing narrower
            raise DataError(f"the tokenizer {self._lost(texts) or f'cannot write this text ({error})'}; {ANOTHER}") from None

    def _ids(self, batches: list[list[str]]) -> list[list[int]]:
        return [found.ids for batch in batches for found in self._tokenizer.encode_batch_fast(batch, add_special_tokens=False)]

    def _lost(self, texts: Sequence[str]) -> str | None:
        """What would be lost first, a character, or a word where words are tokens."""
        words = isinstance(self._tokenizer.model, (tokenizers.models.WordLevel, tokenizers.models.WordPiece))
        for part in itertools.chain.from_iterable(dict.fromkeys(text.split() if words else text) for text in texts):
            try:
                self._ids([[part]])
            except Exception:  # as above
                code = "" if words else f" (U+{ord(part):04X})"
                return f"has no token for {part!r}{code}, no bytes and no unknown token in its place, so that text would be lost"
        return None

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids; BOS and EOS leave no trace."""
        return self._tokenizer.decode([index for index in ids if index not in (self.bos, self.eos)], skip_special_tokens=False)


def find_tokenizer(name: str, bos: str | None = None, eos: str | None = None) -> Encoder:
    """The tokenizer behind --tokenizer: a .model or tokenizer.json file, a folder that holds one, or hf:NAME, a model of the hub.

    A folder may hold GPT-2's vocab.json and merges.txt instead, as OPT's do; they become a tokenizer.json. bos, eos: tokens of a
    tokenizer.json that begin and end a document, where tokenizer_config.json beside it does not say or is to be overruled; bos
    "none": nothing in front. DataError where it is missing or damaged, or has no EOS.
    """
    plain = name.removeprefix(PREFIX)
    path = _download(plain) if name != plain and not is_path(plain) else Path(plain)
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
    config = _Names(path.with_name(CONFIG))
    special = _special(parsed)
    pair = next((pair for pair in KNOWN_PAIRS if pair[1] in special and (pair[0] is None or pair[0] in special)), (None, None))
    first = bos or (config.token("bos") if config.has("eos") else pair[0])
    last = eos or config.token("eos") or pair[1]
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


def _special(tokenizer: tokenizers.Tokenizer) -> list[str]:
    """Names of the special tokens, by their ids."""
    return [token.content for _, token in sorted(tokenizer.get_added_tokens_decoder().items()) if token.special]


def _make_text(tokenizer: tokenizers.Tokenizer, ends: list[str]) -> set[str]:
    """Makes the names of special tokens inside a text text; returns them. ends: of BOS and EOS, which may not be marked as special.

    Models whose pieces are not merged from smaller ones, as Unigram, find such a name among their own: there it is cut in two.
    """
    tokenizer.add_special_tokens(ends)
    tokenizer.encode_special_tokens = True
    special = _special(tokenizer)
    spelt = sorted(name for name in special if len(name) > 1 and _spells(tokenizer.model, name))
    if spelt:
        groups = itertools.groupby(spelt, key=lambda name: name[0])
        cuts = (f"{re.escape(first)}(?={'|'.join(re.escape(name[1:]) for name in names)})" for first, names in groups)
        cut = tokenizers.pre_tokenizers.Split(tokenizers.Regex("|".join(cuts)), "isolated")
        before = [] if tokenizer.pre_tokenizer is None else [tokenizer.pre_tokenizer]
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([*before, cut])
    return set(special)


def _spells(model: tokenizers.models.Model, name: str) -> bool:
    """Whether a model writes text with the token of that name."""
    try:
        return any(token.id == model.token_to_id(name) for token in model.tokenize(name))
    except Exception:  # the library raises nothing narrower: not all of the name has a token
        return False


def _unknown(model: tokenizers.models.Model, content: bytes) -> int | None:
    """The token of what is unknown. content: of the file, which alone says that of a Unigram model."""
    if isinstance(model, tokenizers.models.Unigram):
        return json.loads(content)["model"].get("unk_id")
    name = getattr(model, "unk_token", None)
    return None if name is None else model.token_to_id(name)


def _of_vocabulary(path: Path) -> bytes:
    """The tokenizer.json of a byte-level BPE that is given as vocab.json and merges.txt."""
    try:
        model = tokenizers.models.BPE.from_file(str(path), str(path.with_name(MERGES)))
    except Exception as error:  # the library raises nothing narrower
        raise DataError(f"{path}: is no vocabulary of a byte-level BPE with its {MERGES} beside it ({error})") from None
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    config = _Names(path.with_name(CONFIG))
    named = {name: config.token(name) for name in ("bos", "eos", "unk", "pad")}
    known = {name: token for name, token in named.items() if token and made.token_to_id(token) is not None}
    made.add_special_tokens(list(dict.fromkeys(known.values())))
    # what an export calls unk and pad; no text gains a token, as no byte is unknown and padding is left out
    if "unk" in known and made.get_vocab().keys() >= set(tokenizers.pre_tokenizers.ByteLevel.alphabet()):
        model.unk_token = known["unk"]
    if "pad" in known:
        made.enable_padding(pad_token=known["pad"], pad_id=made.token_to_id(known["pad"]))
    return made.to_str().encode()


class _Names:
    """The tokens that tokenizer_config.json names, or none where there is no such file. DataError where it is damaged."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._content: dict[str, object] = {}
        if not path.is_file():
            return
        try:
            content = json.loads(_read(path))
        except (ValueError, RecursionError):
            content = None
        if not isinstance(content, dict):
            what = "JSON" if content is None else "a JSON object"
            raise DataError(f"{path}: is not {what}, so it is damaged; copy it again, or move it away and give --bos and --eos")
        self._content = content

    def has(self, name: str) -> bool:
        return f"{name}_token" in self._content

    def token(self, name: str) -> str | None:
        """bos, eos, unk or pad, which stands there as text or as an object; None where there is none."""
        field = f"{name}_token"
        token = self._content.get(field)
        if token is None:
            return None
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str):
            return text
        raise DataError(
            f"{self._path}: {field}: {json.dumps(token)} is no token, which is text or an object with text as 'content'; mend it, "
            "or move the file away and give --bos and --eos"
        )


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
