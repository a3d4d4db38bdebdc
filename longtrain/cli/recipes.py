"""`longtrain recipes`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from longtrain.cli.options import RecipeArgument, SetOption, group
from longtrain.cli.refusals import refusals
from longtrain.cli.terminal import say, table_console
from longtrain.errors import RecipeError
from longtrain.recipe import tree
from longtrain.recipe.load import builtin_recipes, dump_recipe, load_recipe
from longtrain.recipe.schema import Recipe

recipes = group("Lists, prints and checks recipes. Without a command it lists the built-in ones.", bare=True)


@recipes.callback()
def list_by_default(context: typer.Context) -> None:
    """Lists, prints and checks recipes. Without a command it lists the built-in ones."""
    if context.invoked_subcommand is None:
        list_recipes()


@recipes.command("ls")
def list_recipes() -> None:
    """Lists the built-in recipes. With the ranks that share each sequence; where parallel.cp is auto, it runs on fewer too."""
    with refusals():
        table = Table("recipe", "sequence", "ranks a sequence", "what it is", box=None, header_style="bold", pad_edge=False)
        for name, path in builtin_recipes().items():
            recipe = load_recipe(name)
            remark = path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
            table.add_row(name, f"{recipe.training.sequence_length:,}", str(recipe.meant_world), remark)
        table_console().print(table)


@recipes.command("show")
def show_recipe(recipe: RecipeArgument, overrides: SetOption = None) -> None:
    """Prints a recipe as training would read it. With what it extends, overrides and every default; a recipe in itself.
    Of a model that begins with the weights of model.init no defaults: what it does not say, they do."""
    with refusals():
        say(_shown(load_recipe(recipe, overrides or [])).rstrip("\n"))


def _shown(recipe: Recipe) -> str:
    """`dump_recipe`; beside model.init, a default would be taken for a choice, and compared with the weights."""
    if recipe.model.init is None:
        return dump_recipe(recipe)
    chosen = recipe.model.model_dump(mode="json", exclude_unset=True)
    return tree.dump(recipe.model_dump(mode="json") | {"model": chosen})


@recipes.command("check")
def check_recipes(
    recipes: Annotated[list[str], typer.Argument(metavar="NAME|PATH", help="Built-in recipes' names, or paths of YAML files.")],
    overrides: SetOption = None,
) -> None:
    """Reads recipes and says what is wrong with each. Exit code 2 where one is refused. Weights and data are not looked at:
    `longtrain plan` does that, and says what one comes to."""
    with refusals():
        problems: list[str] = []
        for name in recipes:
            try:
                load_recipe(name, overrides or [])
            except RecipeError as error:
                problems.append(str(error))
            else:
                say(f"{name}: sound")
        if problems:
            raise RecipeError("\n".join(problems))
