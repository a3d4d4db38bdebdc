"""Options that several commands have, and how a group of commands looks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_RECIPE = "A built-in recipe's name, or the path of a YAML file."

RecipeOption = Annotated[str, typer.Option("--recipe", metavar="NAME|PATH", help=_RECIPE)]
RecipeArgument = Annotated[str, typer.Argument(metavar="NAME|PATH", help=_RECIPE)]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Overrides one key, e.g. optimizer.lr=1e-4; repeatable.")
]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="The run's folder, or one checkpoint's.")]
RanksOption = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Number of ranks to plan for; by default those that the recipe is sized for."),
]
RanksPerHostOption = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="How many of the planned ranks each machine has; by default 8 where that divides them."),
]
HostMemoryOption = Annotated[
    float | None, typer.Option(min=0, metavar="GIB", help="Memory of each machine to plan for; by default of this one.")
]
NewFolderOption = Annotated[
    Path, typer.Option("--out", metavar="FOLDER", help="The Hugging Face folder to write; it must not exist.")
]
DataOption = Annotated[
    Path | None,
    typer.Option("--data", metavar="FOLDER", help="Prepared data with the run's tokenizer; by default what the run read."),
]


def group(help_text: str | None = None, *, bare: bool = False) -> typer.Typer:
    """Commands under one name. bare: the name alone is a command too, else it prints the help."""
    # plain help: boxes do not survive a pipe, and rich would take [default: 2] for a style
    return typer.Typer(
        help=help_text,
        no_args_is_help=not bare,
        invoke_without_command=bare,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )
