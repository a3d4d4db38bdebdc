"""Many attention problems, for a GPU: combinations of features, in shards that processes can share."""

from __future__ import annotations

import random

import torch

from longtrain.attention import Band
from tests.attention_cases import BIAS_SHAPES, Case

SHARDS, KINDS, DRAWS = 16, 6, 14
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
WIDTHS = (16, 32, 59, 64, 80, 96, 111, 128, 256)


def documents(draw: random.Random, rows: int, length: int) -> tuple[tuple[int, ...], ...]:
    def one() -> tuple[int, ...]:
        lengths: list[int] = []
        while sum(lengths) < length and len(lengths) < 9:
            lengths.append(min(draw.choice((0, 1, 17, 128, 200, length)), length - sum(lengths)))
        return tuple(lengths)

    return tuple(one() for _ in range(rows))


def bound(draw: random.Random, kind: str, length: int) -> Band:
    reach = draw.choice((1, 5, 64, 128, max(length // 2, 1)))
    return {
        "full": Band.full(),
        "causal": Band.causal(),
        "window": Band.causal(reach),
        "lower": Band(draw.choice((1, -reach, reach)), None),
        "upper": Band(None, draw.choice((-1, reach, -reach))),
        "two-sided": Band(-reach, draw.choice((-1, 0, reach))),
    }[kind]


def problems(shard: int) -> list[tuple[Case, torch.dtype]]:
    """KINDS combinations of what kernels are compiled for, DRAWS of what they are called with each: 1344 over all shards."""
    draw, found = random.Random(shard), []
    for kind in range(KINDS):
        at = shard * KINDS + kind
        dtype, width = DTYPES[at % len(DTYPES)], WIDTHS[at // len(DTYPES) % len(WIDTHS)]
        value = draw.choice((None, None, *WIDTHS))
        bands = draw.choice((("full",), ("causal",), ("causal",), ("window", "two-sided"), ("lower",), ("upper",)))
        packed, softcap, alibi, drop = (draw.random() < p for p in (0.5, 0.25, 0.25, 0.25))
        bias = draw.choice((None, None, None, *BIAS_SHAPES))
        steep = draw.choice((None, None, 2.0, -0.7))
        # lengths of 1 (test_odd_lengths), multiples of 16 and others are compiled apart, and so is one query head a key head
        lengths, groups = draw.choice(((63, 111, 257, 601), (128, 256, 640))), draw.choice(((1,), (2, 3, 4, 5)))
        for _ in range(DRAWS):
            length, batch, kv_heads = draw.choice(lengths), draw.choice((1, 2)), draw.choice((1, 2))
            keys = draw.choice(lengths) if draw.random() < 0.25 else length
            lying = documents(draw, batch, length) if packed else None
            # given again for the keys, nobody knows that they lie one after another: segments instead of runs
            again = lying if draw.random() < 0.4 else None
            found.append(
                (
                    Case(
                        bound(draw, draw.choice(bands), max(length, keys)),
                        length,
                        keys,
                        batch,
                        kv_heads * draw.choice(groups),
                        kv_heads,
                        width,
                        value,
                        lying,
                        documents(draw, batch, keys) if packed and keys != length else again,
                        scale=None if steep is None else steep * width**-0.5,
                        softcap=3.0 if softcap else None,
                        alibi=alibi,
                        bias=bias,
                        dropout=0.2 if drop else 0.0,
                        seed=draw.randrange(2**31),
                        sinks=draw.random() < 0.3,
                    ),
                    dtype,
                )
            )
    return found
