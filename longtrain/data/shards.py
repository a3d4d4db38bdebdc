"""Writing token shards, so that a writer can go on where a killed one was."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

from longtrain.data.manifest import MANIFEST, Manifest, Shard
from longtrain.errors import DataError
from longtrain.files import sync_file, sync_path, write_durably


class Written(BaseModel):
    """What a SplitWriter has put on the disk: whole shards, and the beginning of one more, with the digests of that beginning."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shards: tuple[Shard, ...] = ()
    tokens: int = 0
    documents: int = 0
    sha256: str = ""
    index_sha256: str = ""


class SplitWriter:
    """Writes the documents of one split into shards of about `shard_tokens` tokens; a document never spans two of them.

    A context manager; after it, `shards` describes files that are on the disk. `written`: goes on there, in files that hold more
    or just that; DataError where they hold something else.
    """

    def __init__(self, folder: Path, split: str, dtype: np.dtype, shard_tokens: int, written: Written | None = None) -> None:
        self.shards: list[Shard] = list(written.shards) if written else []
        self._folder = folder
        self._split = split
        self._dtype = dtype
        self._shard_tokens = shard_tokens
        self._open: _OpenShard | None = None
        if written is not None:
            self._check(written)

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """int64 [documents]: tokens of every document in finished shards, read from the disk."""
        ends = [np.fromfile(self._folder / shard.index, dtype="<i8") for shard in self.shards]
        return np.concatenate([np.diff(part, prepend=0) for part in ends]) if ends else np.zeros(0, dtype=np.int64)

    @property
    def tokens(self) -> int:
        """Tokens added, by killed writers too."""
        return sum(shard.tokens for shard in self.shards) + (self._open.tokens if self._open else 0)

    @property
    def documents(self) -> int:
        """Documents added, by killed writers too."""
        return sum(shard.documents for shard in self.shards) + (self._open.documents if self._open else 0)

    def add(self, tokens: npt.ArrayLike) -> None:
        """Append one document: token ids, BOS and EOS included, at least one."""
        data = np.asarray(tokens, dtype=self._dtype)
        if self._open is not None and self._open.tokens + data.size > self._shard_tokens:
            self._finish()
        if self._open is None:
            self._open = _OpenShard(self._folder, self._name(), "xb")
        self._open.add(data)

    def sync(self) -> Written:
        """Waits until everything added is on the disk."""
        if self._open is None:
            return Written(shards=tuple(self.shards))
        self._open.sync()
        digests = {"sha256": self._open.data_digest.hexdigest(), "index_sha256": self._open.index_digest.hexdigest()}
        return Written(shards=tuple(self.shards), tokens=self._open.tokens, documents=self._open.documents, **digests)

    def __enter__(self) -> SplitWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._open is not None and error is None:
            self._finish()
        elif self._open is not None:
            self._open.close()

    def _name(self) -> str:
        return f"{self._split}-{len(self.shards):05d}.bin"

    def _finish(self) -> None:
        assert self._open is not None
        shard, self._open = self._open, None
        shard.sync()
        shard.close()
        self.shards.append(
            Shard(
                file=shard.name,
                tokens=shard.tokens,
                documents=shard.documents,
                bytes=shard.tokens * self._dtype.itemsize,
                sha256=shard.data_digest.hexdigest(),
                index_sha256=shard.index_digest.hexdigest(),
            )
        )

    def _check(self, written: Written) -> None:
        """Everything written is there, byte for byte; what came after it is cut off."""
        kept = {shard.file for shard in written.shards}
        for shard in written.shards:
            _OpenShard(self._folder, shard.file, "r+b").cut(shard, self._dtype).close()
        if written.documents:
            kept.add(self._name())
            self._open = _OpenShard(self._folder, self._name(), "r+b").cut(written, self._dtype)
        for path in self._folder.glob(f"{self._split}-*"):
            if path.with_suffix(".bin").name not in kept:
                path.unlink()


class _OpenShard:
    """The two files of a shard that grows."""

    def __init__(self, folder: Path, name: str, mode: str) -> None:
        self.name = name
        self.tokens = 0
        self.documents = 0
        self.data_digest = hashlib.sha256()
        self.index_digest = hashlib.sha256()
        try:
            self._data: BinaryIO = (folder / name).open(mode)  # type: ignore[assignment]
            self._index: BinaryIO = (folder / name).with_suffix(".idx").open(mode)  # type: ignore[assignment]
        except FileNotFoundError as error:
            raise DataError(f"{error.filename}: is gone since an unfinished preparation wrote it; {_START_OVER}") from None

    def add(self, data: npt.NDArray) -> None:
        self.tokens += data.size
        self.documents += 1
        for file, digest, content in (
            (self._data, self.data_digest, data.tobytes()),
            (self._index, self.index_digest, self.tokens.to_bytes(8, "little")),
        ):
            file.write(content)
            digest.update(content)

    def cut(self, written: Written | Shard, dtype: np.dtype) -> _OpenShard:
        """Keeps what was written and goes on after it. DataError where it is not there, byte for byte."""
        self.tokens, self.documents = written.tokens, written.documents
        for file, digest, size, expected in (
            (self._data, self.data_digest, self.tokens * dtype.itemsize, written.sha256),
            (self._index, self.index_digest, 8 * self.documents, written.index_sha256),
        ):
            left = size
            while left and (content := file.read(min(left, 1 << 24))):
                digest.update(content)
                left -= len(content)
            if left or digest.hexdigest() != expected:
                raise DataError(f"{file.name}: is not what an unfinished preparation wrote; {_START_OVER}")
            file.truncate(size)
            file.seek(size)
        return self

    def sync(self) -> None:
        sync_file(self._data)
        sync_file(self._index)

    def close(self) -> None:
        self._data.close()
        self._index.close()


_START_OVER = "delete its folder, or start over with --overwrite"


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json, whole or not at all; call it after every other file."""
    temporary = folder / f"{MANIFEST}.tmp"
    write_durably(temporary, (manifest.model_dump_json(indent=2) + "\n").encode())
    temporary.rename(folder / MANIFEST)
    sync_path(folder)
