"""Batches of a data-parallel rank: pure functions of the step, computed one step ahead."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from types import TracebackType

import numpy as np
import torch

from longtrain.attention.dropout import derive
from longtrain.batch import IGNORE, PADDING, Batch
from longtrain.data.mixture import Split
from longtrain.data.packed import PackedRow
from longtrain.errors import DataError


class Loader:
    """Training batches of one data-parallel rank.

    Step s uses the sequences at positions s * batch_size ... (s + 1) * batch_size - 1 of the split's order; micro batch m of rank d
    holds rows (m * dp + d) * micro_batch_size + b of them. So the union over the ranks does not depend on dp, and nothing but the
    step number is needed to resume. ValueError where batch_size is no multiple of dp * micro_batch_size, DataError where a step
    would take more sequences than there are.
    """

    def __init__(self, split: Split, *, seed: int, batch_size: int, micro_batch_size: int, dp: int, dp_rank: int) -> None:
        if batch_size % (micro_batch_size * dp) or not 0 <= dp_rank < dp:
            raise ValueError(f"batch_size {batch_size} over dp {dp} (rank {dp_rank}) x micro_batch_size {micro_batch_size}")
        if batch_size > split.largest_batch:
            raise DataError(
                f"training.batch_size: {batch_size} are wanted in a step, but {split.folder} holds {len(split)} training sequences "
                f"of {split.sequence_length} tokens: set it to {split.largest_batch} or less, or prepare more text"
            )
        self.accumulation = batch_size // (micro_batch_size * dp)
        self.order = split.order(seed, batch_size)
        self._split = split
        self._batch_size = batch_size
        self._seed = torch.tensor([seed])
        self._rows = [
            [(m * dp + dp_rank) * micro_batch_size + b for b in range(micro_batch_size)] for m in range(self.accumulation)
        ]
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self._ahead: tuple[int, Future[list[Batch]]] | None = None

    def step(self, step: int) -> list[Batch]:
        """The micro batches of this rank for a step, on the host; starts reading the next step in the background."""
        if self._ahead is not None and self._ahead[0] == step:
            future = self._ahead[1]
        else:
            future = self._executor.submit(self._read, step)
        try:
            return future.result()
        finally:
            self._ahead = (step + 1, self._executor.submit(self._read, step + 1))

    def close(self) -> None:
        """Stop the background thread; step() is not to be called again."""
        self._executor.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _read(self, step: int) -> list[Batch]:
        first = step * self._batch_size
        return [self._micro_batch([first + row for row in rows]) for rows in self._rows]

    def _micro_batch(self, numbers: Sequence[int]) -> Batch:
        """The sequences with these numbers in the order of the data; a number never comes again, so it seeds their dropout."""
        batch = _batch([self._split.sequence(self.order(number)) for number in numbers])
        return replace(batch, seeds=torch.cat([derive(self._seed, number) for number in numbers]))


def held_out(split: Split, count: int, *, micro_batch_size: int, dp: int, dp_rank: int) -> list[Batch]:
    """Evaluation batches of one data-parallel rank: `count` sequences spread evenly over the split, or by weight over a mixture.

    Rows go to the ranks as in `Loader`; every rank gets the same number of batches of micro_batch_size rows, filled up with rows
    of padding (tokens and positions 0, labels IGNORE, segment ids PADDING, boundaries (0,)). DataError where the split has fewer.
    """
    if count > len(split):
        raise DataError(
            f"evaluation.sequences: {count} are wanted, but {split.folder} holds {len(split)} held-out sequences of "
            f"{split.sequence_length} tokens: set it to {len(split)} or less, or prepare the data with more held-out text"
        )
    padding = _padding(split.sequence_length)
    chosen = split.spread(count)
    batches = []
    for first in range(dp_rank * micro_batch_size, dp_rank * micro_batch_size + count, dp * micro_batch_size):
        rows = range(first, first + micro_batch_size)
        batches.append(_batch([split.sequence(chosen[row]) if row < count else padding for row in rows]))
    return batches


def _padding(T: int) -> PackedRow:
    zeros = np.zeros(T, dtype=np.int64)
    return PackedRow(zeros, np.full(T, IGNORE, dtype=np.int64), zeros, np.full(T, PADDING, dtype=np.int32), (0,))


def _batch(rows: Sequence[PackedRow]) -> Batch:
    tokens, labels, positions, segment_ids = (torch.from_numpy(np.stack([row[field] for row in rows])) for field in range(4))
    return Batch(tokens, labels, positions, segment_ids, tuple(row.boundaries for row in rows))
