"""Several prepared folders as one split, each with its share of the training tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction

import numpy as np

from longtrain.data.context import context_warning
from longtrain.data.manifest import TokenizerEntry
from longtrain.data.order import Order
from longtrain.data.packed import PackedRow, PackedSplit
from longtrain.errors import DataError


class Mixture:
    """Splits of the same tokenizer and sequence length, under the surface of a `PackedSplit`.

    weights: positive, one a split; shares of the sequences of training, and so of its tokens. They are exact: of the first n
    sequences of a mixture of S splits, for any multiple n of the batch size, split s has within S of n * its share. The order is a
    pure function of the seed, the data and the weights; neither the paths nor the order in which splits are given matter. A split
    whose sequences are used up begins again, in another order. DataError where splits do not go together.
    """

    def __init__(self, splits: Sequence[PackedSplit], weights: Sequence[float]) -> None:
        shares = shares_of(weights)
        ordered = sorted(zip(splits, shares, strict=True), key=lambda pair: pair[0].fingerprint)
        self.splits = tuple(split for split, _ in ordered)
        self.shares = tuple(share for _, share in ordered)
        first = splits[0]
        self.split = first.split
        self.sequence_length = first.sequence_length
        self.folder = " + ".join(str(split.folder) for split in splits)
        self._ends = np.cumsum([len(split) for split in self.splits]).tolist()
        for split in splits[1:]:
            if split.tokenizer != first.tokenizer:
                raise DataError(
                    f"data.sources: {split.folder} was prepared with another tokenizer than {first.folder}; prepare it again with "
                    f"--tokenizer {first.folder / first.tokenizer.file}"
                )
        for one, other in zip(self.splits, self.splits[1:], strict=False):
            if one.fingerprint == other.fingerprint:
                raise DataError(f"data.sources: {one.folder} and {other.folder} hold the same data; keep one, with both weights")

    @property
    def tokens(self) -> int:
        """Tokens on the disk."""
        return sum(split.tokens for split in self.splits)

    @property
    def bytes(self) -> int:
        """Bytes of the tokens on the disk."""
        return sum(split.bytes for split in self.splits)

    @property
    def documents(self) -> int:
        """Documents on the disk."""
        return sum(split.documents for split in self.splits)

    @property
    def tokenizer(self) -> TokenizerEntry:
        """The tokenizer of all splits."""
        return self.splits[0].tokenizer

    @property
    def fingerprint(self) -> str:
        """Equal for mixtures that give the same sequences in the same order for a seed."""
        return mixed_fingerprint({split.fingerprint: share for split, share in zip(self.splits, self.shares, strict=True)})

    @property
    def largest_batch(self) -> int:
        """The most sequences that a step may take: of no split more than it has. A step in which a split is used up goes on with
        another order of it, and may show a sequence twice."""
        return max(1, min(int((len(split) - 1) / share) for split, share in zip(self.splits, self.shares, strict=True)))

    def __len__(self) -> int:
        """Number of whole sequences."""
        return self._ends[-1]

    def sequence(self, index: int) -> PackedRow:
        """Sequence `index` in [0, len), as `PackedSplit.sequence`: those of the first split come first."""
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        number = next(number for number, end in enumerate(self._ends) if index < end)
        return self.splits[number].sequence(index - self._start(number))

    def order(self, seed: int, batch_size: int) -> Callable[[int], int]:
        """Position in the infinite order of training -> index of a sequence. Every batch has the shares, its rows are shuffled."""
        orders = [Order(len(split), _seed(seed, split.fingerprint)) for split in self.splits]
        rows = Order(batch_size, _seed(seed, self.fingerprint))

        def at(position: int) -> int:
            batch = position - position % batch_size
            number, turn = assign(batch + rows(position), self.shares)
            return self._start(number) + orders[number](turn)

        return at

    def spread(self, count: int) -> list[int]:
        """`count` indices, by the weights and evenly over each split. DataError where a split has too few for its share."""
        turns = [assign(position, self.shares) for position in range(count)]
        counts = [sum(number == other for other, _ in turns) for number in range(len(self.splits))]
        for split, wanted in zip(self.splits, counts, strict=True):
            if wanted > len(split):
                raise DataError(
                    f"evaluation.sequences: {wanted} of {count} are the share of {split.folder}, which holds {len(split)} of "
                    f"{self.sequence_length} tokens: lower it, or prepare that data with more held-out text"
                )
        return [self._start(number) + turn * len(self.splits[number]) // counts[number] for number, turn in turns]

    def context_share(self, sequence_length: int | None = None) -> float:
        """`PackedSplit.context_share` of the tokens as they are trained on."""
        shares = zip(self.splits, self.shares, strict=True)
        return sum(float(share) * split.context_share(sequence_length) for split, share in shares)

    def warning(self) -> str | None:
        """As `PackedSplit.warning`, of the tokens as they are trained on."""
        return context_warning(self.context_share(), self.sequence_length)

    def verify(self) -> None:
        """As `PackedSplit.verify`."""
        for split in self.splits:
            split.verify()

    def _start(self, number: int) -> int:
        return self._ends[number - 1] if number else 0


Split = PackedSplit | Mixture
"""Sequences to train on, of one prepared folder or of several."""


def shares_of(weights: Sequence[float]) -> list[Fraction]:
    """Positive weights as exact shares of their sum, read as the decimal numbers that a recipe has."""
    parts = [Fraction(repr(weight)) for weight in weights]
    return [part / sum(parts) for part in parts]


def assign(position: int, shares: Sequence[Fraction]) -> tuple[int, int]:
    """Which split a position of the mixed order takes its sequence from, and how many it took before.

    The first split takes a position where floor(position * share) rises; the others share out what it leaves in the same way. So
    the counts are exact (off by less than one at every level) and a position is found without the ones before it.
    """
    left = Fraction(1)
    for number, share in enumerate(shares[:-1]):
        ratio = share / left
        taken = position * ratio.numerator // ratio.denominator
        if (position + 1) * ratio.numerator // ratio.denominator > taken:
            return number, taken
        position -= taken
        left -= share
    return len(shares) - 1, position


def mixed_fingerprint(shares: Mapping[str, Fraction]) -> str:
    """SHA-256 of a mixture's fingerprints and their shares."""
    text = " ".join(f"{fingerprint} {share}" for fingerprint, share in sorted(shares.items()))
    return hashlib.sha256(text.encode()).hexdigest()


def _seed(seed: int, fingerprint: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed} {fingerprint}".encode(), digest_size=8).digest(), "big")
