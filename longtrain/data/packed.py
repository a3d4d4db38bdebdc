"""Packed sequences of exactly T tokens, read from memory-mapped shards.

A split is one stream of documents. Sequence i holds its tokens [i * T, (i + 1) * T); a document cut by a border goes on in the
next sequence as a new segment with positions from 0. The tail below T is dropped.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from longtrain.batch import IGNORE
from longtrain.data.manifest import Manifest, Shard, check_tokenizer, read_manifest
from longtrain.errors import DataError
from longtrain.files import sha256_of


class PackedRow(NamedTuple):
    """One row of a Batch: tokens, labels, positions int64 [T], segment_ids int32 [T], boundaries as in Batch."""

    tokens: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]
    segment_ids: npt.NDArray[np.int32]
    boundaries: tuple[int, ...]


class PackedSplit:
    """The sequences of one split ("train" or "heldout") of a prepared data folder.

    Opening checks the manifest, the tokenizer's SHA-256, the size of every file and the document index; `verify` also reads
    every token. DataError names the file that is missing, damaged or foreign, or says how short the split is.
    """

    def __init__(self, folder: str | Path, split: str, sequence_length: int) -> None:
        self.folder = Path(folder)
        self.split = split
        self.sequence_length = sequence_length
        self.manifest: Manifest = read_manifest(self.folder)
        check_tokenizer(self.folder, self.manifest)
        if split not in self.manifest.splits:
            raise DataError(f"{self.folder}: has no split {split!r}; it has {', '.join(self.manifest.splits)}")
        self._shards: list[Shard] = self.manifest.splits[split]
        self._maps = [self._open(shard) for shard in self._shards]
        self._shard_ends = np.cumsum([shard.tokens for shard in self._shards])
        starts = self._shard_ends - [shard.tokens for shard in self._shards]
        self._document_ends = np.concatenate(
            [self._read_index(shard) + start for shard, start in zip(self._shards, starts, strict=True)]
        )
        # T tokens are enough, not T + 1: the last token of a split ends a document, so it has no label to look up.
        self._length = self.tokens // sequence_length
        if not self._length:
            raise DataError(
                f"{self.folder}: the split {split!r} has {self.tokens} tokens, fewer than one sequence of {sequence_length}: "
                + ("set evaluation.every to null, prepare with a larger --held-out, or " if split != "train" else "")
                + "lower training.sequence_length or prepare more text"
            )

    @property
    def tokens(self) -> int:
        """Tokens of the split, the dropped tail included."""
        return int(self._shard_ends[-1])

    @property
    def documents(self) -> int:
        """Documents of the split."""
        return self._document_ends.size

    def __len__(self) -> int:
        """Number of whole sequences."""
        return self._length

    def sequence(self, index: int) -> PackedRow:
        """Sequence `index` in [0, len): its rows of a Batch. A label is the next token of the same document, IGNORE at its end.

        Raises DataError where a token is outside the vocabulary: the shard was swapped or damaged after the manifest was written.
        """
        if not 0 <= index < self._length:
            raise IndexError(f"sequence {index} of {self._length}")
        T = self.sequence_length
        start, stop = index * T, (index + 1) * T
        first = int(np.searchsorted(self._document_ends, start, side="right"))
        last = int(np.searchsorted(self._document_ends, stop, side="left"))
        cuts = self._document_ends[first:last] - start
        goes_on = self._document_ends[last] > stop
        stream = self._read(start, stop + int(goes_on))
        if (largest := int(stream.max())) >= self.manifest.tokenizer.vocab_size:
            raise DataError(
                f"{self.folder}: sequence {index} of {self.split!r} holds token {largest}, outside the vocabulary of "
                f"{self.manifest.tokenizer.vocab_size}: a shard is foreign or damaged; copy or prepare the data again"
            )
        labels = np.full(T, IGNORE, dtype=np.int64)
        labels[: stream.size - 1] = stream[1:]
        labels[cuts - 1] = IGNORE
        starts = np.concatenate(([0], cuts))
        lengths = np.diff(starts, append=T)
        positions = np.arange(T, dtype=np.int64) - np.repeat(starts, lengths)
        segment_ids = np.repeat(np.arange(lengths.size, dtype=np.int32), lengths)
        return PackedRow(stream[:T], labels, positions, segment_ids, (*starts.tolist(), T))

    def context_share(self, sequence_length: int | None = None) -> float:
        """`context_share` of this split, at its own sequence length unless another is given."""
        return context_share(self._document_ends, sequence_length or self.sequence_length)

    def verify(self) -> None:
        """Read everything. DataError where a file is not, byte for byte, what was written, or an id is outside the vocabulary."""
        vocab_size = self.manifest.tokenizer.vocab_size
        for shard, tokens in zip(self._shards, self._maps, strict=True):
            for name, digest in ((shard.file, shard.sha256), (shard.index, shard.index_sha256)):
                if sha256_of(self.folder / name) != digest:
                    raise DataError(f"{self.folder / name}: is not what was written (SHA-256); copy or prepare the data again")
            if (largest := int(tokens.max())) >= vocab_size:
                raise DataError(f"{self.folder / shard.file}: holds token {largest}, outside the vocabulary of {vocab_size}")

    def _open(self, shard: Shard) -> npt.NDArray:
        path = self.folder / shard.file
        _check_size(path, shard.bytes)
        return np.memmap(path, dtype=self.manifest.token_dtype, mode="r")

    def _read_index(self, shard: Shard) -> npt.NDArray[np.int64]:
        path = self.folder / shard.index
        _check_size(path, 8 * shard.documents)
        content = path.read_bytes()
        ends = np.frombuffer(content, dtype="<i8").astype(np.int64, copy=False)
        ours = hashlib.sha256(content).hexdigest() == shard.index_sha256
        if not ours or ends[-1] != shard.tokens or (np.diff(ends, prepend=0) <= 0).any():
            raise DataError(f"{path}: is no list of document ends of {shard.file}: foreign or damaged; prepare the data again")
        return ends

    def _read(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Tokens [start, stop) of the stream."""
        parts = []
        shard = int(np.searchsorted(self._shard_ends, start, side="right"))
        while start < stop:
            end = int(self._shard_ends[shard])
            origin = end - self._shards[shard].tokens
            parts.append(self._maps[shard][start - origin : stop - origin])
            start, shard = end, shard + 1
        return np.concatenate(parts, dtype=np.int64)


