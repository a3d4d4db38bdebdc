"""`longtrain train`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from longtrain.cli.options import HostMemoryOption, RanksOption, RanksPerHostOption, RecipeOption, SetOption
from longtrain.cli.plan import say_plan
from longtrain.cli.refusals import located, refusals
from longtrain.cli.terminal import outlive_readers, rank, say, say_aside, warn
from longtrain.errors import CheckpointError, LaunchError, PlanError
from longtrain.recipe.load import Written, load_written
from longtrain.recipe.schema import Recipe

if TYPE_CHECKING:
    from longtrain.data.mixture import Split
    from longtrain.parallel.context import ParallelContext
    from longtrain.plan import Plan
    from longtrain.train.loop import Evaluate


def train(
    recipe: RecipeOption,
    overrides: SetOption = None,
    resume: Annotated[
        str,
        typer.Option(
            metavar="auto|never|PATH",
            help="auto: from the newest checkpoint of the run, if any; never: from the start; or a checkpoint's folder.",
        ),
    ] = "auto",
    until: Annotated[
        int | None, typer.Option(min=1, metavar="STEPS", help="Stop, with a checkpoint, when this many steps are done.")
    ] = None,
    force_resume: Annotated[
        bool, typer.Option("--force-resume", help="Go on from a checkpoint of another recipe or other data, and say what differs.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and stop, as `longtrain plan` does. Needs no GPU and no data.")
    ] = False,
    ranks: RanksOption = None,
    ranks_per_host: RanksPerHostOption = None,
    host_memory: HostMemoryOption = None,
) -> None:
    """Trains from a recipe. Start several ranks with torchrun."""
    code = 0
    with refusals(ranks=True):
        chosen, written = load_written(recipe, overrides or [])
        with located(written):
            if dry_run:
                say_plan(chosen, ranks, ranks_per_host, host_memory)
            elif ranks is not None or ranks_per_host is not None:
                option = "--ranks-per-host" if ranks is None else "--ranks"
                count = ranks_per_host if ranks is None else ranks
                raise PlanError(f"{option} goes with --dry-run; to train on so many start torchrun --nproc-per-node {count}")
            elif host_memory is not None:
                raise PlanError("--host-memory goes with --dry-run; a run measures the memory that it finds")
            else:
                if resume == "auto":
                    _check_own_folder(chosen, Path(recipe), written)
                code = _train(chosen, written, resume, until, force_resume)
    raise typer.Exit(code)


def _check_own_folder(recipe: Recipe, file: Path, written: Written) -> None:
    """Raises LaunchError where `file` is the recipe.yaml of a run with checkpoints, and leads to another folder than that run's: it
    was moved, or this is another working folder. The run would begin again. An output or a name on the command line is a choice."""
    from longtrain.train.checkpoint_folder import find_latest
    from longtrain.train.resume import CHECKPOINTS
    from longtrain.train.run_folder import RECIPE_FILE

    folder, place = Path(recipe.run_folder), file.parent
    chosen = written.replaces(("output",)) or (recipe.output is None and written.replaces(("name",)))
    if chosen or file.name != RECIPE_FILE or find_latest(place / CHECKPOINTS) is None:
        return
    if folder.exists() and folder.samefile(place):
        return
    inside = Path.cwd().is_relative_to(place.resolve())
    setting = shlex.quote(f"output={place.resolve() if inside else place}")
    raise LaunchError(
        f"output: {place} holds this recipe and checkpoints, and its run would begin again in {folder}; to go on from them, give "
        f"--set {setting}{' in a folder outside it' if inside else ''}; to begin another run, set another name or output"
    )


def _train(recipe: Recipe, written: Written, resume: str, until: int | None, force: bool) -> int:
    """Trains; returns the exit code."""
    from longtrain.train.signals import STOPPED
    from longtrain.train.tracking import METRICS_FILE

    main, reports = rank() == 0, Path(recipe.run_folder) / METRICS_FILE
    outlive_readers(f"nobody reads stdout any more: training goes on, what it prints is lost, and {reports} has its reports")
    try:
        step, drawn = _run(recipe, written, resume, until, force)
    except KeyboardInterrupt:
        if main:
            _say_interrupted(Path(recipe.run_folder), resume)
        raise
    steps, saves = recipe.training.steps, recipe.checkpoint.every is not None
    asked = step < min(steps if until is None else until, steps)
    if main and (asked or (step < steps and drawn)):
        same = _same_command(resume, [] if asked else ["without --until"])
        from_there = f"{same} goes on from there" if saves else "nothing was saved, as checkpoint.every is null"
        say(f"stopped at step {step}, as asked; {from_there}")
    if main and not asked:
        _finish(recipe, drawn, export=saves and step >= steps)
    return STOPPED if asked else 0


def _run(recipe: Recipe, written: Written, resume: str, until: int | None, force: bool) -> tuple[int, list[Path]]:
    """The step that the run is at when it ends, and the plots that it drew, on the main rank. What every rank can refuse by itself
    comes before the ranks meet; nothing is written before that, and a signal ends the process as it does any other."""
    from longtrain.evaluate.plot import draw_plots
    from longtrain.parallel import launch
    from longtrain.plan import make_plan
    from longtrain.plan.model import check_init
    from longtrain.train.assemble import open_data, open_weights, verify_data
    from longtrain.train.experiment import check_installed
    from longtrain.train.resume import CHECKPOINTS, choose
    from longtrain.train.run import facts_of, run_training
    from longtrain.train.run_folder import check_place, check_shared, check_writable
    from longtrain.train.signals import StopSignals
    from longtrain.train.tracking import METRICS_FILE, read_metrics

    started = launch.Launch.read()
    device = launch.resolve_device(recipe.device.value, started)
    plan = make_plan(recipe, started.world, device.type, started.local_world)
    remarks = launch.check_rings(started, plan.cp)
    check_installed(recipe.tracking)
    data = "data.path" if recipe.data.sources is None else "data.sources"
    with located(written, data):
        split, unseen = open_data(plan)
    folder = Path(recipe.run_folder)
    check_place(plan.recipe)
    for place in (folder, folder / CHECKPOINTS):
        check_writable(place)
    start = choose(plan.recipe, split, resume, force=force)
    start = replace(start, notes=(*start.notes, *remarks))
    with located(written, "model.init"):
        if start.checkpoint is None:
            check_init(plan.recipe)
        open_weights(plan, start)
    splits = [split] if unseen is None else [split, unseen]
    if started.local_rank == 0:
        with located(written, data):
            verify_data(splits)
    failed, drawn = True, []
    kept = "without a checkpoint, as checkpoint.every is null" if recipe.checkpoint.every is None else "with a checkpoint"

    def draw() -> list[Path]:
        drawn[:] = draw_plots(read_metrics(folder / METRICS_FILE), plan.recipe.name, folder)
        return drawn

    def asked_to_stop() -> bool:
        if started.orphaned():
            say_aside(f"torchrun is gone: stopping after this step, {kept}")
            return True
        return stop.asked()

    try:
        ctx = launch.start(started, dp=plan.dp, cp=plan.cp, device=device.type)
        with StopSignals(say_aside, lambda: None if ctx.rank else _say_interrupted(folder, resume), kept) as stop:
            # one of them may be a link
            for place in (folder, folder / CHECKPOINTS):
                check_shared(ctx, place)
            launch.check_agreement(ctx, facts_of(plan, splits, resume, until))
            evaluate = None if unseen is None else _evaluation(plan, ctx, unseen)
            progress = run_training(plan, ctx, split, start, until=until, evaluate=evaluate, draw=draw, asked_to_stop=asked_to_stop)
            # torchrun ends all ranks when one leaves with an exit code, and the main one may still be telling its trackers
            ctx.all_gather_text("done")
        failed = False
    finally:
        launch.stop(failed)
    return progress.step, drawn


def _evaluation(plan: Plan, ctx: ParallelContext, unseen: Split) -> Evaluate:
    from longtrain.data.loader import held_out
    from longtrain.evaluate.held_out import held_out_loss

    recipe = plan.recipe
    batches = held_out(
        unseen,
        recipe.evaluation.sequences,
        micro_batch_size=recipe.training.micro_batch_size,
        dp=plan.dp,
        dp_rank=ctx.dp_rank,
    )
    return lambda run: held_out_loss(run.engine, run.plan, run.ctx, batches)


def _finish(recipe: Recipe, drawn: list[Path], export: bool) -> None:
    """What the main rank leaves at the end: a word about the plots and, of a complete run that was saved, the export."""
    from longtrain.train.export import export_checkpoint, is_export_of
    from longtrain.train.resume import find_checkpoint
    from longtrain.train.run_folder import EXPORT_FOLDER

    if drawn:
        say(f"plots: {', '.join(str(plot) for plot in drawn)}")
    if not export:
        return
    folder = Path(recipe.run_folder)
    checkpoint, out = find_checkpoint(folder), folder / EXPORT_FOLDER
    earlier = ""
    if out.exists() and not is_export_of(out, checkpoint):
        # people work in it
        earlier = f" ({out} is of an earlier end of this run, and stays as it is)"
        out = folder / f"{EXPORT_FOLDER}-{checkpoint.name}"
    if not out.exists():
        export_checkpoint(checkpoint, out, warn=warn)
        say(f"Hugging Face checkpoint: {out}{earlier}")


def _say_interrupted(folder: Path, resume: str) -> None:
    from longtrain.train.checkpoint_folder import find_latest
    from longtrain.train.resume import CHECKPOINTS

    try:
        latest = find_latest(folder / CHECKPOINTS)
        kept = "there is no checkpoint yet" if latest is None else f"{_same_command(resume)} goes on from {latest}"
    except CheckpointError as error:
        kept = str(error)
    print(f"interrupted; {kept}", file=sys.stderr, flush=True)


def _same_command(resume: str, changes: Sequence[str] = ()) -> str:
    """The command that goes on after one with this --resume, in words. changes: what else must be different."""
    # never refuses to go on, also from what it has saved itself
    changes = [*(["with --resume auto"] if resume == "never" else []), *changes]
    return f"the command {' and '.join(changes)}" if changes else "the same command"
