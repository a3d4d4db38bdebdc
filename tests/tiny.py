"""A run small enough to repeat many times: its recipe, its corpus, and batches with every awkward thing in them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from longtrain.batch import IGNORE, Batch
from longtrain.data.corpus import Skipped
from longtrain.data.manifest import TOKENIZER, TokenizerEntry
from longtrain.data.prepare import make_manifest
from longtrain.data.shards import SplitWriter, write_manifest
from longtrain.recipe.load import parse_recipe
from longtrain.recipe.schema import Recipe
from tests.attention_cases import Documents, boundaries, segments

VOCAB = 61
TEXT = """
name: tiny
device: cpu
model: {family: llama, vocab_size: 61, hidden_size: 32, layers: 2, heads: 4, kv_heads: 2, intermediate_size: 48, init_std: 0.05}
data: {path: data}
training: {sequence_length: 48, steps: 10, batch_size: 4, precision: fp32, activations: none}
optimizer: {lr: 0.01}
"""


def tiny_recipe(*overrides: str) -> Recipe:
    """overrides: `a.b=value`, as for --set."""
    return parse_recipe(TEXT, "tiny", overrides)


def noise(seed: int, count: int, below: int) -> list[int]:
    """Integers in [0, below) that no version of any library changes (the generator of Knuth's MMIX, its upper bits)."""
    state, values = seed + 1, []
    for _ in range(count):
        state = (6364136223846793005 * state + 1442695040888963407) % 2**64
        values.append((state >> 33) % below)
    return values


def write_corpus(folder: Path, sequences: int, sequence_length: int = 48, *, seed: int = 0) -> Path:
    """A prepared folder of `sequences` training sequences and 3 held-out ones: long documents, short ones, some of one token.

    What follows a token is drawn from two candidates, so there is something to learn.
    """
    folder.mkdir(parents=True)
    (folder / TOKENIZER).write_bytes(b"model")
    writers = {}
    for split, count in (("train", sequences), ("heldout", 3)):
        left, number = count * sequence_length, 0
        with SplitWriter(folder, split, np.dtype("<u2"), 1 << 20) as writer:
            while left:
                length = min(left, (70, 9, 1, 30)[number % 4])
                draw = noise(1000 * seed + 2 * number + (split == "heldout"), length, 997)
                tokens = [draw[0] % VOCAB]
                for value in draw[1:]:
                    tokens.append((3 * tokens[-1] + 7 * (value % 2)) % VOCAB)
                writer.add(tokens)
                left, number = left - length, number + 1
        writers[split] = writer
    entry = TokenizerEntry(sha256=hashlib.sha256(b"model").hexdigest(), vocab_size=VOCAB, bos=1, eos=2)
    write_manifest(folder, make_manifest(writers, entry, Skipped(), seed))
    return folder


def rows_of(length: int) -> Documents:
    """The documents of four sequences: one whole; a long one, short ones and padding; short ones only; two."""
    return ((length,), (length - 19, 7, 1, 1, 5), (3, 1, 11, 1, 1, length - 17), (length // 3, length - length // 3))


def ragged_batch(step: int, length: int, *, starved: bool = False) -> Batch:
    """Four sequences with few labels in the third and none in the fourth.

    starved: only even positions in the first eighth bear loss, so that in every layout the first rank of a ring has all labels.
    """
    documents = rows_of(length)
    draw = torch.tensor(noise(step, 4 * length, VOCAB)).view(4, length)
    segment_ids = segments(documents, length)
    labels, positions = torch.full_like(draw, IGNORE), torch.zeros_like(draw)
    for row, lengths in enumerate(documents):
        start = 0
        for size in lengths:
            positions[row, start : start + size] = torch.arange(size)
            labels[row, start : start + size - 1] = draw[row, start + 1 : start + size]
            start += size
    labels[3] = IGNORE
    few = slice(0, 4) if starved else slice(2, 3)
    labels[few, length // 8 :] = IGNORE
    labels[few, 1::2] = IGNORE
    return Batch(draw, labels, positions, segment_ids, boundaries(documents))


def take_rows(batch: Batch, rows: Sequence[int]) -> Batch:
    """Some rows of a batch."""
    picked = (t[list(rows)] for t in (batch.tokens, batch.labels, batch.positions, batch.segment_ids))
    seeds = None if batch.seeds is None else batch.seeds[list(rows)]
    return Batch(*picked, boundaries=tuple(batch.boundaries[row] for row in rows), seeds=seeds)
