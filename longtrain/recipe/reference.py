"""The reference of all recipe fields, from the schema: `python -m longtrain.recipe.reference > docs/recipes.md` writes the page."""

from __future__ import annotations

from pydantic_core import PydanticUndefined

from longtrain.recipe.explain import FIELDS, dotted, expected, is_section

HEAD = """\
# Recipes

A recipe is a YAML file; `recipes/` holds the built-in ones. A key that does not stand here is refused, with the line and what was
probably meant. `--set section.key=value` overrides one key. Paths are relative to the current directory. This page is generated:
`python -m longtrain.recipe.reference > docs/recipes.md`.

`extends: NAME|PATH` at the top takes every key but `name` and `output` from one other recipe, a built-in one or a file; what stands
beside it replaces these, key by key. There is one parent only: a list is refused, and so is a parent that extends a recipe itself.
A recipe that names another `data.path` does not inherit `data.corpus`, since that is what the parent's path is prepared from. What
names another model does not inherit the shape of the parent's: another `model.preset` puts away every other key of `model` but
`init`, `dropout` and `attention_dropout`; `model.init`, where the parent has neither `preset` nor `init`, those that weights decide
(all but these and `rope_theta`, `rope_scaling`, `window`, `init_std`, `positions`). Another `model.init` also puts away
`data.tokenizer`. `--set` of these does the same to the recipe.
"""
TABLE = ["| key | value | default | meaning |", "|---|---|---|---|"]


def reference() -> str:
    """The page, as Markdown: a table a section, a row a field."""
    lines = [HEAD, *TABLE]
    for path, field in FIELDS.items():
        if is_section(path):
            lines += [f"\n## {dotted(path)}\n", f"{field.description}\n", *TABLE]
            continue
        default = "required" if field.default is PydanticUndefined else f"`{_yaml(field.default)}`"
        lines.append(f"| `{path[-1]}` | {expected(field.annotation)} | {default} | {field.description} |")
    return "\n".join(lines) + "\n"


def _yaml(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return str(list(value)) if isinstance(value, tuple) else str(value)


if __name__ == "__main__":
    print(reference(), end="")
