"""The infinite order of training sequences: a pure function of (seed, position), without memory."""

from __future__ import annotations

_MASK = (1 << 64) - 1
_ROUNDS = 8


def _mix(value: int) -> int:
    """Finalizer of SplitMix64 (Steele et al. 2014): a bijection on 64 bits in which every input bit reaches every output bit."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


class Order:
    """Position n of the infinite order -> index of a sequence; every epoch is another permutation of range(length).

    A Feistel network permutes the next power of 4 and is applied again until the value falls below `length` (cycle walking;
    Black and Rogaway 2002), which takes under 4 turns on average and keeps it a bijection.
    """

    def __init__(self, length: int, seed: int) -> None:
        if length < 1:
            raise ValueError(f"an order needs at least one sequence, not {length}")
        self.length = length
        self.seed = seed
        self._half_bits = ((length - 1).bit_length() + 1) // 2

    def __call__(self, position: int) -> int:
        """Index in range(length) of the sequence at `position` >= 0."""
        epoch, value = divmod(position, self.length)
        key = _mix(_mix(self.seed & _MASK) ^ epoch)
        while True:
            value = self._permute(value, key)
            if value < self.length:
                return value

    def _permute(self, value: int, key: int) -> int:
        mask = (1 << self._half_bits) - 1
        left, right = value >> self._half_bits, value & mask
        for turn in range(_ROUNDS):
            left, right = right, left ^ (_mix(key ^ _mix((turn << 32) ^ right)) & mask)
        return (left << self._half_bits) | right
