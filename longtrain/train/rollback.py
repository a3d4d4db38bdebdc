"""Going back to the last good checkpoint inside a running job, past the data that spoilt what came after it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from longtrain.errors import CheckpointError
from longtrain.parallel.context import ParallelContext
from longtrain.recipe.guards import SkipAction
from longtrain.train.assemble import Run
from longtrain.train.checkpoint import check_together, together
from longtrain.train.checkpoint_folder import complete, set_aside
from longtrain.train.guards import check_skips, good_checkpoints, step_of
from longtrain.train.resume import CHECKPOINTS, restore
from longtrain.train.tracking import METRICS_FILE


def answer_skips(run: Run) -> bool:
    """After too many steps in a row without an update: rolls the run back, as often as its recipe allows, or ends it.

    A collective of all ranks; whether it went back. Raises TrainingError as `check_skips`: where the recipe says stop, the
    roll-backs are used up, or there is no sound checkpoint to go back to.
    """
    recipe, progress, folder = run.plan.recipe, run.progress, run.folder / CHECKPOINTS
    if progress.skipped_in_row < recipe.training.max_skipped:
        return False
    guards = recipe.guards
    if guards.on_max_skipped is SkipAction.ROLL_BACK and progress.roll_backs < guards.max_roll_backs:
        run.settle()
        target = _target(run.ctx, lambda: good_checkpoints(progress, folder))
        if target is not None:
            _go_back(run, target)
            return True
    check_skips(progress, recipe.training.max_skipped, folder)
    return False


def _target(ctx: ParallelContext, good: Callable[[], list[Path]]) -> Path | None:
    """The newest of the good checkpoints whose every byte is what was written."""
    names: list[str] = _ask_main(ctx, lambda: [str(path) for path in good()])
    for path in map(Path, reversed(names)):
        try:
            check_together(ctx, path)
            return path
        except CheckpointError:
            continue
    return None


def _go_back(run: Run, target: Path) -> None:
    """Weights, moments and steps of `target`; the data cursor stays where it is. The checkpoint is then saved again with that
    cursor, so that a run which is killed from here on resumes past the bad data too."""
    before = run.progress
    # before the save: a kill in between resumes from `target` as it was, and comes here once more
    aside = _ask_main(run.ctx, lambda: _set_later_aside(target))
    restored = restore(run.engine, target, verified=True)
    run.progress = replace(
        restored,
        sequences=before.sequences,
        skipped=before.skipped,
        skipped_in_row=0,
        spikes=before.spikes,
        roll_backs=before.roll_backs + 1,
        sound=restored.step,
    )
    if run.ctx.is_main:
        drop_reports(run.folder / METRICS_FILE, restored.step)
    guards = run.plan.recipe.guards
    run.trackers.say(
        f"WARNING: step {before.step}: the last {before.skipped_in_row} steps updated nothing: rolled back to {target.name}, "
        f"{run.progress.roll_backs} of {guards.max_roll_backs} times (guards.max_roll_backs); sequences {restored.sequences:,} to "
        f"{before.sequences - 1:,} of the data are left out"
    )
    for line in aside:
        run.trackers.say(line)
    run.save()


def _set_later_aside(target: Path) -> list[str]:
    later = [path for path in complete(target.parent) if step_of(path) > step_of(target)]
    return [f"{path.name} is now {set_aside(path).name}" for path in later]


def drop_reports(metrics: Path, step: int) -> None:
    """Cuts reports of later steps off metrics.jsonl, as a resumed run does; in place, because it is open for appending."""
    end = 0
    with metrics.open("rb") as file:
        for line in file:
            if json.loads(line)["step"] > step:
                break
            end += len(line)
    os.truncate(metrics, end)


def _ask_main(ctx: ParallelContext, action: Callable[[], Any]) -> Any:
    """What `action` returns on the main rank, on all of them: others might see what it has just renamed."""
    return together(ctx, lambda: action() if ctx.is_main else None)[0]
