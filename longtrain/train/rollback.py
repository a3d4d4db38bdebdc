"""Going back to the last good checkpoint inside a running job, past the data that spoilt what came after it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from longtrain.errors import CheckpointError
from longtrain.parallel.context import ParallelContext
from longtrain.recipe.guards import SkipAction
from longtrain.train.assemble import Run
from longtrain.train.checkpoint import check_together, together
from longtrain.train.checkpoint_folder import complete, set_aside
from longtrain.train.checkpoint_format import step_of
from longtrain.train.guards import check_skips, good_checkpoints
from longtrain.train.resume import CHECKPOINTS, Damaged, restore
from longtrain.train.watchdog import Beat


def answer_skips(run: Run, beat: Beat = lambda step, phase: None) -> bool:
    """After too many steps in a row without an update: rolls the run back, as often as its recipe allows, or ends it.

    A collective of all ranks; whether it went back. beat: the watchdog's. Raises TrainingError as `check_skips`: where the recipe
    says stop, the roll-backs are used up, or there is no sound checkpoint to go back to.
    """
    recipe, progress, folder = run.plan.recipe, run.progress, run.folder / CHECKPOINTS
    if progress.skipped_in_row < recipe.training.max_skipped:
        return False
    guards, damaged = recipe.guards, []
    beat(progress.step, "save")
    run.settle()  # what is on its way deletes others, once it is there
    if guards.on_max_skipped is SkipAction.ROLL_BACK and progress.roll_backs < guards.max_roll_backs:
        beat(progress.step, "roll-back")
        alive = partial(beat, progress.step, "roll-back")
        target, damaged = _target(run.ctx, lambda: good_checkpoints(progress, folder), alive)
        for path, reason in damaged:
            run.trackers.say(f"WARNING: passed over {path.name}: {reason}")
        if target is not None:
            _go_back(run, target, beat, alive)
            return True
    check_skips(progress, recipe.training.max_skipped, folder, damaged=[path for path, _ in damaged])
    return False


def _target(
    ctx: ParallelContext, good: Callable[[], Sequence[Path]], alive: Callable[[], None]
) -> tuple[Path | None, list[Damaged]]:
    """The newest of the good checkpoints whose every byte is what was written, and those that were passed over for it."""
    names: list[str] = _ask_main(ctx, lambda: [str(path) for path in good()])
    damaged: list[Damaged] = []
    for path in map(Path, reversed(names)):
        try:
            check_together(ctx, path, alive)
            return path, damaged
        except CheckpointError as error:
            damaged.append((path, str(error)))
    return None, damaged


def _go_back(run: Run, target: Path, beat: Beat, alive: Callable[[], None]) -> None:
    """Weights, moments and steps of `target`; the data cursor stays where it is. The checkpoint is then saved again with that
    cursor, so that a run which is killed from here on resumes past the bad data too."""
    before = run.progress
    # before the save: a kill in between resumes from `target` as it was, and comes here once more
    aside = _ask_main(run.ctx, lambda: _set_later_aside(target))
    restored = restore(run.engine, target, verified=True, alive=alive)
    run.progress = replace(
        restored,
        sequences=before.sequences,
        skipped=before.skipped,
        skipped_in_row=0,
        spikes=before.spikes,
        roll_backs=before.roll_backs + 1,
        sound=min(restored.step, before.sound),
    )
    # only the main rank has trackers: an error of theirs must reach the others, which would wait for it in the save
    together(run.ctx, lambda: run.trackers.go_back(restored.step))
    guards = run.plan.recipe.guards
    run.trackers.say(
        f"WARNING: step {before.step}: the last {before.skipped_in_row} steps updated nothing: rolled back to {target.name}, "
        f"{run.progress.roll_backs} of {guards.max_roll_backs} times (guards.max_roll_backs); sequences {restored.sequences:,} to "
        f"{before.sequences - 1:,} of the data are left out"
    )
    for line in aside:
        run.trackers.say(line)
    beat(restored.step, "save")
    run.save()


def _set_later_aside(target: Path) -> list[str]:
    later = [path for path in complete(target.parent) if step_of(path) > step_of(target)]
    return [f"{path.name} is now {set_aside(path).name}" for path in later]


def _ask_main(ctx: ParallelContext, action: Callable[[], Any]) -> Any:
    """What `action` returns on the main rank, on all of them: others might see what it has just renamed."""
    return together(ctx, lambda: action() if ctx.is_main else None)[0]
