"""A run from its plan to its last checkpoint."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import longtrain
from longtrain.data.mixture import Split
from longtrain.errors import CheckpointError
from longtrain.parallel.context import ParallelContext
from longtrain.plan import Plan
from longtrain.plan.host import lacks_disk
from longtrain.train.assemble import Run, assemble, warnings
from longtrain.train.checkpoint import together
from longtrain.train.checkpoint_folder import complete, remove_leftovers, set_aside
from longtrain.train.checkpoint_format import step_of
from longtrain.train.experiment import choose_id, experiment_trackers
from longtrain.train.loop import Evaluate, train
from longtrain.train.resume import CHECKPOINTS, Start, confirm, flat
from longtrain.train.run_folder import environment, explain, occupy, tracker_config, worth_keeping
from longtrain.train.state import Progress
from longtrain.train.tracking import METRICS_FILE, Background, JsonLines, Redrawn, Terminal, Trackers, say_on_stderr
from longtrain.train.watchdog import Watchdog

Draw = Callable[[], Sequence[Path]]


def run_training(
    plan: Plan,
    ctx: ParallelContext,
    split: Split,
    start: Start,
    *,
    until: int | None,
    evaluate: Evaluate | None,
    draw: Draw | None = None,
    asked_to_stop: Callable[[], bool] = lambda: False,
) -> Progress:
    """Trains up to `until` steps, or to the recipe's last. A collective of all ranks; returns how far the run is.

    draw: draws the plots of the run's folder, on the main rank, and says where they are. asked_to_stop: whether this process was;
    the run then stops, saved, before its next step.
    """
    steps = plan.recipe.training.steps
    goal = steps if until is None else min(until, steps)
    folder, seconds = Path(plan.recipe.run_folder), plan.recipe.guards.watchdog_seconds
    with Watchdog(ctx, folder, seconds) as watchdog, ExitStack() as alone:
        start = confirm(ctx, start, watchdog.alive)
        run = assemble(plan, ctx, split, start, verified=True, alive=watchdog.alive)
        run.asked_to_stop = asked_to_stop
        try:
            if run.progress.step >= goal:
                if ctx.is_main:
                    Terminal(Console(file=sys.stdout), steps, run.progress.step).say(_nothing_to_do(run, goal))
                return run.progress
            record = environment(ctx, run.progress.step)
            together(ctx, lambda: _occupy(run, start, alone) if ctx.is_main else None)
            watchdog.alive()
            if ctx.is_main:
                _open_folder(run, start, goal, record, draw)
            # also within a long evaluation
            run.engine.model.register_forward_pre_hook(lambda *_: watchdog.alive())
            progress = train(run, until=goal, evaluate=evaluate, beat=watchdog.beat)
            watchdog.done()
            if ctx.is_main:
                run.trackers.keep([*(_last_plots(draw) if draw else ()), *worth_keeping(run.folder)])
            return progress
        except BaseException as error:
            watchdog.closing(error)
            raise
        finally:
            run.close()


def _last_plots(draw: Draw) -> Sequence[Path]:
    """None where the disk takes none, or has changed what they are drawn of: the run is trained, and saved."""
    try:
        return draw()
    except (OSError, CheckpointError) as error:
        say_on_stderr(f"WARNING: the plots could not be drawn: {error}")
        return ()


def facts_of(plan: Plan, splits: Sequence[Split], resume: str, until: int | None) -> dict[str, str]:
    """What all ranks of a run must have in common, for `check_agreement`: recipe, data, options, versions. Which checkpoint they go
    on from, `confirm` settles."""
    facts = {f"recipe field {field}": repr(value) for field, value in flat(plan.recipe.model_dump(mode="json")).items()}
    facts |= {f"data ({split.split})": split.fingerprint for split in splits}
    facts |= {"--resume": resume, "--until": str(until)}
    return facts | {"longtrain version": longtrain.__version__, "torch version": str(torch.__version__)}


def _nothing_to_do(run: Run, goal: int) -> str:
    step, steps = run.progress.step, run.plan.recipe.training.steps
    more = "raise --until" if goal < steps else f"raise training.steps, now {steps}"
    return f"nothing to do: {run.folder} is at step {step} already; to train on, {more}"


def _occupy(run: Run, start: Start, alone: ExitStack) -> None:
    """Keeps other processes out of the run's folder while `alone` is open. Raises CheckpointError where one is, or was, in it."""
    alone.enter_context(occupy(run.folder))
    steps = complete(run.folder / CHECKPOINTS)
    later = [path.name for path in steps if path not in start.damaged and step_of(path) > run.progress.step]
    if later:
        raise CheckpointError(
            f"{run.folder}: another process has saved {later[-1]} there since this one looked for checkpoints; start again"
        )


def _open_folder(run: Run, start: Start, goal: int, record: Mapping[str, Any], draw: Draw | None) -> None:
    """The run's folder, what explains it, and the trackers."""
    recipe, done = run.plan.recipe, run.progress.step
    # first, as leftovers may be renamed to what they were to replace
    aside = [f"{path.name} is now {set_aside(path).name}" for path in start.damaged]
    remove_leftovers(run.folder / CHECKPOINTS)
    explain(run.folder, run.plan, record)
    console = Console(file=sys.stdout)
    console.print(_headline(run.plan), highlight=False, soft_wrap=True)
    terminal, lines = Terminal(console, recipe.training.steps, done), JsonLines(run.folder / METRICS_FILE, done)
    run_id = choose_id(recipe.tracking, start.tracker)
    config = tracker_config(run.plan, record)
    more = experiment_trackers(
        recipe.tracking, name=recipe.name, run_id=run_id, folder=run.folder, done=done, config=config, say=terminal.say
    )
    if draw is not None:
        more.append(Background("plots", lambda: Redrawn(draw), terminal.say))
    run.trackers = Trackers([lines, terminal, *more], run_id)
    there, free = len(complete(run.folder / CHECKPOINTS)), shutil.disk_usage(run.folder).free
    lacks = lacks_disk(run.plan, goal - done, there, free)
    disk = [] if lacks is None else [f"warning: {run.folder}: {lacks}"]
    for line in (*start.notes, *start.remarks, *aside, *warnings(run.split, None if start.checkpoint else run.plan), *disk):
        run.trackers.say(line)


def _headline(plan: Plan) -> str:
    recipe, ranks = plan.recipe, f"{plan.world} rank{'s' if plan.world > 1 else ''}"
    return (
        f"{recipe.name}: {plan.parameters:,} parameters, {recipe.training.sequence_length:,} tokens a sequence, "
        f"{ranks} (dp {plan.dp} x cp {plan.cp}) on {plan.device}, ZeRO stage {recipe.zero.stage}, {recipe.training.precision}, "
        f"kernel {plan.kernel.kernel.name}, run folder {Path(recipe.run_folder)}"
    )
