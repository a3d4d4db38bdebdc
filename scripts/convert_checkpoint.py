"""Checkpoints to and from Hugging Face, without a GPU.

A folder of safetensors needs no conversion: `model.init` reads it as it is. `python scripts/convert_checkpoint.py FOLDER --out NEW`
writes one from a folder of pickled weights (pytorch_model.bin), from what DeepSpeed's save_checkpoint wrote, or, as
`longtrain export` does, from a run or one checkpoint of it.
"""

from pathlib import Path
from typing import Annotated

import typer

from longtrain.cli.options import DataOption, NewFolderOption, group
from longtrain.cli.refusals import refusals
from longtrain.cli.terminal import outlive_readers, say, warn
from longtrain.errors import CheckpointError


def convert(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER", help="A Hugging Face folder of pickled weights, one of DeepSpeed's, a run's or a checkpoint's."
        ),
    ],
    out: NewFolderOption,
    config: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="The Hugging Face folder of the model, where DeepSpeed's has no config.json."),
    ] = None,
    data: DataOption = None,
) -> None:
    """Writes a Hugging Face folder of safetensors."""
    with refusals():
        from longtrain.models.convert import from_deepspeed, to_safetensors
        from longtrain.models.deepspeed_folder import is_deepspeed

        theirs, pickled = is_deepspeed(source), (source / "config.json").is_file()
        if config is not None and not theirs:
            raise CheckpointError(f"--config goes with a folder that DeepSpeed wrote, and {source} is none; leave it out")
        if data is not None and (theirs or pickled):
            raise CheckpointError(f"--data goes with a run or one checkpoint of it, and {source} is none; leave it out")
        came_from = ""
        if theirs:
            from_deepspeed(source, out, config)
        elif pickled:
            to_safetensors(source, out)
        else:
            from longtrain.train.export import export_checkpoint

            came_from = f" from {export_checkpoint(source, out, data=data, warn=warn)}"
        say(f"wrote {out}{came_from}")


if __name__ == "__main__":
    outlive_readers()
    app = group()
    app.command()(convert)
    app()
