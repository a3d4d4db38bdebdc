"""Arguments in, exit codes out. Refusals are one message and exit code 2."""

from __future__ import annotations

import errno
import math
import shlex
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from longtrain.errors import CheckpointError, DataError, LaunchError, LongtrainError, PlanError
from longtrain.recipe.load import builtin_recipes, load_recipe
from longtrain.recipe.schema import Device, Precision, Recipe

if TYPE_CHECKING:
    from longtrain.data.mixture import Split
    from longtrain.parallel.context import ParallelContext
    from longtrain.plan import Plan
    from longtrain.train.export import Trained
    from longtrain.train.loop import Evaluate

# torch and everything built on it takes seconds to import: only inside the functions that need it, so that --help answers at once

LABEL_WIDTH = 16
PIPE_WIDTH = 200
REFUSED = 2
INTERRUPTED = 128 + 2  # what a shell reports of a command that SIGINT ended
PATIENCE = 3.0  # seconds in which torchrun ends the ranks of a run that one of them has left

# What the file system can say no with where the system call names no file.
_FILE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM, errno.EFBIG}
# what gloo and NCCL say on the ranks that are left when one has gone
_LOST_PEER = ("onnection closed by peer", "Connection reset by peer", "remote process exited", "Broken pipe")


def _typer(help_text: str | None = None) -> typer.Typer:
    # plain help: boxes do not survive a pipe
    return typer.Typer(
        help=help_text, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None
    )


app = _typer("Trains decoders at long context.")
train_app = _typer()
checkpoint_app = _typer("Lists, checks, exports and prunes checkpoints.")
app.add_typer(checkpoint_app, name="checkpoint")

RecipeOption = Annotated[
    str, typer.Option("--recipe", metavar="NAME|PATH", help="A built-in recipe's name, or the path of a YAML file.")
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Overrides one key, e.g. optimizer.lr=1e-4; repeatable.")
]
DataOption = Annotated[
    Path | None,
    typer.Option("--data", metavar="FOLDER", help="Prepared data with the run's tokenizer; by default what the run read."),
]


@app.command()
@train_app.command()
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
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop. Needs no GPU and no data.")] = False,
    ranks: Annotated[int | None, typer.Option(min=1, metavar="N", help="Number of ranks to plan for, with --dry-run.")] = None,
) -> None:
    """Trains from a recipe. Start several ranks with torchrun."""
    code = 0
    with _refusals():
        chosen = load_recipe(recipe, overrides or [])
        if dry_run:
            _dry_run(chosen, ranks)
        elif ranks is not None:
            raise PlanError(f"--ranks goes with --dry-run; to train on {ranks} ranks start torchrun --nproc-per-node {ranks}")
        else:
            code = _train(chosen, resume, until, force_resume)
    raise typer.Exit(code)


@app.command()
def recipes() -> None:
    """Lists the built-in recipes."""
    with _refusals():
        table = Table("recipe", "sequence", "ranks at least", "what it is", box=None, header_style="bold", pad_edge=False)
        for name, path in builtin_recipes().items():
            recipe = load_recipe(name)
            remark = path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
            table.add_row(name, f"{recipe.training.sequence_length:,}", str(recipe.smallest_world), remark)
        Console(width=None if sys.stdout.isatty() else PIPE_WIDTH).print(table)


@app.command()
@checkpoint_app.command()
def export(
    run: Annotated[Path, typer.Argument(help="The run's folder, or one checkpoint's.")],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="The Hugging Face folder to write; it must not exist.")],
    dtype: Annotated[
        Precision | None, typer.Option(help="Number format of the weights; by default what the run trained in.")
    ] = None,
    data: DataOption = None,
) -> None:
    """Writes a checkpoint as a Hugging Face folder. Needs no GPU."""
    with _refusals():
        from longtrain.train.export import export_checkpoint

        _say(f"wrote {export_checkpoint(run, out, dtype, data=data)}")


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="The run's folder, e.g. runs/quickstart.")],
    prompt: Annotated[str, typer.Option(help="Text that the sample continues.")] = "def ",
    tokens: Annotated[int, typer.Option(min=0, help="Length of the sample; 0: none.")] = 96,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the most likely token.")] = 0.6,
    data: DataOption = None,
) -> None:
    """Sums up a run: losses, speed, plot, a sample of generated text."""
    with _refusals():
        if math.isnan(temperature):
            raise PlanError("--temperature nan: give a number of at least 0")
        _report(run)
        if tokens:
            _sample(run, data, prompt, tokens, temperature)


