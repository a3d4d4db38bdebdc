"""A run from its plan to its last checkpoint."""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console

from longtrain.data.packed import PackedSplit
from longtrain.parallel.context import ParallelContext
from longtrain.plan import Plan
from longtrain.recipe.load import dump_recipe
from longtrain.train.assemble import Run, assemble, warnings
from longtrain.train.checkpoint import remove_leftovers
from longtrain.train.loop import Evaluate, train
from longtrain.train.resume import CHECKPOINTS, Start
from longtrain.train.state import Progress
from longtrain.train.tracking import METRICS_FILE, JsonLines, Terminal, Trackers

RECIPE_FILE = "recipe.yaml"


def run_training(
    plan: Plan, ctx: ParallelContext, split: PackedSplit, start: Start, *, until: int | None, evaluate: Evaluate | None
) -> Progress:
    """Trains up to `until` steps, or to the recipe's last. A collective of all ranks; returns how far the run is."""
    steps = plan.recipe.training.steps
    goal = steps if until is None else min(until, steps)
    run = assemble(plan, ctx, split, start)
    try:
        if ctx.is_main:
            _open_folder(run, start)
        if run.progress.step >= goal:
            run.trackers.say(f"nothing to do: {run.folder} is at step {run.progress.step} of {steps} already")
        return train(run, until=goal, evaluate=evaluate)
    finally:
        run.close()


def _open_folder(run: Run, start: Start) -> None:
    """The run's folder, its resolved recipe, and the trackers."""
    recipe, done = run.plan.recipe, run.progress.step
    remove_leftovers(run.folder / CHECKPOINTS)
    run.folder.mkdir(parents=True, exist_ok=True)
    (run.folder / RECIPE_FILE).write_text(dump_recipe(recipe))
    console = Console(file=sys.stdout)
    console.print(_headline(run.plan), highlight=False, soft_wrap=True)
    run.trackers = Trackers([JsonLines(run.folder / METRICS_FILE, done), Terminal(console, recipe.training.steps, done)])
    for line in (*start.remarks, *warnings(run.split)):
        run.trackers.say(line)


def _headline(plan: Plan) -> str:
    recipe = plan.recipe
    return (
        f"{recipe.name}: {plan.parameters:,} parameters, {recipe.training.sequence_length:,} tokens a sequence, "
        f"{plan.world} rank{'s' if plan.world > 1 else ''} (dp {plan.dp} x cp {plan.cp}) on {plan.device}, ZeRO stage {recipe.zero.stage}, "
        f"{recipe.training.precision}, kernel {plan.kernel.kernel.name}, run folder {Path(recipe.run_folder)}"
    )
