from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from longtrain.batch import IGNORE, PADDING, Batch
from longtrain.data.loader import Loader, held_out
from longtrain.data.order import Order
from longtrain.data.packed import PackedRow, PackedSplit
from longtrain.errors import DataError

T = 8


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory, write_prepared: Callable[..., Path]) -> PackedSplit:
    lengths = [5, 1, 30, 2, 8, 8, 17, 1, 1, 40, 3]
    starts = [sum(lengths[:n]) for n in range(len(lengths))]
    documents = [list(range(start, start + length)) for start, length in zip(starts, lengths, strict=True)]
    return PackedSplit(write_prepared(tmp_path_factory.mktemp("loader") / "data", documents), "train", T)


def loader(
    split: PackedSplit, dp: int = 1, dp_rank: int = 0, batch_size: int = 8, micro_batch_size: int = 2, seed: int = 3
) -> Loader:
    return Loader(split, seed=seed, batch_size=batch_size, micro_batch_size=micro_batch_size, dp=dp, dp_rank=dp_rank)


def equal(a: Batch, b: Batch) -> bool:
    names = ("tokens", "labels", "positions", "segment_ids")
    return a.boundaries == b.boundaries and all(torch.equal(getattr(a, name), getattr(b, name)) for name in names)


def test_a_batch_holds_the_rows_of_its_sequences(split: PackedSplit) -> None:
    order = Order(len(split), 3)
    with loader(split) as reader:
        for step in range(5):
            batches = reader.step(step)
            assert len(batches) == reader.accumulation == 4
            for m, batch in enumerate(batches):
                assert batch.tokens.shape == batch.labels.shape == batch.positions.shape == batch.segment_ids.shape == (2, T)
                assert (batch.tokens.dtype, batch.segment_ids.dtype) == (torch.int64, torch.int32)
                for b in range(2):
                    row = split.sequence(order(step * 8 + m * 2 + b))
                    assert batch.tokens[b].tolist() == row.tokens.tolist()
                    assert batch.labels[b].tolist() == row.labels.tolist()
                    assert batch.positions[b].tolist() == row.positions.tolist()
                    assert batch.segment_ids[b].tolist() == row.segment_ids.tolist()
                    assert batch.boundaries[b] == row.boundaries


@pytest.mark.parametrize("dp", [1, 2, 4])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_union_over_ranks_is_the_batch_of_one(split: PackedSplit, dp: int, accumulation: int) -> None:
    micro = 8 // (dp * accumulation)
    with loader(split, micro_batch_size=8) as one:
        whole = [one.step(step)[0].tokens for step in range(4)]
    for step in range(4):
        parts: list[list[Batch]] = []
        for rank in range(dp):
            with loader(split, dp, rank, micro_batch_size=micro) as reader:
                parts.append(reader.step(step))
        rows = torch.cat([parts[rank][m].tokens for m in range(accumulation) for rank in range(dp)])
        assert torch.equal(rows, whole[step])


def test_resume_and_jumps_equal_going_on(split: PackedSplit) -> None:
    with loader(split) as reader:
        straight = [reader.step(step) for step in range(7)]
    with loader(split) as resumed:
        for step in (4, 5, 6, 2, 2, 0, 1):
            assert all(equal(a, b) for a, b in zip(resumed.step(step), straight[step], strict=True))


def test_an_epoch_shows_every_sequence_once(split: PackedSplit) -> None:
    with loader(split, batch_size=1, micro_batch_size=1) as reader:
        firsts = sorted(int(reader.step(step)[0].tokens[0, 0]) for step in range(len(split)))
    assert firsts == [index * T for index in range(len(split))]


class Failing:
    """A split whose disk fails from the given sequence number on."""

    def __init__(self, split: PackedSplit, healthy: int) -> None:
        self.sequence_length, self.calls, self.healthy, self.split = T, 0, healthy, split
        self.largest_batch, self.order = split.largest_batch, split.order

    def __len__(self) -> int:
        return len(self.split)

    def sequence(self, index: int) -> PackedRow:
        self.calls += 1
        if self.calls > self.healthy:
            raise OSError("disk gone")
        return self.split.sequence(index)


def test_errors_of_the_background_reach_the_caller(split: PackedSplit) -> None:
    with loader(Failing(split, 8)) as reader:  # type: ignore[arg-type]
        reader.step(0)
        with pytest.raises(OSError, match="disk gone"):
            reader.step(1)
        with pytest.raises(OSError, match="disk gone"):
            reader.step(1)


def test_reads_one_step_ahead_and_closes(split: PackedSplit) -> None:
    counting = Failing(split, 10**9)
    before = threading.active_count()
    reader = loader(counting)  # type: ignore[arg-type]
    reader.step(0)
    reader.close()
    reader.close()
    assert counting.calls in (8, 16)
    assert threading.active_count() == before
    with loader(counting) as reader:  # type: ignore[arg-type]
        for step in range(3):
            reader.step(step)
    assert threading.active_count() == before


@pytest.mark.parametrize(("batch_size", "micro", "dp", "rank"), [(8, 3, 1, 0), (8, 2, 3, 0), (8, 1, 2, 2), (8, 1, 2, -1)])
def test_shapes_that_do_not_fit(split: PackedSplit, batch_size: int, micro: int, dp: int, rank: int) -> None:
    with pytest.raises(ValueError, match="batch_size 8"):
        loader(split, dp, rank, batch_size, micro)


@pytest.mark.parametrize("dp", [1, 2, 3, 4])
@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize("count", [1, 3, 8, 14])
def test_held_out_rows_are_shared_out_once_and_filled_up(split: PackedSplit, dp: int, micro: int, count: int) -> None:
    ranks = [held_out(split, count, micro_batch_size=micro, dp=dp, dp_rank=rank) for rank in range(dp)]
    assert {len(batches) for batches in ranks} == {-(-count // (dp * micro))}
    firsts = []
    for batch in (batch for batches in ranks for batch in batches):
        assert batch.tokens.shape == (micro, T)
        for b in range(micro):
            if batch.boundaries[b] == (0,):
                assert (batch.labels[b] == IGNORE).all()
                assert (batch.segment_ids[b] == PADDING).all()
                assert not batch.tokens[b].any()
                assert not batch.positions[b].any()
            else:
                firsts.append(int(batch.tokens[b, 0]))
    assert sorted(firsts) == sorted({row * len(split) // count * T for row in range(count)})
    assert len(firsts) == count


def test_more_than_there_is_is_refused(split: PackedSplit) -> None:
    assert len(split) == 14
    held_out(split, 14, micro_batch_size=1, dp=1, dp_rank=0)
    with pytest.raises(DataError, match=r"evaluation\.sequences: 15 .* 14 held-out sequences of 8 tokens: set it to 14 or less"):
        held_out(split, 15, micro_batch_size=1, dp=1, dp_rank=0)
    loader(split, batch_size=14).close()
    with pytest.raises(DataError, match=r"training\.batch_size: 16 .* 14 training sequences of 8 tokens: set it to 14 or less"):
        loader(split, batch_size=16)
