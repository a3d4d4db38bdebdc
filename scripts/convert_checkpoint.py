"""Checkpoints to and from Hugging Face, without a GPU.

A folder of safetensors needs no conversion: `model.init` reads it as it is. `python scripts/convert_checkpoint.py FOLDER --out NEW`
writes one from a folder of pickled weights (pytorch_model.bin), or, as `longtrain export` does, from a run or one checkpoint of it.
"""

from pathlib import Path
from typing import Annotated

import typer

from longtrain.errors import LongtrainError


def convert(
    source: Annotated[Path, typer.Argument(help="A Hugging Face folder of pickled weights, or a run's or checkpoint's folder.")],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="The Hugging Face folder to write; it must not exist.")],
    data: Annotated[Path | None, typer.Option(metavar="FOLDER", help="The prepared data of a run, if it moved.")] = None,
) -> None:
    """Writes a Hugging Face folder of safetensors."""
    try:
        if (source / "config.json").is_file():
            from longtrain.models.convert import to_safetensors

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
