"""`longtrain checkpoint` and `longtrain export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from longtrain.cli.options import DataOption, NewFolderOption, RunArgument, group
from longtrain.cli.refusals import refusals
from longtrain.cli.terminal import say, table_console, warn
from longtrain.errors import CheckpointError
from longtrain.recipe.schema import Precision

checkpoints = group("Lists, checks, exports, imports and prunes checkpoints.")


@checkpoints.command()
def export(
    run: RunArgument,
    out: NewFolderOption,
    dtype: Annotated[
        Precision | None, typer.Option(help="Number format of the weights; by default what the run trained in.")
    ] = None,
    data: DataOption = None,
) -> None:
    """Writes a checkpoint as a Hugging Face folder. Of a run the newest sound one; damaged ones are passed over, and named. Needs
    no GPU."""
    with refusals():
        from longtrain.train.export import export_checkpoint

        checkpoint = export_checkpoint(run, out, dtype, data=data, warn=warn)
        say(f"wrote {out} from {checkpoint}")


@checkpoints.command("import")
def import_deepspeed(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="What DeepSpeed's save_checkpoint wrote, or one step of it.")],
    out: NewFolderOption,
    config: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="The Hugging Face folder of the model, where DeepSpeed's has no config.json."),
    ] = None,
) -> None:
    """Takes the weights of DeepSpeed's checkpoint. Writes its fp32 master weights as a Hugging Face folder, for model.init.
    Executes nothing of it."""
    with refusals():
        from longtrain.models.convert import from_deepspeed
        from longtrain.train.checkpoint_commands import is_ours

        if is_ours(folder):
            raise CheckpointError(
                f"{folder}: is longtrain's own, which training goes on from as it is (--resume); for a Hugging Face folder of it: "
                f"longtrain export {folder} --out {out}"
            )
        say(f"wrote {from_deepspeed(folder, out, config)}")


@checkpoints.command("ls")
def list_checkpoints(
    run: RunArgument,
    check: Annotated[bool, typer.Option("--verify", help="Read every byte; else only torn files are found.")] = False,
) -> None:
    """Lists the checkpoints of a run. Step, tokens, loss, size, ranks, and whether they are sound; exit code 2 where one is
    damaged, cannot be read or is of another version, and the files are named."""
    with refusals():
        from longtrain.train.checkpoint_commands import aside, examine_all, refuse_unsound, table

        entries = examine_all(run, content=check)
        table_console().print(table(entries, verified=check))
        if remark := aside(run):
            say(remark)
        refuse_unsound(entries)


@checkpoints.command("verify")
def verify_checkpoints(run: RunArgument) -> None:
    """Reads every byte of a checkpoint. Or of all of a run; exit code 2 where one is damaged, cannot be read or is of another
    version, and the files are named."""
    with refusals():
        from longtrain.train.checkpoint_commands import Entry, examine, find, refuse_unsound

        entries: list[Entry] = []
        for path in find(run):
            entry = examine(path, content=True)
            if entry is None:
                say(f"{path}: deleted meanwhile")
                continue
            say(f"{path}: {entry.state('verified')}")
            entries.append(entry)
        refuse_unsound(entries)


@checkpoints.command("prune")
def prune_checkpoints(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run's folder.")],
    keep: Annotated[int, typer.Option(min=1, metavar="N", help="Number of newest sound checkpoints to keep.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be deleted.")] = False,
) -> None:
    """Deletes all but the newest checkpoints, and what was set aside. Those of which every byte is right count; the only good one
    always stays, and so does a newer one that cannot be read or is of another version."""
    with refusals():
        from longtrain.train.checkpoint_commands import prune

        for path, goes, reason in prune(run, keep, dry_run=dry_run):
            say(f"{'left' if not goes else 'would delete' if dry_run else 'deleted'} {path} ({reason})")
