"""`longtrain check-data`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from longtrain.cli.refusals import refusals
from longtrain.cli.terminal import say


def check_data(folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A prepared data folder.")]) -> None:
    """Checks prepared data. Reads every byte and compares it with what was written."""
    with refusals():
        from longtrain.data.packed import PackedSplit
        from longtrain.train.assemble import HELD_OUT, TRAIN

        for name in (TRAIN, HELD_OUT):
            split = PackedSplit(folder, name, 1)
            split.verify()
            say(f"{folder}: {name}: {split.documents:,} documents, {split.tokens:,} tokens: as they were written")
