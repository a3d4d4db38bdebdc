"""Arguments in, exit codes out. Refusals are one message and exit code 2."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from longtrain.errors import LongtrainError
from longtrain.recipe.load import builtin_recipes, load_recipe
from longtrain.recipe.schema import Recipe

app = typer.Typer(
    help="Trains decoders at long context.", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)

RecipeOption = Annotated[str, typer.Option("--recipe", help="A built-in recipe's name, or the path of a YAML file.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Overrides one key, e.g. optimizer.lr=1e-4.")
]
RunArgument = Annotated[Path, typer.Argument(help="The run's folder, e.g. runs/quickstart.")]

EXPORT_FOLDER = "huggingface"
RECIPE_FILE = "recipe.yaml"


@app.command()
def train(
    recipe: RecipeOption,
    overrides: SetOption = None,
    resume: Annotated[
        str,
        typer.Option(help="auto: from the newest checkpoint of the run, if any; never: from the start; or a checkpoint's folder."),
    ] = "auto",
    until: Annotated[int | None, typer.Option(min=1, help="Stop, with a checkpoint, when this many steps are done.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop. Needs no GPU and no data.")] = False,
    ranks: Annotated[int | None, typer.Option(min=1, help="Number of ranks to plan for, with --dry-run.")] = None,
) -> None:
    """Trains from a recipe. Start several ranks with torchrun."""
    with _refusals():
        chosen = load_recipe(recipe, overrides or [])
        if dry_run:
            _dry_run(chosen, ranks)
        elif ranks is not None:
            raise LongtrainError(f"--ranks goes with --dry-run; to train on {ranks} ranks start torchrun --nproc-per-node {ranks}")
        else:
            _train(chosen, resume, until)


@app.command()
def recipes() -> None:
    """Lists the built-in recipes."""
    with _refusals():
        table = Table("recipe", "sequence", "ranks at least", "what it is", box=None, header_style="bold")
        for name, path in sorted(builtin_recipes().items()):
            from longtrain.plan.plan import smallest_world

            recipe = load_recipe(name)
            remark = path.read_text().splitlines()[0].lstrip("# ")
            table.add_row(name, f"{recipe.training.sequence_length:,}", str(smallest_world(recipe)), remark)
        Console().print(table)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="The run's folder, or one checkpoint's.")],
    out: Annotated[Path, typer.Option(help="The Hugging Face folder to write; it must not exist.")],
    dtype: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16; by default what the run trained in.")] = None,
) -> None:
    """Writes a checkpoint as a Hugging Face folder. Needs no GPU."""
    with _refusals():
        from longtrain.train.export import export_checkpoint

        _say(f"wrote {export_checkpoint(run, out, dtype)}")


@app.command()
def report(
    run: RunArgument,
    prompt: Annotated[str, typer.Option(help="Text that the sample continues.")] = "def ",
    tokens: Annotated[int, typer.Option(min=1, help="Length of the sample.")] = 96,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the most likely token.")] = 0.6,
) -> None:
    """Sums up a run: losses, speed, plot, a sample of generated text."""
    with _refusals():
        _report(run, prompt, tokens, temperature)


def main() -> None:
    """The `longtrain` command."""
    app()


def train_main() -> None:
    """scripts/train.py: the `train` command alone."""
    typer.run(train)


def _dry_run(recipe: Recipe, ranks: int | None) -> None:
    from longtrain.parallel.launch import Launch
    from longtrain.plan import make_plan
    from longtrain.plan.describe import describe
    from longtrain.plan.plan import smallest_world

    launch = Launch.read()
    if launch.rank:
        return
    world = ranks or (launch.world if launch.torchrun else smallest_world(recipe))
    plan = make_plan(recipe, world, _planned_device(recipe))
    for what, value in describe(plan):
        _say(f"{what:16} {value}")


def _planned_device(recipe: Recipe) -> str:
    """The device a dry run plans for: what the recipe names, else what is here."""
    import torch

    if recipe.device != "auto":
        return recipe.device.value
    return "cuda" if torch.cuda.is_available() else "cpu"


def _train(recipe: Recipe, resume: str, until: int | None) -> None:
    from longtrain.data.loader import held_out
    from longtrain.evaluate.held_out import held_out_loss
    from longtrain.parallel import launch
    from longtrain.plan import make_plan
    from longtrain.train.assemble import open_data
    from longtrain.train.resume import choose
    from longtrain.train.run import run_training

    started = launch.Launch.read()
    device = launch.resolve_device(recipe.device.value, started)
    plan = make_plan(recipe, started.world, device.type)
    split, unseen = open_data(plan)
    start = choose(recipe, split, resume)
    try:
        ctx = launch.start(started, dp=plan.dp, cp=plan.cp, device=device.type)
        evaluate = None
        if unseen is not None:
            rows = {"micro_batch_size": recipe.training.micro_batch_size, "dp": plan.dp, "dp_rank": ctx.dp_rank}
            batches = held_out(unseen, recipe.evaluation.sequences, **rows)
            evaluate = lambda run: held_out_loss(run.engine, run.plan, run.ctx, batches)  # noqa: E731
        progress = run_training(plan, ctx, split, start, until=until, evaluate=evaluate)
    finally:
        launch.stop()
    if started.rank == 0:
        _finish(recipe, complete=progress.step >= recipe.training.steps)


def _finish(recipe: Recipe, complete: bool) -> None:
    """What the main rank leaves in the run's folder: the plot and, of a complete run, the export."""
    from longtrain.evaluate.plot import LOSS_PLOT, plot_loss
    from longtrain.train.export import export_checkpoint
    from longtrain.train.tracking import METRICS_FILE, read_metrics

    folder = Path(recipe.run_folder)
    rows = read_metrics(folder / METRICS_FILE)
    if rows:
        plot_loss(rows, recipe.name, folder / LOSS_PLOT)
        _say(f"plot: {folder / LOSS_PLOT}")
    out = folder / EXPORT_FOLDER
    if complete and not out.exists():
        _say(f"Hugging Face checkpoint: {export_checkpoint(folder, out, None)}")


