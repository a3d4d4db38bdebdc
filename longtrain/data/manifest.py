"""The manifest of a prepared data folder: what was written, with which tokenizer, and how large every file must be."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from longtrain.errors import DataError
from longtrain.files import sha256_of

FORMAT = "longtrain-tokens"
VERSION = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.model"
TOKENIZER_JSON = "tokenizer.json"
SPLITS = ("train", "heldout")

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class TokenizerEntry(_Strict):
    """The tokenizer file that wrote the shards, and the ids it put around every document; bos None: nothing in front."""

    file: Literal["tokenizer.model", "tokenizer.json"] = "tokenizer.model"
    sha256: Sha256
    vocab_size: int = Field(gt=0)
    bos: int | None = Field(ge=0)
    eos: int = Field(ge=0)

    @property
    def fingerprint(self) -> str:
        """SHA-256: equal for tokenizers that turn a document into the same ids."""
        return hashlib.sha256(f"{self.sha256} {self.bos} {self.eos}".encode()).hexdigest()


class Shard(_Strict):
    """One pair of files: `file` holds the tokens, the same name with .idx the int64 end of every document in it."""

    # A fixed pattern: a foreign manifest must not be able to name files outside its folder.
    file: str = Field(pattern=r"^(train|heldout)-\d{5,}\.bin$")
    tokens: int = Field(gt=0)
    documents: int = Field(gt=0)
    bytes: int = Field(gt=0)
    sha256: Sha256
    index_sha256: Sha256

    @property
    def index(self) -> str:
        """Name of the .idx file."""
        return self.file.removesuffix(".bin") + ".idx"


class Statistics(_Strict):
    """Document lengths in tokens, BOS and EOS included, and how many files and records did not become documents, by reason."""

    documents: dict[str, int]
    tokens: dict[str, int]
    document_length: dict[str, dict[str, float]]
    skipped: dict[str, int]


class Manifest(_Strict):
    """Content of manifest.json, version 1."""

    format: Literal["longtrain-tokens"] = "longtrain-tokens"
    version: Literal[1] = 1
    dtype: Literal["uint16", "uint32"]
    seed: int
    tokenizer: TokenizerEntry
    splits: dict[Literal["train", "heldout"], list[Shard]]
    statistics: Statistics

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        itemsize = self.token_dtype.itemsize
        for name in SPLITS:
            shards = self.splits.get(name)
            if not shards:
                raise ValueError(f"the split {name!r} has no shards")
            for shard in shards:
                if shard.bytes != shard.tokens * itemsize or not shard.file.startswith(f"{name}-"):
                    raise ValueError(f"the entry of {shard.file} contradicts itself")
        return self

    @property
    def token_dtype(self) -> np.dtype:
        """Type of a token on disk: little-endian uint16 or uint32."""
        return np.dtype(self.dtype).newbyteorder("<")

    def fingerprint(self, split: str) -> str:
        """SHA-256 over the digests of the tokenizer and of every file of a split: equal for equal tokens, wherever they lie."""
        digest = hashlib.sha256(self.tokenizer.sha256.encode())
        for shard in dict(self.splits)[split]:  # pyright: ignore[reportArgumentType]
            digest.update(f"{shard.sha256} {shard.index_sha256}".encode())
        return digest.hexdigest()


def token_dtype_name(vocab_size: int) -> Literal["uint16", "uint32"]:
    """The smallest type that holds every token id of a vocabulary."""
    return "uint16" if vocab_size <= 65536 else "uint32"


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a prepared data folder. DataError where there is none, or it is damaged, foreign or of another version."""
    path = folder / MANIFEST
    advice = "prepare the data with scripts/prepare_data.py --source FOLDER --out FOLDER"
    if not folder.is_dir():
        raise DataError(f"{folder}: no such data folder (data.path is relative to {Path.cwd()}); {advice}")
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"{folder}: holds no {MANIFEST}, so it is no prepared data folder; {advice}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        raise DataError(f"{path}: is not JSON, so it is damaged or foreign; {advice}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise DataError(f"{path}: is not a longtrain manifest (no format {FORMAT!r}); {advice}")
    if content.get("version") != VERSION:
        raise DataError(f"{path}: version {content.get('version')!r}, but this longtrain reads {VERSION}; {advice}")
    try:
        return Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "manifest"
        raise DataError(f"{path}: {where}: {first['msg']}; the manifest is damaged: {advice}") from None


def check_tokenizer(folder: Path, manifest: Manifest) -> None:
    """DataError unless the folder's tokenizer is, byte for byte, the one that wrote the shards."""
    path = folder / manifest.tokenizer.file
    try:
        digest = sha256_of(path)
    except OSError as error:
        raise DataError(f"{path}: the tokenizer of these shards cannot be read ({error.strerror})") from None
    if digest != manifest.tokenizer.sha256:
        raise DataError(
            f"{path}: this tokenizer differs from the one that wrote the shards; put the original back or prepare the data again"
        )


def check_model_vocab(manifest: Manifest, vocab_size: int, init: str | None = None) -> None:
    """DataError where the shards may hold token ids that a model with `vocab_size` embeddings lacks. init: the weights that decide
    their number."""
    needed = manifest.tokenizer.vocab_size
    if needed > vocab_size:
        if init is not None:
            raise DataError(
                f"model.init {init} has {vocab_size} tokens, but the data was written with a tokenizer of {needed}: prepare it "
                "again, to another folder, with the tokenizer of that model (scripts/prepare_data.py --tokenizer)"
            )
        raise DataError(
            f"model.vocab_size is {vocab_size}, but the data was written with a tokenizer of {needed} tokens: "
            f"set model.vocab_size to {needed} or more"
        )
