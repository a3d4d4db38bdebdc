"""`longtrain checkpoint` and `longtrain export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from longtrain.cli.options import DataOption, group
from longtrain.cli.refusals import refusals
from longtrain.cli.terminal import say, table_console
from longtrain.errors import CheckpointError
from longtrain.recipe.schema import Precision

checkpoints = group("Lists, checks, exports, imports and prunes checkpoints.")


@checkpoints.command()
def export(
    run: Annotated[Path, typer.Argument(help="The run's folder, or one checkpoint's.")],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="The Hugging Face folder to write; it must not exist.")],
    dtype: Annotated[
        Precision | None, typer.Option(help="Number format of the weights; by default what the run trained in.")
    ] = None,
    data: DataOption = None,
) -> None:
    """Writes a checkpoint as a Hugging Face folder. Needs no GPU."""
    with refusals():
        from longtrain.train.export import export_checkpoint

        say(f"wrote {export_checkpoint(run, out, dtype, data=data)}")


@checkpoints.command("import")
def import_deepspeed(
    folder: Annotated[Path, typer.Argument(help="What DeepSpeed's save_checkpoint wrote, or one step of it.")],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="The Hugging Face folder to write; it must not exist.")],
    config: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="The Hugging Face folder of the model, where that has no config.json.")
    ] = None,
) -> None:
    """Writes the fp32 weights of a checkpoint of DeepSpeed's as a Hugging Face folder, for model.init. Executes nothing of it."""
    with refusals():
        from longtrain.models.convert import from_deepspeed

        say(f"wrote {from_deepspeed(folder, out, config)}")


@checkpoints.command("ls")
def list_checkpoints(
    run: Annotated[Path, typer.Argument(help="The run's folder, or one checkpoint's.")],
    check: Annotated[bool, typer.Option("--verify", help="Read every byte; else only torn files are found.")] = False,
) -> None:
    """Lists the checkpoints of a run: step, tokens, loss, size, ranks, and whether they are sound."""
    with refusals():
        from longtrain.train.checkpoint_commands import examine, find, table

        entries = [examine(path, content=check) for path in find(run)]
        table_console().print(table(entries, verified=check))
        for reason in (reason for entry in entries for reason in entry.damage):
            say(reason)


@checkpoints.command("verify")
def verify_checkpoints(run: Annotated[Path, typer.Argument(help="The run's folder, or one checkpoint's.")]) -> None:
    """Reads every byte of a checkpoint, or of all of a run. Exit code 2 where one is damaged; the files are named."""
    with refusals():
        from longtrain.train.checkpoint_commands import examine, find

        problems: list[str] = []
        for path in find(run):
            found = examine(path, content=True).damage
            say(f"{path}: {'DAMAGED' if found else 'verified'}")
            problems += found
        if problems:
            raise CheckpointError("\n".join(problems))


@checkpoints.command("prune")
def prune_checkpoints(
    run: Annotated[Path, typer.Argument(help="The run's folder.")],
    keep: Annotated[int, typer.Option(min=1, metavar="N", help="Number of newest verified checkpoints to keep.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be deleted.")] = False,
) -> None:
    """Deletes all but the newest verified checkpoints of a run; never the only good one."""
    with refusals():
        from longtrain.train.checkpoint_commands import prune

        for path, reason in prune(run, keep, dry_run=dry_run):
            say(f"{'would delete' if dry_run else 'deleted'} {path} ({reason})")
