"""`longtrain report`."""

from __future__ import annotations

import math
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from longtrain.cli.options import DataOption
from longtrain.cli.refusals import refusals
from longtrain.cli.terminal import say, say_lines, warn
from longtrain.errors import CheckpointError, DataError, PlanError
from longtrain.recipe.load import load_recipe

if TYPE_CHECKING:
    from longtrain.train.export import Trained


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run's folder, e.g. runs/quickstart.")],
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="Text that the sample continues.")] = "def ",
    tokens: Annotated[int, typer.Option(min=0, metavar="N", help="Length of the sample; 0: none.")] = 96,
    temperature: Annotated[
        float, typer.Option(min=0, metavar="T", help="How freely the sample is drawn; 0 takes the most likely token.")
    ] = 0.6,
    data: DataOption = None,
) -> None:
    """Sums up a run. Losses, speed, plot, a sample of generated text, and the command that goes on."""
    with refusals():
        if math.isnan(temperature):
            raise PlanError("--temperature nan: give a number of at least 0")
        _report(run)
        trained = _trained(run, data) if tokens else None
        if trained is None:
            _say_newest(run)
        else:
            say_lines([("checkpoint", str(trained.checkpoint))])
            _sample(run, trained, prompt, tokens, temperature)


def _report(folder: Path) -> None:
    from longtrain.evaluate.plot import LOSS_PLOT
    from longtrain.evaluate.report import summary
    from longtrain.train.run_folder import EXPORT_FOLDER
    from longtrain.train.tracking import METRICS_FILE, read_metrics

    rows = read_metrics(folder / METRICS_FILE)
    if not rows:
        raise CheckpointError(f"{folder / METRICS_FILE}: no reports there; name the folder of a run that has trained")
    lines = summary(rows)
    exports = sorted(folder.glob(f"{EXPORT_FOLDER}*"), key=lambda path: path.stat().st_mtime)
    found = [("plot", folder / LOSS_PLOT), ("Hugging Face", (exports or [None])[-1])]
    lines += [(what, str(path)) for what, path in found if path is not None and path.exists()]
    say_lines(lines)


def _trained(folder: Path, data: Path | None) -> Trained | None:
    """The newest sound checkpoint; where it or its tokenizer is gone, the reason is said instead: the report stands."""
    from longtrain.train.export import load_trained

    try:
        return load_trained(folder, data=data, warn=warn)
    except (CheckpointError, DataError) as error:
        say(f"no sample: {error}")
        return None


def _say_newest(folder: Path) -> None:
    """The newest checkpoint, of which no more is known than its name: reading what is in it takes a while."""
    from longtrain.train.checkpoint_folder import find_latest
    from longtrain.train.resume import CHECKPOINTS

    newest = find_latest(folder / CHECKPOINTS)
    if newest is not None:
        say_lines([("checkpoint", f"{newest}, the newest; `longtrain checkpoint ls {folder} --verify` says which are sound")])


def _sample(folder: Path, trained: Trained, prompt: str, tokens: int, temperature: float) -> None:
    """The sample and the next command."""
    from longtrain.evaluate.generate import generate

    bos, eos = trained.tokenizer.bos, trained.tokenizer.eos
    # where documents begin with their text, an empty prompt goes on after the end of one
    ids = [*([] if bos is None else [bos]), *trained.tokenizer.encode(prompt)] or [eos]
    ids = generate(trained.model, ids, tokens, temperature=temperature, seed=0, end=eos)
    Console().print("\nsample:", style="bold")
    say(trained.tokenizer.decode(ids))
    Console().print("\nto go on:", style="bold")
    say(_next_command(folder, trained))


def _next_command(folder: Path, trained: Trained) -> str:
    from longtrain.train.run_folder import RECIPE_FILE

    torchrun = Path(sys.executable).with_name("torchrun")
    inside = torchrun.exists() and torchrun.is_relative_to(Path.cwd())
    command = str(torchrun.relative_to(Path.cwd())) if inside else "torchrun"
    words = [command, "--nproc-per-node", str(trained.world), "scripts/train.py", "--recipe", str(folder / RECIPE_FILE)]
    recipe = load_recipe(folder / RECIPE_FILE)
    if Path(recipe.run_folder).resolve() != folder.resolve():  # it was moved
        words += ["--set", f"output={folder}"]
    if trained.step >= recipe.training.steps:
        words += ["--set", f"training.steps={2 * trained.step}"]
    return shlex.join(words)
