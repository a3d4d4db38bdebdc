"""One optimizer step over an accumulation window."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from longtrain.batch import Batch
from longtrain.models.flops import Flops, training_flops
from longtrain.parallel.context import ParallelContext
from longtrain.parallel.deepspeed import Engine
from longtrain.parallel.loss import loss_scale
from longtrain.parallel.shard import Shard, shard_batch
from longtrain.plan import Plan
from longtrain.train.guards import poison, poison_if_broken, step_poisoned


@dataclass(frozen=True)
class Prepared:
    """What a step works on. tokens: trainable labels of all ranks in the whole window. signs: each whether some rank gave it."""

    batches: Sequence[Batch]
    shards: Sequence[Shard]
    tokens: int
    signs: tuple[bool, ...]


@dataclass(frozen=True)
class StepOutcome:
    """loss: mean over the trainable tokens of all ranks, nan where there is none. grad_norm: global, before clipping. flops: of
    all ranks. skipped: nothing was updated on any rank, because a loss or gradient of some was not finite or the loss too high."""

    loss: float
    grad_norm: float
    flops: Flops
    skipped: bool


def shards_of(batches: Sequence[Batch], plan: Plan, ctx: ParallelContext) -> list[Shard]:
    """This rank's part of every batch, still on the host."""
    return [shard_batch(batch, plan.layout, plan.cp, ctx.cp_rank, plan.band) for batch in batches]


def prepare_step(plan: Plan, ctx: ParallelContext, batches: Sequence[Batch], signs: Sequence[bool] = ()) -> Prepared:
    """Cuts the batches and counts their tokens; the ranks agree on `signs` in the same exchange. A collective of all ranks."""
    shards = shards_of(batches, plan, ctx)
    tokens, *given = ctx.all_reduce_sum([sum(shard.trainable for shard in shards), *(int(sign) for sign in signs)])
    return Prepared(batches, shards, int(tokens), tuple(count > 0 for count in given))


def train_step(
    engine: Engine,
    plan: Plan,
    ctx: ParallelContext,
    step: Prepared,
    lr: float,
    *,
    highest: float = math.inf,
    begin: Callable[[str], None] = lambda phase: None,
) -> StepOutcome:
    """Forward and backward over every micro batch, then one update with learning rate `lr`; none where the loss is above `highest`.

    Where that is finite, all ranks wait for the loss before the last backward pass. begin: is told what begins.
    """
    begin("forward and backward")
    scale = loss_scale(world=ctx.world, accumulation=plan.accumulation, tokens=step.tokens)
    engine.set_lr(lr)
    sums: list[Tensor] = []
    totals: tuple[float, Flops] | None = None
    refused = False
    for number, shard in enumerate(shard.to(ctx.device) for shard in step.shards):
        loss_sum = engine.forward(shard.tokens, shard.positions, shard.mask, shard.labels, shard.noise)
        sums.append(loss_sum.detach())
        if number == len(step.shards) - 1:
            if highest < math.inf:
                totals = _totals(plan, ctx, step, sums)
                refused = highest < totals[0] < math.inf
            loss_sum = poison(loss_sum) if refused else poison_if_broken(loss_sum, sums[:-1])
        engine.backward(loss_sum, scale)
    begin("update")
    result = step_poisoned(engine) if refused else engine.step()
    loss, flops = totals or _totals(plan, ctx, step, sums)
    return StepOutcome(loss, result.grad_norm, flops, result.skipped)


def _totals(plan: Plan, ctx: ParallelContext, step: Prepared, sums: Sequence[Tensor]) -> tuple[float, Flops]:
    """The mean loss and the FLOPs of all ranks' micro batches; `sums`: losses of this one's. A collective that waits for them."""
    causal, full = _flops(plan, step.batches) if ctx.cp_rank == 0 else (0, 0)
    local_loss = sum(float(loss) for loss in sums)
    loss, causal, full = ctx.all_reduce_sum([local_loss, float(causal), float(full)])
    return loss / step.tokens if step.tokens else float("nan"), Flops(int(causal), int(full))


def _flops(plan: Plan, batches: Sequence[Batch]) -> Flops:
    rows = [row for batch in batches for row in batch.boundaries]
    return training_flops(plan.model, rows, plan.recipe.training.sequence_length)
