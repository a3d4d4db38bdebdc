"""Pieces of text to token ids, in this process or in several; the result and its order are the same.

Worker processes import this module and little else: not torch, not the command line.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from longtrain.data.corpus import Skipped, place_of
from longtrain.data.records import Piece, Record, Step
from longtrain.data.tokenizer import Encoder
from longtrain.errors import DataError

AHEAD = 3
"""Pieces in work for every worker, so that none waits for the next one to be read."""


@dataclass
class Encoded:
    """Documents of a piece: by split, the ids of each, BOS and EOS included. records: all that were read."""

    documents: dict[str, list[npt.NDArray[np.uint32]]] = field(default_factory=lambda: {"train": [], "heldout": []})
    records: int = 0
    skipped: Skipped = field(default_factory=Skipped)


@dataclass(frozen=True)
class PieceEncoder:
    """What a worker has to know. text_field: of a record; held_out: share of the records kept from training, by their text."""

    tokenizer: Encoder
    text_field: str
    held_out: float

    def __call__(self, piece: Piece) -> Encoded:
        """Raises DataError where the piece cannot be read, or the tokenizer would lose some of its text."""
        encoded = Encoded()
        usable: list[Record] = []
        for record in piece.records(self.text_field):
            encoded.records += 1
            problem = record.problem or (None if record.text.strip() else "empty")
            if problem is None:
                usable.append(record)
            else:
                encoded.skipped.add(problem, record.name)
        bos, eos = self.tokenizer.bos, self.tokenizer.eos
        front = [] if bos is None else [bos]
        for record, tokens in zip(usable, self._ids(usable), strict=True):
            split = "heldout" if is_held_out(record, self.held_out) else "train"
            encoded.documents[split].append(np.array([*front, *tokens, eos], dtype=np.uint32))
        return encoded

    def _ids(self, records: list[Record]) -> list[list[int]]:
        try:
            return self.tokenizer.encode_many([record.text for record in records], threads=1)
        except DataError:
            for record in records:  # one by one, to name the first
                try:
                    self.tokenizer.encode(record.text)
                except DataError as error:
                    raise DataError(f"{record.name}: {error}") from None
            raise


def is_held_out(record: Record, share: float) -> bool:
    """Whether a record is kept from training. By its text, so that a repeated text is on one side."""
    return place_of(record.text.encode()) < share if record.held_out is None else record.held_out


class Work(NamedTuple):
    """A piece and its documents. source: number of its source."""

    source: int
    step: Step
    encoded: Encoded


def encode_all(steps: Iterable[tuple[int, Step]], encoder: PieceEncoder, workers: int) -> Generator[Work, None, None]:
    """Every piece, encoded, in the order given. DataError where one cannot be read, or a worker was killed."""
    if workers == 1:
        for source, step in steps:
            yield Work(source, step, encoder(step.piece))
        return
    # Not forked: the libraries hold threads by now.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=(encoder,))
    ahead: deque[tuple[int, Step, Future[Encoded]]] = deque()
    try:
        for source, step in steps:
            ahead.append((source, step, pool.submit(_encode, step.piece)))
            if len(ahead) > AHEAD * workers:
                yield _next(ahead)
        while ahead:
            yield _next(ahead)
    except BrokenProcessPool:
        raise DataError(
            "a worker process ended by itself, probably killed for want of memory: give the command again with fewer --workers"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _next(ahead: deque[tuple[int, Step, Future[Encoded]]]) -> Work:
    source, step, future = ahead.popleft()
    return Work(source, step, future.result())


_encoder: PieceEncoder | None = None  # of a worker process, given to it once


def _begin(encoder: PieceEncoder) -> None:
    global _encoder
    _encoder = encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent to act on
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A parent that is killed cannot end its workers, and they would wait for pieces for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)


def _encode(piece: Piece) -> Encoded:
    assert _encoder is not None
    return _encoder(piece)
