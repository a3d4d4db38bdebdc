"""Packed sequences of exactly T tokens, read from memory-mapped shards.

A split is one stream of documents. Sequence i holds its tokens [i * T, (i + 1) * T); a document cut by a border goes on in the
next sequence as a new segment with positions from 0. The tail below T is dropped. What becomes of documents longer than T:

- keep: nothing special.
- split: their pieces of T tokens are sequences of their own and come first; what is left of them is packed with the short ones.
- drop: they are left out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from longtrain.batch import IGNORE
from longtrain.data.context import context_share, context_warning
from longtrain.data.manifest import Manifest, Shard, TokenizerEntry, check_tokenizer, read_manifest
from longtrain.data.order import Order
from longtrain.errors import DataError
from longtrain.files import sha256_of
from longtrain.recipe.schema import LongDocuments


class PackedRow(NamedTuple):
    """One row of a Batch: tokens, labels, positions int64 [T], segment_ids int32 [T], boundaries as in Batch."""

    tokens: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]
    segment_ids: npt.NDArray[np.int32]
    boundaries: tuple[int, ...]


class _Spans(NamedTuple):
    """What a split is packed from, in the order of packing: int64 [n] each, but goes_on bool.

    starts: the first token on the disk; ends: tokens of all spans up to and with this one; goes_on: whether the next token on the
    disk is of the same document.
    """

    starts: npt.NDArray[np.int64]
    ends: npt.NDArray[np.int64]
    goes_on: npt.NDArray[np.bool_]

    @property
    def tokens(self) -> int:
        return int(self.ends[-1]) if self.ends.size else 0

    def cut(self, start: int, length: int) -> tuple[npt.NDArray, npt.NDArray, npt.NDArray, npt.NDArray]:
        """What fills `length` tokens of the packed stream from `start`: places in them, starts on the disk, lengths, goes_on."""
        first = int(np.searchsorted(self.ends, start, side="right"))
        last = int(np.searchsorted(self.ends, start + length, side="left")) + 1
        ends = self.ends[first:last]
        begin = np.concatenate(([self.ends[first - 1] if first else 0], ends[:-1]))
        inside, stops = np.maximum(begin, start), np.minimum(ends, start + length)
        goes_on = self.goes_on[first:last] | (stops < ends)
        return inside - start, self.starts[first:last] + inside - begin, stops - inside, goes_on


def _spans(document_ends: npt.NDArray[np.int64], T: int, long_documents: LongDocuments) -> _Spans:
    starts = np.concatenate(([0], document_ends[:-1]))
    lengths = document_ends - starts
    goes_on = np.zeros(starts.size, dtype=np.bool_)
    long = lengths > T
    if long_documents is LongDocuments.KEEP or not long.any():
        return _Spans(starts, document_ends, goes_on)
    if long_documents is LongDocuments.DROP:
        starts, lengths, goes_on = starts[~long], lengths[~long], goes_on[~long]
        return _Spans(starts, np.cumsum(lengths), goes_on)
    pieces = np.where(long, lengths // T, 0)
    number = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    whole = np.repeat(starts, pieces) + T * number
    rest = np.where(long, lengths % T, lengths)
    left = rest > 0
    starts = np.concatenate((whole, (starts + T * pieces)[left]))
    lengths = np.concatenate((np.full(whole.size, T), rest[left]))
    # a piece is followed by its document unless the piece ends with it
    ends = np.repeat(document_ends, pieces)
    goes_on = np.concatenate((whole + T < ends, np.zeros(int(left.sum()), dtype=np.bool_)))
    return _Spans(starts, np.cumsum(lengths), goes_on)


class PackedSplit:
    """The sequences of one split ("train" or "heldout") of a prepared data folder.

    Opening checks the manifest, the tokenizer's SHA-256, the size of every file and the document index; `verify` also reads
    every token. DataError names the file that is missing, damaged or foreign, or says how short the split is.
    """

    def __init__(
        self,
        folder: str | Path,
        split: str,
        sequence_length: int,
        long_documents: LongDocuments = LongDocuments.KEEP,
    ) -> None:
        self.folder = Path(folder)
        self.split = split
        self.sequence_length = sequence_length
        self.long_documents = long_documents
        self.manifest: Manifest = read_manifest(self.folder)
        check_tokenizer(self.folder, self.manifest)
        if split not in self.manifest.splits:
            raise DataError(f"{self.folder}: has no split {split!r}; it has {', '.join(self.manifest.splits)}")
        self._shards: list[Shard] = self.manifest.splits[split]
        self._maps = [self._open(shard) for shard in self._shards]
        self._shard_ends = np.cumsum([shard.tokens for shard in self._shards])
        origins = self._shard_ends - [shard.tokens for shard in self._shards]
        self._document_ends = np.concatenate(
            [self._read_index(shard) + origin for shard, origin in zip(self._shards, origins, strict=True)]
        )
        self._spans = _spans(self._document_ends, sequence_length, long_documents)
        # T tokens are enough, not T + 1: the last token of a split ends a document, so it has no label to look up.
        self._length = self._spans.tokens // sequence_length
        if not self._length:
            dropped = f" after data.long_documents {long_documents}" if long_documents is not LongDocuments.KEEP else ""
            raise DataError(
                f"{self.folder}: the split {split!r} has {self._spans.tokens} tokens{dropped}, fewer than one sequence of "
                f"{sequence_length}: "
                + ("set evaluation.every to null, prepare with a larger --held-out, or " if split != "train" else "")
                + "lower training.sequence_length or prepare more text"
            )

    @property
    def tokens(self) -> int:
        """Tokens on the disk, the dropped tail and dropped documents included."""
        return int(self._shard_ends[-1])

    @property
    def bytes(self) -> int:
        """Bytes of the tokens on the disk."""
        return self.tokens * self.manifest.token_dtype.itemsize

    @property
    def documents(self) -> int:
        """Documents on the disk."""
        return self._document_ends.size

    @property
    def tokenizer(self) -> TokenizerEntry:
        """The tokenizer that wrote the tokens."""
        return self.manifest.tokenizer

    @property
    def fingerprint(self) -> str:
        """Equal for splits that give the same sequences of any one length, wherever they lie."""
        return fingerprint(self.manifest, self.split, self.long_documents)

    @property
    def largest_batch(self) -> int:
        """The most sequences that a step may take: as many as there are. A step in which the split is used up goes on with another
        order of it, and may show a sequence twice."""
        return self._length

    def __len__(self) -> int:
        """Number of whole sequences."""
        return self._length

    def order(self, seed: int, batch_size: int) -> Callable[[int], int]:
        """Position in the infinite order of training -> index of a sequence; the order here does not depend on batch_size."""
        return Order(self._length, seed)

    def spread(self, count: int) -> list[int]:
        """`count` <= len indices, evenly over the split."""
        return [row * self._length // count for row in range(count)]

    def sequence(self, index: int) -> PackedRow:
        """Sequence `index` in [0, len): its rows of a Batch. A label is the next token of the same document, IGNORE at its end.

        Raises DataError where a token is outside the vocabulary: the shard was swapped or damaged after the manifest was written.
        """
        if not 0 <= index < self._length:
            raise IndexError(f"sequence {index} of {self._length}")
        T = self.sequence_length
        places, starts, lengths, goes_on = self._spans.cut(index * T, T)
        tokens, labels = np.empty(T, dtype=np.int64), np.full(T, IGNORE, dtype=np.int64)
        stops = starts + lengths
        breaks = np.flatnonzero(starts[1:] != stops[:-1]) + 1
        for first, last in zip([0, *breaks], [*breaks - 1, lengths.size - 1], strict=True):
            # one token more where the document goes on: it is the last label
            run = self._read(int(starts[first]), int(stops[last]) + int(goes_on[last]))
            place, end = int(places[first]), int(places[last] + lengths[last])
            tokens[place:end] = run[: end - place]
            labels[place : place + run.size - 1] = run[1:]
        labels[(places + lengths - 1)[~goes_on]] = IGNORE
        self._check(index, max(tokens.max(), labels.max()))
        positions = np.arange(T, dtype=np.int64) - np.repeat(places, lengths)
        segment_ids = np.repeat(np.arange(lengths.size, dtype=np.int32), lengths)
        return PackedRow(tokens, labels, positions, segment_ids, (*places.tolist(), T))

    def _check(self, index: int, largest: int) -> None:
        if largest >= self.manifest.tokenizer.vocab_size:
            raise DataError(
                f"{self.folder}: sequence {index} of {self.split!r} holds token {largest}, outside the vocabulary of "
                f"{self.manifest.tokenizer.vocab_size}: a shard is foreign or damaged; copy or prepare the data again"
            )

    def context_share(self, sequence_length: int | None = None) -> float:
        """`context_share` of this split, at its own sequence length unless another is given."""
        return context_share(self._spans.ends, sequence_length or self.sequence_length)

    def warning(self) -> str | None:
        """What to tell the user where most tokens see little real context, else None."""
        return context_warning(self.context_share(), self.sequence_length)

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


def fingerprint(manifest: Manifest, split: str, long_documents: LongDocuments) -> str:
    """What decides the sequences of a split, and with it the order of training: SHA-256."""
    tokens = manifest.fingerprint(split)
    if long_documents is LongDocuments.KEEP:
        return tokens
    return hashlib.sha256(f"{tokens} long_documents {long_documents}".encode()).hexdigest()


def _check_size(path: Path, size: int) -> None:
    try:
        actual = path.stat().st_size
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); copy or prepare the data again") from None
    if actual != size:
        raise DataError(f"{path}: has {actual} bytes, the manifest says {size}: truncated or foreign; copy or prepare it again")
