"""How ranks are shared out: `parallel.cp: auto`, hosts, and the ranks that a recipe is sized for."""

from __future__ import annotations

import re

import pytest

from longtrain.errors import PlanError
from longtrain.parallel.launch import Launch, check_rings
from longtrain.parallel.ulysses import refuses_heads as of_attention
from longtrain.plan import make_plan
from longtrain.recipe.load import builtin_recipes, load_recipe
from longtrain.recipe.parallel import refuses_heads as of_recipe
from longtrain.recipe.schema import Recipe
from tests.plan_cases import small, words


@pytest.mark.parametrize("name", [name for name in builtin_recipes() if name != "quickstart"])
@pytest.mark.parametrize("world", [1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 32])
def test_builtin_recipes_fit_any_number_of_gpus(name: str, world: int) -> None:
    """Of one host, and any power of two hosts of eight."""
    recipe = load_recipe(name)
    plan = make_plan(recipe, world, "cuda", min(world, 8) if world % 8 == 0 else None)
    assert plan.dp * plan.cp == world
    assert plan.dp * plan.accumulation * recipe.training.micro_batch_size == recipe.training.batch_size
    held, wanted = recipe.training.micro_batch_size * plan.local_length, recipe.parallel.tokens_per_rank
    crowded = "parallel.tokens_per_rank" in words(plan).get("warning", "")
    # a layout may pad a little
    assert crowded == (held > wanted + 2 * plan.cp * recipe.training.micro_batch_size)
    assert not crowded or plan.cp == world


@pytest.mark.parametrize(
    ("overrides", "world", "host", "cp"),
    [
        ([], 4, 4, 1),
        (["parallel.tokens_per_rank=16"], 4, 4, 4),
        (["parallel.tokens_per_rank=22"], 6, 6, 3),  # over two ranks 32 tokens
        (["parallel.tokens_per_rank=31"], 12, 6, 3),
        (["parallel.tokens_per_rank=20"], 12, 6, 6),  # four ranks do not divide a host of six
        (["parallel.tokens_per_rank=20"], 12, 12, 4),
        (["parallel.tokens_per_rank=8"], 16, 8, 8),
        (["parallel.tokens_per_rank=7"], 16, 8, 16),
        (["parallel.tokens_per_rank=32", "parallel.dp=2"], 8, 8, 4),
        (["parallel.tokens_per_rank=32", "parallel.ulysses=2"], 4, 4, 2),
        (["training.micro_batch_size=4"], 8, 8, 8),  # a batch of 12 is three forward passes, on one data-parallel group or on three
        (["training.activations=minimal", "parallel.tokens_per_rank=1"], 2, 2, 1),
    ],
)
def test_cp_auto_takes_the_fewest_ranks(overrides: list[str], world: int, host: int, cp: int) -> None:
    plan = make_plan(small("parallel.cp=auto", *overrides), world, "cpu", host)
    assert (plan.cp, plan.dp) == (cp, world // cp)
    assert words(make_plan(plan.recipe, world, "cpu", host))["ranks"] == words(plan)["ranks"]


@pytest.mark.parametrize(
    ("overrides", "world", "message"),
    [
        (["parallel.ulysses=2"], 3, "auto finds none for 3 ranks: it must divide them, be a multiple of parallel.ulysses 2, and"),
        (["parallel.ulysses=2"], 1, "auto finds none for 1 rank: it must divide them"),
        (
            ["parallel.dp=2"],
            3,
            "^parallel.dp: dp 2 needs a multiple of 2 ranks, there are 3; start torchrun --nproc-per-node 4, or",
        ),
        (["parallel.dp=2", "parallel.ulysses=2"], 1, "dp 2 x parallel.ulysses 2 needs a multiple of 4 ranks, there is 1; start"),
        (
            ["parallel.dp=2", "training.activations=minimal"],
            4,
            "needs 2 ranks with training.activations minimal, there are 4; start",
        ),
        (["training.activations=minimal"], 5, "be 1 with training.activations minimal"),
    ],
)
def test_cp_auto_refuses(overrides: list[str], world: int, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        make_plan(small("parallel.cp=auto", *overrides), world, "cpu")


SIX_HEADS = ["parallel.ulysses=3", "model.heads=6", "model.kv_heads=6"]
WHOLE_STEP = "training.micro_batch_size=12"


def chosen_or_advice(recipe: Recipe, world: int, host: int) -> int | str:
    try:
        return make_plan(recipe, world, "cpu", host).cp
    except PlanError as error:
        return str(error)


@pytest.mark.parametrize("overrides", [[], ["parallel.dp=2"], ["parallel.ulysses=2"], SIX_HEADS, [WHOLE_STEP]])
@pytest.mark.parametrize("tokens", [4, 8, 22, 64])
def test_rings_reach_over_hosts_only_where_they_must(overrides: list[str], tokens: int) -> None:
    recipe = small("parallel.cp=auto", f"parallel.tokens_per_rank={tokens}", *overrides)
    held = recipe.training.micro_batch_size * 64
    forced = recipe.parallel.dp != "auto"
    for host in (1, 2, 3, 4, 6, 8):
        for hosts in (1, 2, 3, 4):
            cp = chosen_or_advice(recipe, host * hosts, host)
            if isinstance(cp, str):
                assert re.search(r"set training.batch_size|set parallel.dp|auto finds none for \d+ ranks?: it must", cp)
                continue
            launch = Launch(rank=0, world=host * hosts, local_rank=0, local_world=host, torchrun=True)
            over = bool(check_rings(launch, cp))  # raises where it would refuse to start
            assert not over or forced or held > tokens * host or host % recipe.parallel.ulysses


@pytest.mark.parametrize(
    ("name", "world", "host", "message", "sizes"),
    [
        ("llama-7b-32k", 24, 8, r"with cp 2, training.batch_size 32 is not a multiple of dp 12 x .* to 24 or 36, or", (24, 36)),
        ("llama-7b-32k", 12, 4, r"dp 6 x training.micro_batch_size 1; set training.batch_size to 30 or 36, or", (30, 36)),
        ("llama-7b-128k", 24, 8, r"with cp 8, .* dp 3 x .* set training.batch_size to 6 or 9, or parallel.cp to 24 for", (6, 9)),
        ("llama-160m-4k", 192, 8, r"dp 192 x training.micro_batch_size 16; set training.batch_size to 3072, or", (3072,)),
    ],
)
def test_batches_that_would_force_rings_over_hosts_are_refused(
    name: str, world: int, host: int, message: str, sizes: tuple[int, ...]
) -> None:
    with pytest.raises(PlanError, match=rf"parallel.cp: auto finds none for {world} ranks .* inside hosts of {host}: .*{message}"):
        make_plan(load_recipe(name), world, "cpu", host)
    for size in sizes:
        assert host % make_plan(load_recipe(name, [f"training.batch_size={size}"]), world, "cpu", host).cp == 0
    assert make_plan(load_recipe(name, [f"parallel.cp={world}"]), world, "cpu", host).cp == world


def test_a_dp_that_would_force_rings_over_hosts_is_refused() -> None:
    with pytest.raises(PlanError, match=r"^parallel.dp: dp 2 leaves rings of 6 ranks, which do not stay inside hosts of 4; set"):
        make_plan(small("parallel.cp=auto", "parallel.dp=2"), 12, "cpu", 4)
    assert make_plan(small("parallel.cp=auto", "parallel.dp=3"), 12, "cpu", 4).cp == 4
    assert make_plan(small("parallel.cp=auto", "parallel.dp=1"), 12, "cpu", 4).cp == 12


def test_the_ranks_that_a_recipe_is_sized_for() -> None:
    assert small().meant_world == 1
    assert small("parallel.cp=3").meant_world == 3
    assert small("parallel.dp=4", "parallel.cp=3").meant_world == 12
    assert small("parallel.cp=auto").meant_world == 1
    assert small("parallel.cp=auto", "parallel.tokens_per_rank=20", "parallel.dp=2").meant_world == 8
    assert small("parallel.cp=auto", "parallel.tokens_per_rank=20", "parallel.ulysses=4").meant_world == 4
    assert small("parallel.cp=auto", "parallel.tokens_per_rank=12", "parallel.ulysses=4").meant_world == 8
    minimal = small("parallel.cp=auto", "parallel.tokens_per_rank=20", "parallel.dp=2", "training.activations=minimal")
    assert minimal.meant_world == 2
    made = make_plan(minimal, 2, "cpu")
    assert made.cp == 1
    assert words(made)["warning"].endswith("training.activations minimal allows no ring")
    for name in builtin_recipes():
        recipe = load_recipe(name)
        make_plan(recipe, recipe.meant_world, "cpu")


def test_which_heads_ranks_can_share_is_the_same_for_recipes_and_attention() -> None:
    for heads in range(1, 13):
        for kv_heads in range(1, heads + 1):
            for ranks in range(1, 13):
                assert of_recipe(heads, kv_heads, ranks) == of_attention(heads, kv_heads, ranks)
    assert of_recipe(None, None, 2) is None