def _report(folder: Path, prompt: str, tokens: int, temperature: float) -> None:
    from longtrain.evaluate.generate import generate
    from longtrain.evaluate.plot import LOSS_PLOT
    from longtrain.evaluate.report import summary
    from longtrain.train.export import load_trained
    from longtrain.train.tracking import METRICS_FILE, read_metrics

    rows = read_metrics(folder / METRICS_FILE)
    if not rows:
        raise LongtrainError(f"{folder / METRICS_FILE}: no reports there; name the folder of a run that has trained")
    trained = load_trained(folder)
    table = Table(box=None, show_header=False)
    for what, value in summary(rows):
        table.add_row(what, value)
    shown = [("plot", folder / LOSS_PLOT), ("checkpoint", trained.checkpoint), ("Hugging Face", folder / EXPORT_FOLDER)]
    for what, path in shown:
        if path.exists():
            table.add_row(what, str(path))
    console = Console()
    console.print(table)
    prompt_ids = [trained.tokenizer.bos, *trained.tokenizer.encode(prompt)]
    ids = generate(trained.model, prompt_ids, tokens, temperature=temperature, seed=0, end=trained.tokenizer.eos)
    console.print("\nsample:", style="bold")
    _say(trained.tokenizer.decode(ids))
    recipe, more = folder / RECIPE_FILE, f"training.steps={2 * trained.recipe.training.steps}"
    console.print("\nto go on:", style="bold")
    _say(
        f"torchrun --nproc-per-node {trained.world} scripts/train.py --recipe {recipe} --set {more}"
    )


@contextmanager
def _refusals() -> Iterator[None]:
    """Turns a refusal into its message and exit code 2."""
    try:
        yield
    except LongtrainError as error:
        from longtrain.parallel.launch import Launch

        rank = Launch.read().rank
        if rank:
            time.sleep(3)  # where all ranks refuse alike, rank 0 has said it and torchrun ends this one meanwhile
        print(f"error: {error}" if rank == 0 else f"error on rank {rank}: {error}", file=sys.stderr, flush=True)
        raise typer.Exit(2) from None


def _say(text: str) -> None:
    Console().print(text, highlight=False, soft_wrap=True, markup=False)
