"""Arguments in, exit codes out. Refusals are one message and exit code 2."""

from __future__ import annotations

import errno
import math
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from longtrain.errors import CheckpointError, DataError, LaunchError, LongtrainError, PlanError
from longtrain.recipe.load import builtin_recipes, load_recipe
from longtrain.recipe.schema import Device, Precision, Recipe

if TYPE_CHECKING:
    from longtrain.data.packed import PackedSplit
    from longtrain.parallel.context import ParallelContext
    from longtrain.plan import Plan
    from longtrain.train.export import Trained
    from longtrain.train.loop import Evaluate

# torch and everything built on it takes seconds to import: only inside the functions that need it, so that --help answers at once

EXPORT_FOLDER = "huggingface"
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

RecipeOption = Annotated[
    str, typer.Option("--recipe", metavar="NAME|PATH", help="A built-in recipe's name, or the path of a YAML file.")
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Overrides one key, e.g. optimizer.lr=1e-4; repeatable.")
]
DataOption = Annotated[
    Path | None,
    typer.Option("--data", metavar="FOLDER", help="The prepared data of the run, if it moved; by default where the run read it."),
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
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop. Needs no GPU and no data.")] = False,
    ranks: Annotated[int | None, typer.Option(min=1, metavar="N", help="Number of ranks to plan for, with --dry-run.")] = None,
) -> None:
    """Trains from a recipe. Start several ranks with torchrun."""
    with _refusals():
        chosen = load_recipe(recipe, overrides or [])
        if dry_run:
            _dry_run(chosen, ranks)
        elif ranks is not None:
            raise PlanError(f"--ranks goes with --dry-run; to train on {ranks} ranks start torchrun --nproc-per-node {ranks}")
        else:
            _train(chosen, resume, until)


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


def _train(recipe: Recipe, resume: str, until: int | None) -> None:
    """What every rank can refuse by itself comes before the ranks meet; nothing is written before that."""
    from longtrain.parallel import launch
    from longtrain.plan import make_plan
    from longtrain.train.assemble import open_data, verify_data
    from longtrain.train.resume import choose
    from longtrain.train.run import facts_of, run_training
    from longtrain.train.tracking import METRICS_FILE, read_metrics

    started = launch.Launch.read()
    device = launch.resolve_device(recipe.device.value, started)
    plan = make_plan(recipe, started.world, device.type)
    split, unseen = open_data(plan)
    folder = Path(recipe.run_folder)
    _check_writable(folder)
    start = choose(recipe, split, resume)
    read_metrics(folder / METRICS_FILE)
    splits = [split] if unseen is None else [split, unseen]
    if started.local_rank == 0:
        verify_data(splits)
    failed = True
    try:
        ctx = launch.start(started, dp=plan.dp, cp=plan.cp, device=device.type)
        launch.check_agreement(ctx, facts_of(plan, splits, start, until))
        evaluate = None if unseen is None else _evaluation(plan, ctx, unseen)
        progress = run_training(plan, ctx, split, start, until=until, evaluate=evaluate)
        failed = False
    except KeyboardInterrupt:
        if started.rank == 0:
            _say_interrupted(folder)
        raise
    finally:
        launch.stop(failed)
    if started.rank == 0:
        _finish(recipe, complete=progress.step >= recipe.training.steps)


def _evaluation(plan: Plan, ctx: ParallelContext, unseen: PackedSplit) -> Evaluate:
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


def _check_writable(folder: Path) -> None:
    """Raises LaunchError where the run's folder can be neither used nor made. Leaves no trace."""
    existing = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not existing.is_dir():
        raise LaunchError(f"output: the run's folder {folder} cannot be made: {existing} is not a folder; set another output")
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        reason = f"{existing}: {error.strerror}"
        raise LaunchError(f"output: the run's folder {folder} cannot be written: {reason}; set another output") from None


def _finish(recipe: Recipe, complete: bool) -> None:
    """What the main rank leaves in the run's folder: the plot and, of a complete run, the export."""
    from longtrain.evaluate.plot import LOSS_PLOT, plot_loss
    from longtrain.train.export import export_checkpoint
    from longtrain.train.resume import find_checkpoint
    from longtrain.train.tracking import METRICS_FILE, read_metrics

    folder = Path(recipe.run_folder)
    rows = read_metrics(folder / METRICS_FILE)
    if rows:
        plot_loss(rows, recipe.name, folder / LOSS_PLOT)
        _say(f"plot: {folder / LOSS_PLOT}")
    if not complete:
        return
    checkpoint, out = find_checkpoint(folder), folder / EXPORT_FOLDER
    if out.exists() and not _newer(out, checkpoint):
        # of an earlier, shorter run: kept, because people work in it
        out = folder / f"{EXPORT_FOLDER}-{checkpoint.name}"
    if not out.exists():
        _say(f"Hugging Face checkpoint: {export_checkpoint(folder, out)}")


def _newer(export: Path, checkpoint: Path) -> bool:
    return export.stat().st_mtime >= checkpoint.stat().st_mtime


def _report(folder: Path) -> None:
    from longtrain.evaluate.plot import LOSS_PLOT
    from longtrain.evaluate.report import summary
    from longtrain.train.checkpoint import find_latest
    from longtrain.train.resume import CHECKPOINTS
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
    ids = [trained.tokenizer.bos, *trained.tokenizer.encode(prompt)]
    ids = generate(trained.model, ids, tokens, temperature=temperature, seed=0, end=trained.tokenizer.eos)
    Console().print("\nsample:", style="bold")
    _say(trained.tokenizer.decode(ids))
    Console().print("\nto go on:", style="bold")
    _say(_next_command(folder, trained))


def _next_command(folder: Path, trained: Trained) -> str:
    from longtrain.train.run import RECIPE_FILE

    torchrun = Path(sys.executable).with_name("torchrun")
    inside = torchrun.exists() and torchrun.is_relative_to(Path.cwd())
    command = str(torchrun.relative_to(Path.cwd())) if inside else "torchrun"
    words = [command, "--nproc-per-node", str(trained.world), "scripts/train.py", "--recipe", str(folder / RECIPE_FILE)]
    if trained.step >= load_recipe(folder / RECIPE_FILE).training.steps:
        words += ["--set", f"training.steps={2 * trained.step}"]
    return shlex.join(words)


def _say_interrupted(folder: Path) -> None:
    from longtrain.train.checkpoint import find_latest
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
