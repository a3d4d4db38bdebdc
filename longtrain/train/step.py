"""One optimizer step over an accumulation window."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from longtrain.batch import Batch
from longtrain.models.flops import Flops, training_flops
from longtrain.parallel.context import ParallelContext
from longtrain.parallel.deepspeed import Engine
from longtrain.parallel.loss import count_tokens, loss_scale
from longtrain.parallel.shard import Shard, shard_batch
from longtrain.plan import Plan


@dataclass(frozen=True)
class StepOutcome:
    """loss: mean over the trainable tokens of all ranks, nan where there is none. grad_norm: global, before clipping. flops: of
    all ranks. skipped: the fp16 scaler refused the update."""

    loss: float
    grad_norm: float
    flops: Flops
    skipped: bool


def shards_of(batches: Sequence[Batch], plan: Plan, ctx: ParallelContext) -> list[Shard]:
    """This rank's part of every batch, still on the host."""
    return [shard_batch(batch, plan.layout, plan.cp, ctx.cp_rank, plan.band) for batch in batches]


def train_step(engine: Engine, plan: Plan, ctx: ParallelContext, batches: Sequence[Batch], lr: float) -> StepOutcome:
    """Forward and backward over every micro batch, then one update with learning rate `lr`."""
    shards = shards_of(batches, plan, ctx)
    tokens = count_tokens(ctx, sum(shard.trainable for shard in shards))
    scale = loss_scale(world=ctx.world, accumulation=plan.accumulation, tokens=tokens)
    engine.set_lr(lr)
    sums = []
    for shard in (shard.to(ctx.device) for shard in shards):
        loss_sum = engine.forward(shard.tokens, shard.positions, shard.mask, shard.labels)
        engine.backward(loss_sum, scale)
        sums.append(loss_sum.detach())
    result = engine.step()
    causal, full = _flops(plan, batches) if ctx.cp_rank == 0 else (0, 0)
    local_loss = sum(float(loss) for loss in sums)
    loss, causal, full = ctx.all_reduce_sum([local_loss, float(causal), float(full)])
    mean = loss / tokens if tokens else float("nan")
    return StepOutcome(mean, result.grad_norm, Flops(int(causal), int(full)), result.skipped)


def _flops(plan: Plan, batches: Sequence[Batch]) -> Flops:
    rows = [row for batch in batches for row in batch.boundaries]
    return training_flops(plan.model, rows, plan.recipe.training.sequence_length)
