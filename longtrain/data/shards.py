"""Writing token shards, and a folder that appears whole or not at all."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from longtrain.data.manifest import MANIFEST, TOKENIZER, Manifest, Shard
from longtrain.errors import DataError
from longtrain.files import sync_file, sync_path, write_durably

_OURS = re.compile(rf"{re.escape(MANIFEST)}|{re.escape(TOKENIZER)}|(train|heldout)-\d+\.(bin|idx)")


class SplitWriter:
    """Writes the documents of one split into shards of about `shard_tokens` tokens; a document never spans two of them.

    A context manager; after it, `shards` describes files that are on the disk. `lengths`: tokens of every document added.
    """

    def __init__(self, folder: Path, split: str, dtype: np.dtype, shard_tokens: int) -> None:
        self.lengths: list[int] = []
        self.shards: list[Shard] = []
        self._folder = folder
        self._split = split
        self._dtype = dtype
        self._shard_tokens = shard_tokens
        self._file: BinaryIO | None = None
        self._ends: list[int] = []
        self._digest = hashlib.sha256()

    def add(self, tokens: npt.ArrayLike) -> None:
        """Append one document: token ids, BOS and EOS included, at least one."""
        data = np.asarray(tokens, dtype=self._dtype)
        if self._file is not None and self._ends[-1] + data.size > self._shard_tokens:
            self._finish()
        if self._file is None:
            self._file = (self._folder / f"{self._split}-{len(self.shards):05d}.bin").open("xb")
            self._ends, self._digest = [], hashlib.sha256()
        content = data.tobytes()
        self._file.write(content)
        self._digest.update(content)
        self._ends.append((self._ends[-1] if self._ends else 0) + data.size)
        self.lengths.append(data.size)

    def __enter__(self) -> SplitWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._file is not None and error is None:
            self._finish()
        elif self._file is not None:
            self._file.close()

    def _finish(self) -> None:
        assert self._file is not None
        name = f"{self._split}-{len(self.shards):05d}.bin"
        with self._file as file:
            sync_file(file)
        self._file = None
        index = np.asarray(self._ends, dtype="<i8").tobytes()
        shard = Shard(
            file=name,
            tokens=self._ends[-1],
            documents=len(self._ends),
            bytes=self._ends[-1] * self._dtype.itemsize,
            sha256=self._digest.hexdigest(),
            index_sha256=hashlib.sha256(index).hexdigest(),
        )
        write_durably(self._folder / shard.index, index)
        self.shards.append(shard)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json, whole or not at all; call it after every other file."""
    temporary = folder / f"{MANIFEST}.tmp"
    write_durably(temporary, (manifest.model_dump_json(indent=2) + "\n").encode())
    temporary.rename(folder / MANIFEST)
    sync_path(folder)


def check_target(out: Path, overwrite: bool) -> None:
    """DataError unless `out` may be created, or replaced without losing anything but older prepared data."""
    if not out.exists() and not out.is_symlink():
        return
    if not out.is_dir():
        raise DataError(f"--out {out}: is a file; give a folder")
    entries = sorted(entry.name for entry in out.iterdir())
    if not entries:
        return
    if not overwrite:
        raise DataError(f"--out {out}: exists and is not empty; choose another folder, or replace it with --overwrite")
    foreign = [name for name in entries if not _OURS.fullmatch(name)]
    if foreign:
        raise DataError(f"--out {out}: holds {foreign[0]!r}, which is no prepared data: refusing to --overwrite it")


@contextmanager
def whole_folder(out: Path, overwrite: bool) -> Iterator[Path]:
    """A new sibling folder to write into; on success it takes the place of `out`, on any error it is removed and `out` stays.

    A killed process leaves .NAME.partial-PID, which may be deleted. DataError as in `check_target`.
    """
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    replaced = out.with_name(f".{out.name}.replaced")
    if replaced.exists() and not out.exists():
        replaced.rename(out)  # a swap was cut between its two renames
    check_target(out, overwrite)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        sync_path(partial)
        check_target(out, overwrite)
        _swap(partial, out, replaced)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def _swap(new: Path, out: Path, replaced: Path) -> None:
    shutil.rmtree(replaced, ignore_errors=True)
    if out.exists():
        out.rename(replaced)
    try:
        new.rename(out)
    except BaseException:
        if replaced.exists():
            replaced.rename(out)
        raise
    sync_path(out.parent)
