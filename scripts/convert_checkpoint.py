"""Checkpoints to and from Hugging Face, without a GPU.

A folder of safetensors needs no conversion: `model.init` reads it as it is. `python scripts/convert_checkpoint.py FOLDER --out NEW`
writes one from a folder of pickled weights (pytorch_model.bin), from what DeepSpeed's save_checkpoint wrote, or, as
`longtrain export` does, from a run or one checkpoint of it.
"""

from pathlib import Path
from typing import Annotated

import typer

from longtrain.errors import CheckpointError, LongtrainError


def convert(
    source: Annotated[
        Path, typer.Argument(help="A Hugging Face folder of pickled weights, one of DeepSpeed's, a run's or a checkpoint's.")
    ],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="The Hugging Face folder to write; it must not exist.")],
    config: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="The Hugging Face folder of the model, where DeepSpeed's has no config.json."),
    ] = None,
    data: Annotated[Path | None, typer.Option(metavar="FOLDER", help="The prepared data of a run, if it moved.")] = None,
) -> None:
    """Writes a Hugging Face folder of safetensors."""
    try:
        from longtrain.models.convert import from_deepspeed, to_safetensors
        from longtrain.models.deepspeed_folder import is_deepspeed

        if is_deepspeed(source):
            from_deepspeed(source, out, config)
        elif config is not None:
            raise CheckpointError(f"--config goes with a folder that DeepSpeed wrote, and {source} is none; leave it out")
        elif (source / "config.json").is_file():
            to_safetensors(source, out)
        else:
            from longtrain.train.export import export_checkpoint

            export_checkpoint(source, out, data=data)
    except LongtrainError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    typer.echo(f"wrote {out}")


if __name__ == "__main__":
    typer.run(convert)
