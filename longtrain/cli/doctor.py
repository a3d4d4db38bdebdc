"""`longtrain doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from longtrain.cli.refusals import refusals


def doctor(
    folder: Annotated[
        Path, typer.Option("--folder", metavar="FOLDER", help="Where runs are to be written: its disk is looked at.")
    ] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")] = False,
) -> None:
    """Says what is wrong with this machine. Exit code 0: nothing, 1: warnings, 2: training cannot work here."""
    with refusals():
        from longtrain.doctor.report import examine

        text, code = examine(folder, as_json)
        print(text)
    raise typer.Exit(code)
