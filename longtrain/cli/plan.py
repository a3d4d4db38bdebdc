"""`longtrain plan`, which is `longtrain train --dry-run`."""

from __future__ import annotations

from longtrain.cli.options import HostMemoryOption, RanksOption, RanksPerHostOption, RecipeArgument, SetOption
from longtrain.cli.refusals import located, refusals
from longtrain.cli.terminal import say, say_lines
from longtrain.errors import PlanError
from longtrain.recipe.load import load_written
from longtrain.recipe.schema import Device, Recipe

USUAL_HOST = 8
"""GPUs of a machine that has many."""


def plan(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    ranks: RanksOption = None,
    ranks_per_host: RanksPerHostOption = None,
    host_memory: HostMemoryOption = None,
) -> None:
    """Prints what a recipe comes to. Ranks, shapes, memory, checkpoints, kernels and why; needs no GPU and no data. --set
    device=cuda plans for GPUs. `train --dry-run` is the same."""
    with refusals():
        chosen, written = load_written(recipe, overrides or [])
        with located(written):
            say_plan(chosen, ranks, ranks_per_host, host_memory)


def say_plan(recipe: Recipe, ranks: int | None, ranks_per_host: int | None, host_memory: float | None) -> None:
    """ranks, ranks_per_host: None for those of torchrun, or else those that the recipe is sized for, on hosts of USUAL_HOST or all
    on one. host_memory: of each machine, in GiB; None for this one's. Raises what training would: PlanError, KernelError,
    LaunchError."""
    import torch

    from longtrain.parallel.launch import Launch, check_rings
    from longtrain.plan import make_plan
    from longtrain.plan.describe import describe

    launch = Launch.read()
    here = "cuda" if torch.cuda.is_available() else "cpu"
    device = here if recipe.device is Device.AUTO else recipe.device.value
    started = launch.torchrun and ranks is None
    world = launch.world if started else ranks or recipe.meant_world
    host = ranks_per_host or (launch.local_world if started else USUAL_HOST if world % USUAL_HOST == 0 else world)
    if world % host:
        raise PlanError(f"--ranks-per-host {host}: {world} ranks do not fill machines of {host}; give a divisor of {world}")
    made = make_plan(recipe, world, device, host)
    remarks = check_rings(Launch(world=world, local_world=host), made.cp)
    if launch.rank:
        return
    say_lines(describe(made, None if host_memory is None else int(host_memory * 2**30)))
    say_lines(("warning", remark.removeprefix("warning: ")) for remark in remarks)
    if recipe.device is Device.AUTO and here == "cpu":
        say("\nplanned for cpu, as this machine has no GPU; --set device=cuda plans for GPUs")
