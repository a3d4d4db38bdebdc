"""`longtrain plan`, which is `longtrain train --dry-run`."""

from __future__ import annotations

from typing import Annotated

import typer

from longtrain.cli.options import RecipeArgument, SetOption
from longtrain.cli.refusals import refusals
from longtrain.cli.terminal import say, say_lines
from longtrain.recipe.load import load_recipe
from longtrain.recipe.schema import Device, Recipe


def plan(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    ranks: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Number of ranks; by default the fewest that the recipe can have.")
    ] = None,
    host_memory: Annotated[
        float | None, typer.Option(min=0, metavar="GIB", help="Memory of each machine; by default of this one.")
    ] = None,
) -> None:
    """Prints what a recipe comes to. Ranks, shapes, memory, checkpoints, kernels and why; needs no GPU and no data. --set
    device=cuda plans for GPUs. `train --dry-run` is the same."""
    with refusals():
        say_plan(load_recipe(recipe, overrides or []), ranks, host_memory)


def say_plan(recipe: Recipe, ranks: int | None, host_memory: float | None) -> None:
    """ranks: None for those of torchrun, or else the fewest. host_memory: of each machine, in GiB; None for this one's."""
    import torch

    from longtrain.parallel.launch import Launch
    from longtrain.plan import make_plan
    from longtrain.plan.describe import describe

    launch = Launch.read()
    here = "cuda" if torch.cuda.is_available() else "cpu"
    device = here if recipe.device is Device.AUTO else recipe.device.value
    host = launch.local_world if ranks is None and launch.torchrun else None
    made = make_plan(recipe, ranks or (launch.world if launch.torchrun else recipe.smallest_world), device, host)
    if launch.rank:
        return
    say_lines(describe(made, None if host_memory is None else int(host_memory * 2**30)))
    if recipe.device is Device.AUTO and here == "cpu":
        say("\nplanned for cpu, as this machine has no GPU; --set device=cuda plans for GPUs")
