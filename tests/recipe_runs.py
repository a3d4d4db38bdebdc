"""Short runs of small recipes in this process, and what can be seen of them."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path

from longtrain.data.loader import held_out
from longtrain.evaluate.held_out import held_out_loss
from longtrain.parallel import launch
from longtrain.plan import make_plan
from longtrain.recipe.load import dump_recipe, parse_recipe
from longtrain.recipe.schema import Recipe
from longtrain.train.assemble import open_data
from longtrain.train.checkpoint_folder import read_master
from longtrain.train.resume import CHECKPOINTS, choose
from longtrain.train.run import run_training
from longtrain.train.tracking import METRICS_FILE, read_metrics
from tests.user import RECIPE

# 4 steps, so that schedules can bend
BASE = ("training.steps=4", "model.heads=4", "model.kv_heads=4", "schedule.kind=cosine")


@dataclass(frozen=True)
class Outcome:
    """What can be seen of a training run, apart from how long it took."""

    steps: int
    tokens: int
    losses: tuple[tuple[int, float], ...]
    held_out: tuple[tuple[int, float], ...]
    rates: tuple[float, ...]
    gradients: tuple[float, ...]
    weights: str
    checkpoints: tuple[str, ...]
    folder: str
    recipe: str


def outcome(overrides: tuple[str, ...]) -> Outcome:
    """Of a run on one rank, as `longtrain train` does it; the current folder is a desk."""
    return train(dump_recipe(tiny(*overrides)))


@functools.cache
def train(text: str) -> Outcome:
    recipe = parse_recipe(text, "tiny")
    plan = make_plan(recipe, 1, "cpu")
    split, unseen = open_data(plan)
    start = choose(recipe, split, "auto")
    try:
        ctx = launch.start(launch.Launch(), device="cpu")
        batches = held_out(unseen, recipe.evaluation.sequences, micro_batch_size=1, dp=1, dp_rank=0) if unseen else []
        progress = run_training(
            plan, ctx, split, start, until=None, evaluate=lambda run: held_out_loss(run.engine, run.plan, run.ctx, batches)
        )
    finally:
        launch.stop()
    folder = Path(recipe.run_folder)
    rows = read_metrics(folder / METRICS_FILE)
    digest = hashlib.sha256()
    for name, value in read_master(folder / CHECKPOINTS):
        digest.update(name.encode() + value.numpy().tobytes())
    return Outcome(
        steps=progress.step,
        tokens=progress.tokens,
        losses=tuple((row["step"], row["loss"]) for row in rows),
        held_out=tuple((row["step"], row["eval_loss"]) for row in rows if row["eval_loss"] is not None),
        rates=tuple(row["lr"] for row in rows),
        gradients=tuple(row["grad_norm"] for row in rows),
        weights=digest.hexdigest(),
        checkpoints=tuple(sorted(path.name for path in (folder / CHECKPOINTS).iterdir())),
        folder=str(folder),
        recipe=(folder / "recipe.yaml").read_text(),
    )


def tiny(*overrides: str) -> Recipe:
    """The desk's recipe, with a run folder of its own unless `output` or `name` is set."""
    given = {override.split("=")[0] for override in overrides}
    base = [override for override in BASE if override.split("=")[0] not in given]
    recipe = parse_recipe(RECIPE.replace("output: run\n", ""), "tiny", [*overrides, *base])
    if given & {"output", "name"}:
        return recipe
    digest = hashlib.sha256(dump_recipe(recipe).encode()).hexdigest()
    return recipe.model_copy(update={"output": f"runs/{digest}"})


def scaled(kind: str, **values: object) -> tuple[str, ...]:
    """Overrides of model.rope_scaling."""
    given = {"kind": kind or None, **values}
    return tuple(f"model.rope_scaling.{name}={value}" for name, value in given.items() if value is not None)
