"""A run from its plan to its last checkpoint."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

import longtrain
from longtrain.data.packed import PackedSplit
from longtrain.files import replace_durably
from longtrain.parallel.context import ParallelContext
from longtrain.plan import Plan
from longtrain.recipe.load import dump_recipe
from longtrain.train.assemble import Run, assemble, warnings
from longtrain.train.checkpoint import digest_of, remove_leftovers
from longtrain.train.loop import Evaluate, train
from longtrain.train.resume import CHECKPOINTS, Start, flat
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
        if run.progress.step >= goal:
            if ctx.is_main:
                Terminal(Console(file=sys.stdout), steps, run.progress.step).say(_nothing_to_do(run, goal))
            return run.progress
        if ctx.is_main:
            _open_folder(run, start)
        return train(run, until=goal, evaluate=evaluate)
    finally:
        run.close()


def facts_of(plan: Plan, splits: Sequence[PackedSplit], start: Start, until: int | None) -> dict[str, str]:
    """What all ranks of a run must have in common, for `check_agreement`: recipe, data, checkpoint, versions."""
    facts = {f"recipe field {field}": repr(value) for field, value in flat(plan.recipe.model_dump(mode="json")).items()}
    facts |= {f"data ({split.split})": split.manifest.fingerprint(split.split) for split in splits}
    facts["checkpoint"] = "none" if start.checkpoint is None else f"{start.checkpoint.name} {digest_of(start.checkpoint)}"
    facts["--until"] = str(until)
    return facts | {"longtrain version": longtrain.__version__, "torch version": str(torch.__version__)}


def _nothing_to_do(run: Run, goal: int) -> str:
    step, steps = run.progress.step, run.plan.recipe.training.steps
    more = "raise --until" if goal < steps else f"raise training.steps, now {steps}"
    return f"nothing to do: {run.folder} is at step {step} already; to train on, {more}"


def _open_folder(run: Run, start: Start) -> None:
    """The run's folder, its resolved recipe, and the trackers."""
    recipe, done = run.plan.recipe, run.progress.step
    remove_leftovers(run.folder / CHECKPOINTS)
    run.folder.mkdir(parents=True, exist_ok=True)
    replace_durably(run.folder / RECIPE_FILE, dump_recipe(recipe).encode())
    console = Console(file=sys.stdout)
    console.print(_headline(run.plan), highlight=False, soft_wrap=True)
    run.trackers = Trackers([JsonLines(run.folder / METRICS_FILE, done), Terminal(console, recipe.training.steps, done)])
    for line in (*start.remarks, *warnings(run.split)):
        run.trackers.say(line)


def _headline(plan: Plan) -> str:
    recipe, ranks = plan.recipe, f"{plan.world} rank{'s' if plan.world > 1 else ''}"
    return (
        f"{recipe.name}: {plan.parameters:,} parameters, {recipe.training.sequence_length:,} tokens a sequence, "
        f"{ranks} (dp {plan.dp} x cp {plan.cp}) on {plan.device}, ZeRO stage {recipe.zero.stage}, {recipe.training.precision}, "
        f"kernel {plan.kernel.kernel.name}, run folder {Path(recipe.run_folder)}"
    )