def context_share(document_ends: npt.NDArray[np.int64], sequence_length: int) -> float:
    """Share of the packed tokens that see more than T / 4 earlier ones: their position in sequence and document exceeds T / 4.

    document_ends: int64, increasing, the last is the number of tokens. 0 where not one sequence is full.
    """
    stop = int(document_ends[-1]) // sequence_length * sequence_length
    if not stop:
        return 0.0
    cuts = np.union1d(document_ends[document_ends < stop], np.arange(0, stop + 1, sequence_length))
    beyond = np.diff(cuts) - (sequence_length // 4 + 1)
    return float(np.maximum(beyond, 0).sum() / stop)


def context_warning(share: float, sequence_length: int) -> str | None:
    """What to tell the user where most tokens see less than T / 4 of real context, else None."""
    if share > 0.5:
        return None
    return (
        f"only {share:.0%} of the tokens see more than {sequence_length // 4} tokens of their own document at sequence length "
        f"{sequence_length}: most of the attention is cut at document borders; use longer documents or shorter sequences"
    )


def _check_size(path: Path, size: int) -> None:
    try:
        actual = path.stat().st_size
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); copy or prepare the data again") from None
    if actual != size:
        raise DataError(f"{path}: has {actual} bytes, the manifest says {size}: truncated or foreign; copy or prepare it again")