@app.command()
def doctor(
    folder: Annotated[Path, typer.Option(metavar="FOLDER", help="Where runs are written.")] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
) -> None:
    """Says what is wrong with this machine. Exit code 0: nothing, 1: warnings, 2: training cannot work here."""
    with _refusals():
        from longtrain.doctor.report import examine

        text, code = examine(folder, as_json)
        print(text)
    raise typer.Exit(code)


@checkpoint_app.command("ls")
def list_checkpoints(
    run: Annotated[Path, typer.Argument(help="The run's folder, or one checkpoint's.")],
    check: Annotated[bool, typer.Option("--verify", help="Read every byte; else only torn files are found.")] = False,
) -> None:
    """Lists the checkpoints of a run: step, tokens, loss, size, ranks, and whether they are sound."""
    with _refusals():
        from longtrain.train.checkpoint_commands import examine, find, table

        entries = [examine(path, content=check) for path in find(run)]
        Console(width=None if sys.stdout.isatty() else PIPE_WIDTH).print(table(entries, verified=check))
        for reason in (reason for entry in entries for reason in entry.damage):
            _say(reason)


@checkpoint_app.command("verify")
def verify_checkpoints(run: Annotated[Path, typer.Argument(help="The run's folder, or one checkpoint's.")]) -> None:
    """Reads every byte of a checkpoint, or of all of a run. Exit code 2 where one is damaged; the files are named."""
    with _refusals():
        from longtrain.train.checkpoint_commands import examine, find

        problems: list[str] = []
        for path in find(run):
            found = examine(path, content=True).damage
            _say(f"{path}: {'DAMAGED' if found else 'verified'}")
            problems += found
        if problems:
            raise CheckpointError("\n".join(problems))


@checkpoint_app.command("prune")
def prune_checkpoints(
    run: Annotated[Path, typer.Argument(help="The run's folder.")],
    keep: Annotated[int, typer.Option(min=1, metavar="N", help="Number of newest verified checkpoints to keep.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be deleted.")] = False,
) -> None:
    """Deletes all but the newest verified checkpoints of a run; never the only good one."""
    with _refusals():
        from longtrain.train.checkpoint_commands import prune

        for path, reason in prune(run, keep, dry_run=dry_run):
            _say(f"{'would delete' if dry_run else 'deleted'} {path} ({reason})")


@app.command("check-data")
def check_data(folder: Annotated[Path, typer.Argument(help="A prepared data folder.")]) -> None:
    """Reads every byte of a prepared data folder and compares it with what was written."""
    with _refusals():
        from longtrain.data.packed import PackedSplit
        from longtrain.train.assemble import HELD_OUT, TRAIN

        for name in (TRAIN, HELD_OUT):
            split = PackedSplit(folder, name, 1)
            split.verify()
            _say(f"{folder}: {name}: {split.documents:,} documents, {split.tokens:,} tokens: as they were written")


def main() -> None:
    """The `longtrain` command."""
    app()


def train_main() -> None:
    """scripts/train.py: `longtrain train` under its own name."""
    train_app()


def _dry_run(recipe: Recipe, ranks: int | None) -> None:
    import torch

    from longtrain.parallel.launch import Launch
    from longtrain.plan import make_plan
    from longtrain.plan.describe import describe

    launch = Launch.read()
    here = "cuda" if torch.cuda.is_available() else "cpu"
    device = here if recipe.device is Device.AUTO else recipe.device.value
    plan = make_plan(recipe, ranks or (launch.world if launch.torchrun else recipe.smallest_world), device)
    if launch.rank:
        return
    _say_lines(describe(plan))
    if recipe.device is Device.AUTO and here == "cpu":
        _say("\nplanned for cpu, as this machine has no GPU; --set device=cuda plans for GPUs")


