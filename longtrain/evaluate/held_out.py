"""Loss on text that the model was not trained on."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from longtrain.batch import Batch
from longtrain.parallel.context import ParallelContext
from longtrain.parallel.deepspeed import Engine
from longtrain.parallel.shard import shard_batch
from longtrain.plan import Plan


def held_out_loss(engine: Engine, plan: Plan, ctx: ParallelContext, batches: Sequence[Batch]) -> float:
    """Mean loss over the trainable tokens of all ranks' `batches`; nan where there is none. Every rank passes as many batches."""
    total, tokens = 0.0, 0
    engine.train(False)
    with torch.no_grad():
        for batch in batches:
            shard = shard_batch(batch, plan.layout, plan.cp, ctx.cp_rank, plan.band)
            tokens += shard.trainable
            shard = shard.to(ctx.device)
            total += float(engine.forward(shard.tokens, shard.positions, shard.mask, shard.labels))
    engine.train(True)
    total, tokens = ctx.all_reduce_sum([total, float(tokens)])
    return total / tokens if tokens else float("nan")
