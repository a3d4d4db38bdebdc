from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longtrain.data.loader import Loader, held_out
from longtrain.data.mixture import Mixture, assign, shares_of
from longtrain.data.packed import PackedSplit
from longtrain.errors import DataError

WritePrepared = Callable[..., Path]
T = 4


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory, write_prepared: WritePrepared) -> list[PackedSplit]:
    """Three folders of 40, 25 and 9 sequences, whose tokens begin at 0, 200 and 400."""
    root = tmp_path_factory.mktemp("mixture")
    found = []
    for number, sequences in enumerate((40, 25, 9)):
        tokens = list(range(200 * number, 200 * number + T * sequences))
        folder = write_prepared(root / str(number), [tokens[n : n + 7] for n in range(0, len(tokens), 7)], [tokens] * 2)
        found.append(PackedSplit(folder, "train", T))
    return found


def source_of(token: int) -> int:
    return token // 200


@given(weights=st.lists(st.integers(1, 1000) | st.floats(0.001, 10), min_size=1, max_size=6), count=st.integers(0, 3000))
def test_shares_are_exact_at_every_length(weights: list[float], count: int) -> None:
    shares = shares_of(weights)
    assert sum(shares) == 1
    turns = [assign(position, shares) for position in range(count)]
    seen = Counter()
    for number, turn in turns:
        assert turn == seen[number], "every split hands out its sequences in turn"
        seen[number] += 1
    for number, share in enumerate(shares):
        assert abs(seen[number] - count * share) < len(shares)


def test_shares_far_out_need_no_history() -> None:
    shares = shares_of([0.7, 0.2, 0.1])
    assert shares == [Fraction(7, 10), Fraction(1, 5), Fraction(1, 10)]
    start = 10**15
    seen = Counter(assign(position, shares)[0] for position in range(start, start + 1000))
    assert seen == {0: 700, 1: 200, 2: 100}


def test_training_sees_the_shares_in_every_step(splits: list[PackedSplit]) -> None:
    mixture = Mixture(splits, [5, 3, 2])
    with Loader(mixture, seed=1, batch_size=10, micro_batch_size=2, dp=1, dp_rank=0) as loader:
        patterns = set()
        for step in range(40):
            sources = [source_of(int(row[0])) for batch in loader.step(step) for row in batch.tokens]
            assert Counter(sources) == {0: 5, 1: 3, 2: 2}
            patterns.add(tuple(sources))
    assert len(patterns) > 20, "rows are shuffled, so no rank sees one source alone"


def test_every_sequence_comes_once_in_an_epoch_of_its_split(splits: list[PackedSplit]) -> None:
    mixture = Mixture(splits, [1, 1, 1])
    order = mixture.order(seed=3, batch_size=6)
    seen = Counter(order(position) for position in range(6 * 200))
    counts = Counter(dict.fromkeys(range(3), 0))
    for index, times in seen.items():
        number = source_of(int(mixture.sequence(index).tokens[0]))
        counts[number] += times
        assert times in (400 // len(splits[number]), -(-400 // len(splits[number])))
    assert counts == {0: 400, 1: 400, 2: 400}


def test_the_union_over_ranks_does_not_depend_on_dp(splits: list[PackedSplit]) -> None:
    mixture = Mixture(splits, [0.5, 0.25, 0.25])

    def rows(dp: int, step: int) -> list[list[int]]:
        found: dict[int, list[int]] = {}
        for rank in range(dp):
            with Loader(mixture, seed=2, batch_size=8, micro_batch_size=2, dp=dp, dp_rank=rank) as loader:
                for m, batch in enumerate(loader.step(step)):
                    found |= {(m * dp + rank) * 2 + b: batch.tokens[b].tolist() for b in range(2)}
        return [found[row] for row in sorted(found)]

    for step in (0, 7, 123_456):
        assert rows(1, step) == rows(2, step) == rows(4, step)


def test_order_depends_on_data_weights_and_seed_alone(splits: list[PackedSplit]) -> None:
    def first(mixture: Mixture, seed: int = 0) -> list[list[int]]:
        order = mixture.order(seed, 4)
        return [mixture.sequence(order(position)).tokens.tolist() for position in range(40)]

    one = Mixture(splits, [1, 2, 3])
    turned = Mixture(splits[::-1], [30, 20, 10])
    assert first(one) == first(turned)
    assert one.fingerprint == turned.fingerprint
    assert first(one) != first(one, seed=1)
    other = Mixture(splits, [1, 2, 3.001])
    assert other.fingerprint != one.fingerprint


def test_evaluation_is_by_weight_and_repeats_nothing(splits: list[PackedSplit]) -> None:
    mixture = Mixture(splits, [2, 1, 1])
    chosen = mixture.spread(16)
    assert len(set(chosen)) == 16
    assert Counter(source_of(int(mixture.sequence(index).tokens[0])) for index in chosen) == {0: 8, 1: 4, 2: 4}
    assert len(held_out(mixture, 16, micro_batch_size=4, dp=2, dp_rank=1)) == 2
    with pytest.raises(DataError, match=r"evaluation\.sequences: 10 of 40 are the share of .*2, which holds 9"):
        mixture.spread(40)


def test_sums(splits: list[PackedSplit]) -> None:
    mixture = Mixture(splits, [1, 1, 1])
    assert len(mixture) == 74
    assert mixture.tokens == 74 * T == mixture.bytes // 2
    assert mixture.documents == sum(split.documents for split in splits)
    firsts = sorted(int(mixture.sequence(index).tokens[0]) for index in range(len(mixture)))
    assert firsts == sorted(int(split.sequence(index).tokens[0]) for split in splits for index in range(len(split)))
    assert 0 <= mixture.context_share() <= 1
    mixture.verify()
    with pytest.raises(IndexError):
        mixture.sequence(74)


def test_what_does_not_go_together(splits: list[PackedSplit], tmp_path: Path, write_prepared: WritePrepared) -> None:
    foreign = PackedSplit(write_prepared(tmp_path / "foreign", [[1] * 40], vocab_size=900), "train", T)
    with pytest.raises(DataError, match=r"another tokenizer than .*--tokenizer .*tokenizer\.model"):
        Mixture([splits[0], foreign], [1, 1])
    copy = PackedSplit(splits[0].folder, "train", T)
    with pytest.raises(DataError, match="hold the same data"):
        Mixture([splits[0], copy], [1, 1])


def test_a_batch_larger_than_a_split_can_fill_is_refused(splits: list[PackedSplit]) -> None:
    mixture = Mixture(splits, [1, 1, 8])
    with pytest.raises(DataError, match=r"training\.batch_size: 20 .*set it to 10 or less"):
        Loader(mixture, seed=0, batch_size=20, micro_batch_size=1, dp=1, dp_rank=0)
    Loader(mixture, seed=0, batch_size=10, micro_batch_size=1, dp=1, dp_rank=0).close()


def test_positions_far_out_are_quick(splits: list[PackedSplit]) -> None:
    order = Mixture(splits, [0.123, 0.456, 0.789]).order(5, 1024)
    places = [order(10**12 + n) for n in range(1000)]
    assert np.unique(places).size > 60