def _train(recipe: Recipe, resume: str, until: int | None, force: bool) -> int:
    """Trains; returns the exit code."""
    from longtrain.train.signals import STOPPED

    rank = _rank()
    try:
        step = _run(recipe, resume, until, force)
    except KeyboardInterrupt:
        if rank == 0:
            _say_interrupted(Path(recipe.run_folder))
        raise
    steps = recipe.training.steps
    if step < min(steps if until is None else until, steps):
        if rank == 0:
            _say(f"stopped at step {step}, as asked; the same command goes on from there")
        return STOPPED
    if rank == 0:
        _finish(recipe, complete=step >= steps)
    return 0


def _run(recipe: Recipe, resume: str, until: int | None, force: bool) -> int:
    """The step that the run is at when it ends. What every rank can refuse by itself comes before the ranks meet; nothing is
    written before that, and a signal ends the process as it does any other."""
    from longtrain.parallel import launch
    from longtrain.plan import make_plan
    from longtrain.train.assemble import open_data, open_weights, verify_data
    from longtrain.train.experiment import check_installed
    from longtrain.train.resume import choose
    from longtrain.train.run import facts_of, run_training
    from longtrain.train.run_folder import check_shared, check_writable
    from longtrain.train.signals import StopSignals
    from longtrain.train.tracking import METRICS_FILE, read_metrics

    started = launch.Launch.read()
    device = launch.resolve_device(recipe.device.value, started)
    plan = make_plan(recipe, started.world, device.type)
    remarks = launch.check_rings(started, plan.cp)
    check_installed(recipe.tracking)
    split, unseen = open_data(plan)
    folder = Path(recipe.run_folder)
    check_writable(folder)
    start = choose(plan.recipe, split, resume, force=force)
    start = replace(start, remarks=(*start.remarks, *remarks))
    open_weights(plan, start)
    read_metrics(folder / METRICS_FILE)
    splits = [split] if unseen is None else [split, unseen]
    if started.local_rank == 0:
        verify_data(splits)
    failed = True
    try:
        ctx = launch.start(started, dp=plan.dp, cp=plan.cp, device=device.type)
        with StopSignals(_say_aside, lambda: None if ctx.rank else _say_interrupted(folder)) as stop:
            check_shared(ctx, folder)
            launch.check_agreement(ctx, facts_of(plan, splits, start, until))
            evaluate = None if unseen is None else _evaluation(plan, ctx, unseen)
            progress = run_training(
                plan, ctx, split, start, until=until, evaluate=evaluate, draw=lambda: _draw(recipe), asked_to_stop=stop.asked
            )
            # torchrun ends all ranks when one leaves with an exit code, and the main one may still be telling its trackers
            ctx.all_gather_text("done")
        failed = False
    finally:
        launch.stop(failed)
    return progress.step


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


def _finish(recipe: Recipe, complete: bool) -> None:
    """What the main rank leaves in the run's folder: the plot and, of a complete run, the export."""
    from longtrain.train.export import export_checkpoint
    from longtrain.train.resume import find_checkpoint
    from longtrain.train.run_folder import EXPORT_FOLDER

    folder = Path(recipe.run_folder)
    if plots := _draw(recipe):
        _say(f"plots: {', '.join(str(plot) for plot in plots)}")
    if not complete:
        return
    checkpoint, out = find_checkpoint(folder), folder / EXPORT_FOLDER
    if out.exists() and not _newer(out, checkpoint):
        # of an earlier, shorter run: kept, because people work in it
        out = folder / f"{EXPORT_FOLDER}-{checkpoint.name}"
    if not out.exists():
        _say(f"Hugging Face checkpoint: {export_checkpoint(folder, out)}")


def _draw(recipe: Recipe) -> list[Path]:
    """Draws the plots of a run's folder anew."""
    from longtrain.evaluate.plot import draw_plots
    from longtrain.train.tracking import METRICS_FILE, read_metrics

    folder = Path(recipe.run_folder)
    return draw_plots(read_metrics(folder / METRICS_FILE), recipe.name, folder)


def _newer(export: Path, checkpoint: Path) -> bool:
    return export.stat().st_mtime >= checkpoint.stat().st_mtime


