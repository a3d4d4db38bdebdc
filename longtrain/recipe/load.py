"""Recipes in and out: a YAML file and `--set` overrides to a frozen Recipe, and back to text."""

import hashlib
import json
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

import yaml
from pydantic import ValidationError

from longtrain.errors import RecipeError
from longtrain.recipe import tree
from longtrain.recipe.explain import FIELDS, dotted, expected, explain, is_section, meant
from longtrain.recipe.schema import Recipe

MAX_BYTES = 1024 * 1024
_SUFFIXES = (".yaml", ".yml")


def recipes_folder() -> Path:
    """Folder of the built-in recipes: `longtrain/recipes` of an installed package, `recipes` of a checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


def builtin_recipes() -> dict[str, Path]:
    """The built-in recipes by name, sorted."""
    return {path.stem: path for path in sorted(recipes_folder().glob("*.yaml"))}


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe and checks all that can be judged from the recipe alone.

    Args:
        name_or_path: name of a built-in recipe, or the path of a file (a Path, or text with a separator or a YAML suffix).
        overrides: `a.b=value` each, the value in YAML; they replace what the file says.

    Raises:
        RecipeError: one line for every problem: `file:line: key.path: what is wrong, and what to do`, with
            `--set key.path=value` in the place of `file:line` where an override is to blame.
    """
    path = _find(name_or_path)
    name = _shown(path)
    return parse_recipe(_read(path, name), name, overrides)


def parse_recipe(text: str, name: str, overrides: Sequence[str] = ()) -> Recipe:
    """`load_recipe` of YAML text; `name` is what messages call it."""
    try:
        document = tree.parse(text)
    except tree.UnreadableError as error:
        raise RecipeError(f"{name}:{error.line}: {error.message}") from None
    if not isinstance(document.value, dict):
        raise RecipeError(f"{name}:{document.lines[()]}: expected a recipe: 'key: value' lines, such as 'name: my-run'")
    replaced, complaints = _override(document, overrides)

    recipe, problems = None, list(document.problems)
    try:
        recipe = Recipe.model_validate(document.value)
    except ValidationError as error:
        problems += explain(error)
    in_file = []
    for problem in problems:
        blamed = next((argument for path, argument in replaced.items() if path == problem.path[: len(path)]), None)
        if blamed is not None and problem.line is None:
            complaints.append(f"--set {blamed}: {problem.message}")
            continue
        line = problem.line or _line(document, problem.path)
        place = f"{dotted(problem.path)}: " if problem.path else ""
        in_file.append((line, f"{name}:{line}: {place}{problem.message}"))
    if recipe is None or in_file or complaints:
        raise RecipeError("\n".join([text for _, text in sorted(in_file)] + complaints))
    return recipe


def dump_recipe(recipe: Recipe) -> str:
    """The whole recipe, defaults included, as YAML that `load_recipe` reads back to an equal recipe."""
    return yaml.dump(recipe.model_dump(mode="json"), Dumper=tree.StrictDumper, sort_keys=False, allow_unicode=True, width=2**20)


def recipe_hash(recipe: Recipe) -> str:
    """SHA-256, in hexadecimal, of the recipe with its defaults: equal for two files that say the same."""
    canonical = json.dumps(recipe.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _find(name_or_path: str | Path) -> Path:
    text = str(name_or_path)
    if isinstance(name_or_path, Path) or text.endswith(_SUFFIXES) or "/" in text or "\\" in text:
        return Path(name_or_path)
    known = builtin_recipes()
    if text in known:
        return known[text]
    if not known:
        raise RecipeError(f"no recipe {text!r}: there are no built-in recipes in {recipes_folder()}; give the path of a file")
    close = get_close_matches(text.lower(), known, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise RecipeError(
        f"no built-in recipe {text!r}; {hint}The built-in recipes are {', '.join(known)}; "
        "a file of your own needs a path such as my-recipe.yaml"
    )


def _shown(path: Path) -> str:
    cwd = Path.cwd()
    return str(path.relative_to(cwd)) if path.is_relative_to(cwd) else str(path)


def _read(path: Path, name: str) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        close = get_close_matches(path.stem, builtin_recipes(), n=1)
        hint = f"; did you mean the built-in recipe {close[0]!r}?" if close else "; check the path"
        raise RecipeError(f"{name}: no such file{hint}") from None
    except (OSError, ValueError) as error:
        raise RecipeError(f"{name}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if len(content) > MAX_BYTES:
        raise RecipeError(f"{name}: larger than 1 MiB, so it is not a recipe; check the path")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise RecipeError(f"{name}:{line}: not UTF-8 text (byte 0x{content[error.start]:02x}); save the file as UTF-8") from None


def _line(document: tree.Tree, path: tree.Path) -> int:
    """The line of the key, or of the nearest section that the file has."""
    return next(document.lines[path[:end]] for end in range(len(path), -1, -1) if path[:end] in document.lines)


def _override(document: tree.Tree, overrides: Sequence[str]) -> tuple[dict[tree.Path, str], list[str]]:
    """Writes the overrides into the tree; returns the argument of every replaced path, and what is wrong with others."""
    replaced: dict[tree.Path, str] = {}
    complaints: list[str] = []
    for argument in overrides:
        key, _, text = argument.partition("=")
        path: tree.Path = tuple(key.strip().split("."))
        if path in replaced:
            complaints.append(f"--set {argument}: key given twice, first as --set {replaced[path]}; delete one")
            continue
        try:
            value = _override_value(path, argument, text)
        except ValueError as error:
            complaints.append(f"--set {argument}: {error}")
            continue
        section = document.value
        for name in path[:-1]:
            section = section.setdefault(name, {}) if isinstance(section, dict) else None
        # A section that is no mapping is reported with the file.
        if isinstance(section, dict):
            section[path[-1]] = value
            replaced[path] = argument
    return replaced, complaints


def _override_value(path: tree.Path, argument: str, text: str) -> object:
    """Raises: ValueError, in words for the user."""
    if "=" not in argument:
        raise ValueError("expected key.path=value, such as training.steps=100")
    if path not in FIELDS:
        raise ValueError(_unknown_path(path))
    if is_section(path):
        fields = ", ".join(dotted(field) for field in FIELDS if field[:-1] == path)
        raise ValueError(f"{dotted(path)} is a section; set one of its fields: {fields}")
    if not text.strip():
        raise ValueError(f"the value is missing; expected {expected(FIELDS[path].annotation)}")
    try:
        value = tree.parse(text, whole_value=True)
    except tree.UnreadableError as error:
        raise ValueError(error.message) from None
    if value.problems:
        raise ValueError(value.problems[0].message)
    return value.value


def _unknown_path(path: tree.Path) -> str:
    section = path[:-1] if is_section(path[:-1]) else ()
    key = str(path[-1]) if is_section(path[:-1]) else dotted(path)
    targets = [dotted(target) for target in meant(section, key) if not is_section(target)]
    if not targets:
        leaves = [dotted(field) for field in FIELDS if not is_section(field)]
        targets = get_close_matches(dotted(path), leaves, n=1)
    if not targets:
        return f"unknown key {dotted(path)!r}; the sections are {', '.join(dotted(f) for f in FIELDS if is_section(f))}"
    return f"unknown key; did you mean {' or '.join(repr(target) for target in targets)}?"
