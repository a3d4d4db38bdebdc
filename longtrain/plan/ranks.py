"""How the ranks share out sequences: data parallelism times context parallelism."""

from __future__ import annotations

from longtrain.errors import PlanError
from longtrain.recipe.schema import Activations, Recipe


def share(recipe: Recipe, world: int, host: int) -> tuple[int, int]:
    """(dp, cp) for `world` ranks, `host` of them on each machine. Raises PlanError where the recipe does not go with them."""
    dp, cp = recipe.parallel.dp, recipe.parallel.cp
    if cp == "auto":
        cp = _fewest(recipe, world, host)
    if dp == "auto":
        if world % cp:
            raise PlanError(
                f"parallel.cp: the number of ranks, {world}, is not a multiple of cp {cp}; start a multiple of {cp} "
                f"(torchrun --nproc-per-node {-(-world // cp) * cp}) or change parallel.cp"
            )
        return world // cp, cp
    if dp * cp != world:
        raise PlanError(
            f"parallel.dp: dp {dp} x cp {cp} needs {dp * cp} ranks, there are {world}; start torchrun --nproc-per-node {dp * cp}, "
            "or set parallel.dp to auto"
        )
    return dp, cp


def crowded(recipe: Recipe, cp: int) -> bool:
    """Whether a rank holds more tokens than the recipe wants, because there are too few ranks."""
    return recipe.parallel.cp == "auto" and _held(recipe) > recipe.parallel.tokens_per_rank * cp


def _held(recipe: Recipe) -> int:
    return recipe.training.micro_batch_size * recipe.training.sequence_length


def _fewest(recipe: Recipe, world: int, host: int) -> int:
    """What `cp: auto` stands for: the smallest that keeps to tokens_per_rank, or else the largest, of those that divide the ranks,
    split the batch and keep rings inside hosts.

    The network between hosts is slow: rings fill several only where those of one cannot hold a sequence, or the recipe's dp or
    ulysses leaves no other way.
    """
    parallel, training = recipe.parallel, recipe.training
    most = 1 if training.activations is Activations.MINIMAL else world
    found = [
        cp
        for cp in range(parallel.ulysses, most + 1, parallel.ulysses)
        if world % cp == 0
        and parallel.dp in ("auto", world // cp)
        and training.batch_size % (world // cp * training.micro_batch_size) == 0
    ]
    if not found:
        raise PlanError(_no_cp(recipe, world))
    wide = _held(recipe) > parallel.tokens_per_rank * host or parallel.dp != "auto" or host % parallel.ulysses != 0
    usable = [cp for cp in found if host % cp == 0 or (wide and cp % host == 0)]
    if not usable:
        raise PlanError(_over_the_network(recipe, world, host))
    return next((cp for cp in usable if _held(recipe) <= parallel.tokens_per_rank * cp), usable[-1])


def _no_cp(recipe: Recipe, world: int) -> str:
    """Why `cp: auto` has nothing to stand for, and what to do."""
    parallel, training = recipe.parallel, recipe.training
    if parallel.dp != "auto":
        least = parallel.dp * parallel.ulysses
        sharing = f" x parallel.ulysses {parallel.ulysses}" if parallel.ulysses > 1 else ""
        wanted, enough = f"a multiple of {_ranks(least)}", -(-world // least) * least
        if training.activations is Activations.MINIMAL:
            wanted, enough = f"{_ranks(least)} with training.activations minimal", least
        return (
            f"parallel.dp: dp {parallel.dp}{sharing} needs {wanted}, there {'is' if world == 1 else 'are'} {world}; start torchrun "
            f"--nproc-per-node {enough}, or set parallel.dp to auto"
        )
    return (
        f"parallel.cp: auto finds none for {_ranks(world)}: it must divide them{_more(recipe)}, and the dp that it leaves times "
        f"training.micro_batch_size {training.micro_batch_size} must divide training.batch_size {training.batch_size}; change "
        "the number of ranks or one of these"
    )


def _ranks(number: int) -> str:
    return f"{number} rank{'s' if number != 1 else ''}"


def _over_the_network(recipe: Recipe, world: int, host: int) -> str:
    """Why rings would reach over hosts of `host` ranks without need, and what to do."""
    parallel, training = recipe.parallel, recipe.training
    if parallel.dp != "auto":
        return (
            f"parallel.dp: dp {parallel.dp} leaves rings of {world // parallel.dp} ranks, which do not stay inside hosts of "
            f"{host}; set parallel.dp to auto, or parallel.cp itself"
        )
    refused = f"parallel.cp: auto finds none for {_ranks(world)} that keeps rings inside hosts of {host}"
    inside = [cp for cp in range(parallel.ulysses, host + 1, parallel.ulysses) if host % cp == 0]
    cp = next((cp for cp in inside if _held(recipe) <= parallel.tokens_per_rank * cp), host)
    share = world // cp * training.micro_batch_size
    below = training.batch_size // share * share
    return (
        f"{refused}: with cp {cp}, training.batch_size {training.batch_size} is not a multiple of dp {world // cp} x "
        f"training.micro_batch_size {training.micro_batch_size}; set training.batch_size to {f'{below} or ' if below else ''}"
        f"{below + share}, or parallel.cp to {world} for one ring over the network"
    )


def _more(recipe: Recipe) -> str:
    parallel = recipe.parallel
    terms = [
        f"be a multiple of parallel.ulysses {parallel.ulysses}" if parallel.ulysses > 1 else "",
        "be 1 with training.activations minimal" if recipe.training.activations is Activations.MINIMAL else "",
    ]
    return "".join(f", {term}" for term in terms if term)
