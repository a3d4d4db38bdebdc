"""Training a tiny decoder on any grid of ranks the way a run does, and putting together what the ranks then hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from longtrain.batch import Batch
from longtrain.models.decoder import Decoder
from longtrain.models.initialise import initialise
from longtrain.parallel.context import Grid, ParallelContext, create_context
from longtrain.parallel.deepspeed import Engine, build_model
from longtrain.plan import Plan, make_plan
from longtrain.recipe.schema import Recipe
from longtrain.train.assemble import build_attend
from longtrain.train.optim import decay_groups
from longtrain.train.step import prepare_step, train_step
from tests.tiny import take_rows, tiny_recipe

ROWS = 4
RATES = (0.01, 0.004, 0.007)
Arrays = dict[str, npt.NDArray[np.floating]]
Piece = tuple[str, int, Arrays]


@dataclass(frozen=True)
class Task:
    """What is learnt: all that the truth depends on."""

    length: int = 48
    tied: bool = False
    window: int | None = None
    clip: float | None = None
    starved: bool = False
    dropout: float = 0.0
    attention_dropout: float = 0.0

    def recipe(self, *overrides: str) -> Recipe:
        own = {
            "training.sequence_length": self.length,
            "model.tied_embeddings": str(self.tied).lower(),
            "model.window": self.window or "null",
            "optimizer.grad_clip": self.clip or "null",
            "model.dropout": self.dropout,
            "model.attention_dropout": self.attention_dropout,
            # With the usual 1e-8 Adam makes a whole step out of a gradient that is nothing but rounding.
            "optimizer.eps": 1e-3,
        }
        return tiny_recipe(*(f"{key}={value}" for key, value in own.items()), *overrides)


@dataclass(frozen=True)
class Case:
    """How it is learnt."""

    dp: int
    cp: int
    stage: int
    layout: str
    accumulation: int
    activations: str
    kernel: str
    task: Task
    precision: str = "fp32"
    ulysses: int = 1
    raw: str = "null"

    def plan(self, device: str = "cpu") -> Plan:
        overrides = {
            "parallel.cp": self.cp,
            "parallel.ulysses": self.ulysses,
            "parallel.layout": self.layout,
            "zero.stage": self.stage,
            "zero.deepspeed": self.raw,
            "training.micro_batch_size": ROWS // (self.dp * self.accumulation),
            "training.activations": self.activations,
            "training.precision": self.precision,
            "attention.kernel": self.kernel,
            "device": device,
        }
        recipe = self.task.recipe(*(f"{key}={value}" for key, value in overrides.items()))
        plan = make_plan(recipe, self.dp * self.cp, device)
        assert plan.accumulation == self.accumulation
        return plan


def make_engine(case: Case, plan: Plan, ctx: ParallelContext) -> Engine:
    """As assemble builds it."""
    recipe, attend = plan.recipe, build_attend(plan, ctx)
    model = build_model(
        lambda: Decoder(plan.model, attend, recipe.training.activations.value),
        ctx,
        case.stage,
        plan.dtype,
        lambda decoder, gathered: initialise(decoder, recipe.seed, gathered),  # type: ignore[arg-type]
    )
    groups, optimizer = decay_groups(model, recipe.optimizer.weight_decay), recipe.optimizer
    return Engine(model, groups, ctx, config=plan.deepspeed, lr=1.0, betas=optimizer.betas, eps=optimizer.eps)


def deal(batch: Batch, case: Case, dp_rank: int) -> list[Batch]:
    """The rows of a data-parallel rank, as the grid of the recipe deals them."""
    size = ROWS // (case.dp * case.accumulation)
    starts = [(micro * case.dp + dp_rank) * size for micro in range(case.accumulation)]
    return [take_rows(batch, range(start, start + size)) for start in starts]


def pieces_of(engine: Engine, kind: str) -> list[Piece]:
    """What this rank owns of one kind: (parameter, start, values)."""
    return [(piece.name, piece.start, {kind: piece.tensors[kind].cpu().numpy().copy()}) for piece in engine.owned_ranges()]


def train(ctx: ParallelContext, case: Case, steps: Sequence[Batch]) -> dict[str, Any]:
    """This rank's part: losses and norms of every step, `exp_avg` after the first and `master` weights after the last."""
    plan = case.plan(ctx.device.type)
    engine = make_engine(case, plan, ctx)
    losses, norms, moments = [], [], []
    for batch, rate in zip(steps, RATES, strict=False):
        outcome = train_step(engine, plan, ctx, prepare_step(plan, ctx, deal(batch, case, ctx.dp_rank)), rate)
        assert not outcome.skipped
        losses.append(outcome.loss)
        norms.append(outcome.grad_norm)
        moments = moments or pieces_of(engine, "exp_avg")
    result = {"losses": losses, "norms": norms, "exp_avg": moments, "master": pieces_of(engine, "master")}
    engine.close()
    return result


class Grids:
    """One group of processes serves several grids: the context of each, made at the first call, which all ranks make."""

    def __init__(self, ctx: ParallelContext) -> None:
        self._ctx, self._made = ctx, dict[Grid, ParallelContext]()

    def __call__(self, case: Case | Grid) -> ParallelContext:
        grid = Grid(case.dp, case.cp)
        if grid not in self._made:
            ctx = self._ctx
            self._made[grid] = create_context(
                grid, rank=ctx.rank, local_rank=ctx.local_rank, device=ctx.device, timeout=ctx.timeout
            )
        return self._made[grid]


def whole(ranks: Sequence[list[Piece]], kind: str) -> Arrays:
    """Parameters out of the ranges of all ranks, which must neither overlap nor leave a hole."""
    pieces: dict[str, list[tuple[int, npt.NDArray[np.floating]]]] = {}
    for name, start, tensors in (piece for rank in ranks for piece in rank):
        pieces.setdefault(name, []).append((start, tensors[kind]))
    assembled = {}
    for name, parts in pieces.items():
        end = 0
        for start, part in sorted(parts, key=lambda part: part[0]):
            assert start == end, f"{name}: a range at {start}, expected {end}"
            end += part.size
        assembled[name] = np.concatenate([part for _, part in sorted(parts, key=lambda part: part[0])])
    return assembled
