"""Loss on text that the model was not trained on, in all and by how much context a token has.

The position of a token is the one in its own document, as its packed row holds it: that is how many tokens of context it sees, at
most. The position in the row would mix tokens that see little with those that see much wherever documents are packed. Spans of
positions double in length, whatever the sequence length, so that they mean the same in every run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from longtrain.batch import IGNORE, Batch
from longtrain.parallel.context import ParallelContext
from longtrain.parallel.deepspeed import Engine
from longtrain.parallel.shard import Shard, shard_batch
from longtrain.plan import Plan

FIRST_SPAN = 16
"""Positions of the first span: less would hold too few tokens for a figure."""


class SpanLoss(NamedTuple):
    """Mean loss of the `tokens` predictions made at positions first .. last of their documents, counted from 0."""

    first: int
    last: int
    loss: float
    tokens: int


class HeldOut(NamedTuple):
    """loss: mean over all trainable tokens, nan where there is none. by_position: spans that have a token, in order."""

    loss: float
    by_position: tuple[SpanLoss, ...]


def held_out_loss(engine: Engine, plan: Plan, ctx: ParallelContext, batches: Sequence[Batch]) -> HeldOut:
    """Over the trainable tokens of all ranks' `batches`. Every rank passes as many batches."""
    spans = position_spans(plan.recipe.training.sequence_length)
    sums, counts = [0.0] * len(spans), [0] * len(spans)
    engine.train(False)
    try:
        with torch.no_grad():
            for batch in batches:
                shard = shard_batch(batch, plan.layout, plan.cp, ctx.cp_rank, plan.band)
                rows = _rows(shard, spans)
                for index, loss in enumerate(_span_sums(engine, shard.to(ctx.device), [row.to(ctx.device) for row in rows])):
                    sums[index] += loss
                    counts[index] += len(rows[index])
    finally:
        engine.train(True)
    sums, counts = ctx.all_reduce_sum(sums), [int(count) for count in ctx.all_reduce_sum(counts)]
    found = zip(spans, sums, counts, strict=True)
    by_position = tuple(SpanLoss(span[0], span[-1], loss / count, count) for span, loss, count in found if count)
    return HeldOut(sum(sums) / sum(counts) if sum(counts) else float("nan"), by_position)


def position_spans(length: int) -> list[range]:
    """[0, 16), [16, 32), [32, 64) and so on, up to `length`."""
    edges = [0, FIRST_SPAN]
    while edges[-1] < length:
        edges.append(2 * edges[-1])
    edges[-1] = length
    return [range(first, end) for first, end in pairwise(edges)]


def _rows(shard: Shard, spans: Sequence[range]) -> list[Tensor]:
    """For each span, which of the flattened positions of a shard on the host predict a token there."""
    positions, bears_loss = shard.positions.flatten(), (shard.labels != IGNORE).flatten()
    return [torch.nonzero(bears_loss & (positions >= s.start) & (positions < s.stop)).flatten() for s in spans]


def _span_sums(engine: Engine, shard: Shard, rows: Sequence[Tensor]) -> list[float]:
    """Summed losses of these rows. The head, whose loss is a sum without logits, runs once a span, on the rows of that span."""
    sums: list[Tensor] = []

    def by_span(forward: Callable[..., Tensor], hidden: Tensor, labels: Tensor) -> None:
        x, wanted = hidden.flatten(0, 1), labels.flatten()
        sums.extend(forward(x[row][None], wanted[row][None]) for row in rows)

    with _instead_of_head(engine.model, by_span):
        engine.forward(shard.tokens, shard.positions, shard.mask, shard.labels)
    return [float(loss) for loss in sums]


@contextmanager
def _instead_of_head(model: nn.Module, compute: Callable[..., None]) -> Iterator[None]:
    """Within the forward of the model's head: `compute(head's forward, hidden, labels)`; the head itself is left nothing to do.

    A hook, so that it runs where ZeRO-3 has gathered the head's weight: its own hooks were there before.
    """

    def hook(head: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, labels = inputs
        compute(head.forward, hidden, labels)
        return hidden[:, :0], labels[:, :0]

    handle = model.get_submodule("head").register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()