def _report(folder: Path) -> None:
    from longtrain.evaluate.plot import LOSS_PLOT
    from longtrain.evaluate.report import summary
    from longtrain.train.checkpoint_folder import find_latest
    from longtrain.train.resume import CHECKPOINTS
    from longtrain.train.run_folder import EXPORT_FOLDER
    from longtrain.train.tracking import METRICS_FILE, read_metrics

    rows = read_metrics(folder / METRICS_FILE)
    if not rows:
        raise CheckpointError(f"{folder / METRICS_FILE}: no reports there; name the folder of a run that has trained")
    lines = summary(rows)
    exports = sorted(folder.glob(f"{EXPORT_FOLDER}*"), key=lambda path: path.stat().st_mtime)
    found = [
        ("plot", folder / LOSS_PLOT),
        ("checkpoint", find_latest(folder / CHECKPOINTS)),
        ("Hugging Face", (exports or [None])[-1]),
    ]
    lines += [(what, str(path)) for what, path in found if path is not None and path.exists()]
    _say_lines(lines)


def _sample(folder: Path, data: Path | None, prompt: str, tokens: int, temperature: float) -> None:
    """The sample and the next command; where the checkpoint or its tokenizer is gone, the reason instead: the report stands."""
    from longtrain.evaluate.generate import generate
    from longtrain.train.export import load_trained

    try:
        trained = load_trained(folder, data=data)
    except (CheckpointError, DataError) as error:
        _say(f"\nno sample: {error}")
        return
    bos, eos = trained.tokenizer.bos, trained.tokenizer.eos
    # where documents begin with their text, an empty prompt goes on after the end of one
    ids = [*([] if bos is None else [bos]), *trained.tokenizer.encode(prompt)] or [eos]
    ids = generate(trained.model, ids, tokens, temperature=temperature, seed=0, end=eos)
    Console().print("\nsample:", style="bold")
    _say(trained.tokenizer.decode(ids))
    Console().print("\nto go on:", style="bold")
    _say(_next_command(folder, trained))


def _next_command(folder: Path, trained: Trained) -> str:
    from longtrain.train.run_folder import RECIPE_FILE

    torchrun = Path(sys.executable).with_name("torchrun")
    inside = torchrun.exists() and torchrun.is_relative_to(Path.cwd())
    command = str(torchrun.relative_to(Path.cwd())) if inside else "torchrun"
    words = [command, "--nproc-per-node", str(trained.world), "scripts/train.py", "--recipe", str(folder / RECIPE_FILE)]
    if trained.step >= load_recipe(folder / RECIPE_FILE).training.steps:
        words += ["--set", f"training.steps={2 * trained.step}"]
    return shlex.join(words)


def _say_aside(text: str) -> None:
    rank = _rank()
    print(f"rank {rank}: {text}" if rank else text, file=sys.stderr, flush=True)


def _say_interrupted(folder: Path) -> None:
    from longtrain.train.checkpoint_folder import find_latest
    from longtrain.train.resume import CHECKPOINTS

    latest = find_latest(folder / CHECKPOINTS)
    kept = "there is no checkpoint yet" if latest is None else f"the same command goes on from {latest}"
    print(f"interrupted; {kept}", file=sys.stderr, flush=True)


@contextmanager
def _refusals() -> Iterator[None]:
    """Turns a refusal into its message and exit code 2, Ctrl-C into exit code 130."""
    try:
        yield
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
    except Exception as error:
        message, rank = _refusal(error), _rank()
        if rank:
            # where all ranks refuse alike, or this one only lost its peers: rank 0 says why, and torchrun ends this one meanwhile
            time.sleep(PATIENCE)
        if message is None:
            raise
        print(f"error on rank {rank}: {message}" if rank else f"error: {message}", file=sys.stderr, flush=True)
        raise typer.Exit(REFUSED) from None


def _refusal(error: Exception) -> str | None:
    """What to tell of a refusal by us or by the file system; None for every other error, which keeps its traceback."""
    if isinstance(error, LongtrainError):
        return str(error)
    if isinstance(error, OSError) and (error.filename is not None or error.errno in _FILE_ERRORS):
        return ": ".join(str(part) for part in (error.filename, error.strerror) if part is not None)
    if isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in _LOST_PEER):
        return "another rank of this run has ended; what it printed says why"
    return None


def _rank() -> int:
    from longtrain.parallel.launch import Launch

    try:
        return Launch.read().rank
    except LaunchError:
        return 0


def _say(text: str) -> None:
    Console().print(text, highlight=False, soft_wrap=True, markup=False)


def _say_lines(lines: Iterable[tuple[str, str]]) -> None:
    for what, value in lines:
        _say(f"{what:{LABEL_WIDTH}} {value}")
