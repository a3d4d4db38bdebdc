"""Recipes in and out: a YAML file and `--set` overrides to a frozen Recipe, and back to text."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from longtrain.errors import RecipeError
from longtrain.recipe import tree
from longtrain.recipe.explain import FIELDS, dotted, expected, explain, is_section, meant
from longtrain.recipe.model import FIXED, OWN, ModelSection
from longtrain.recipe.schema import Recipe
from longtrain.recipe.secret import ADVICE, hidden, secrets_in
from longtrain.recipe.section import path_text

MAX_BYTES = 1024 * 1024
EXTENDS = "extends"
NOT_INHERITED: tuple[tree.Path, ...] = (("name",), ("output",))
CORPUS: tree.Path = ("data", "corpus")
"""What `data.path` is prepared from: not inherited by a recipe that names another path."""
TOKENIZER: tree.Path = ("data", "tokenizer")
"""What goes with the weights: not inherited by who names others."""
SHAPE: tuple[tree.Path, ...] = tuple(("model", name) for name in ModelSection.model_fields if name not in ("preset", "init", *OWN))
"""What goes with the model: not inherited by who names another one."""
_SUFFIXES = (".yaml", ".yml")
_BEGINS_WITH_A_FIELD = re.compile(r"([a-z_]+(?:\.[a-z_]+)*)[: ]")


def recipes_folder() -> Path:
    """Folder of the built-in recipes: `longtrain/recipes` of an installed package, `recipes` of a checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


def builtin_recipes() -> dict[str, Path]:
    """The built-in recipes by name, sorted."""
    return {path.stem: path for path in sorted(recipes_folder().glob("*.yaml"))}


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe, and the one that it extends, and checks all that can be judged from the recipe alone.

    Args:
        name_or_path: name of a built-in recipe, or the path of a file (a Path, or text with a separator or a YAML suffix).
        overrides: `a.b=value` each, the value in YAML; they replace what the file says.

    Raises:
        RecipeError: one line for every problem: `file:line: key.path: what is wrong, and what to do`, with
            `--set key.path=value` in the place of `file:line` where an override is to blame.
    """
    return load_written(name_or_path, overrides)[0]


def load_written(name_or_path: str | Path, overrides: Sequence[str] = ()) -> "tuple[Recipe, Written]":
    """`load_recipe`, and where its values are written."""
    path = _find(name_or_path)
    name = _shown(path, name_or_path)
    return _parse_written(_read(path, name), name, overrides)


def parse_recipe(text: str, name: str, overrides: Sequence[str] = ()) -> Recipe:
    """`load_recipe` of YAML text; `name` is what messages call it."""
    return _parse_written(text, name, overrides)[0]


def _parse_written(text: str, name: str, overrides: Sequence[str]) -> "tuple[Recipe, Written]":
    files = _with_parent(_parse(text, name))
    settings, complaints = _settings(overrides)
    said: dict[str, Any] = {}
    _write(said, settings)
    gone = list(_of_another_model(tree.overlaid(files[-1].value, files[0].value), said))
    files = [file.without(*gone) for file in files]
    values = tree.overlaid(files[-1].value, files[0].value)
    written = Written(files, _write(values, settings))

    recipe, problems = None, []
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        problems = explain(error)
    problems = [*problems, *(tree.Problem(path, ADVICE) for path in secrets_in(values))]
    in_files = [
        (number, line, file.told(line, p))
        for number, file in enumerate(files)
        for p in file.problems
        for line in (p.line or file.line(p.path),)
    ]
    for problem in problems:
        if written.replaces(problem.path) is None:
            number, file = written.says(problem.path)
            in_files.append((number, file.line(problem.path), written.told(problem)))
        else:
            complaints.append(written.told(problem))
    if recipe is None or in_files or complaints:
        raise RecipeError(hidden("\n".join([text for *_, text in sorted(in_files)] + complaints)))
    return recipe, written


@dataclass(frozen=True)
class _File:
    """One YAML file. name: what messages call it."""

    name: str
    value: dict[str, Any]
    lines: dict[tree.Path, int]
    problems: list[tree.Problem]

    def depth(self, path: tree.Path) -> int:
        """How much of the path the file has."""
        return next(end for end in range(len(path), -1, -1) if path[:end] in self.lines)

    def line(self, path: tree.Path) -> int:
        """The line of the key, or of the nearest section that the file has."""
        return self.lines[path[: self.depth(path)]]

    def without(self, *gone: tree.Path) -> "_File":
        """The file as if it had none of these keys."""

        def kept(path: tree.Path) -> bool:
            return not any(path[: len(key)] == key for key in gone)

        def pruned(section: dict[str, Any], above: tree.Path = ()) -> dict[str, Any]:
            inner = {key: pruned(value, (*above, key)) if isinstance(value, dict) else value for key, value in section.items()}
            return {key: value for key, value in inner.items() if kept((*above, key))}

        lines = {path: line for path, line in self.lines.items() if kept(path)}
        return _File(self.name, pruned(self.value), lines, [problem for problem in self.problems if kept(problem.path)])

    def told(self, line: int, problem: tree.Problem) -> str:
        place = f"{dotted(problem.path)}: " if problem.path else ""
        return f"{self.name}:{line}: {place}{problem.message}"


@dataclass(frozen=True)
class Written:
    """Where the values of a recipe are written. files: the one that was given, and the one that it extends. replaced: the arguments
    of `--set`, by path."""

    files: list[_File]
    replaced: dict[tree.Path, str]

    def replaces(self, path: tree.Path) -> tree.Path | None:
        """The path of the override that says the value."""
        return next((override for override in self.replaced if override == path[: len(override)]), None)

    def says(self, path: tree.Path) -> tuple[int, _File]:
        """The file that says most of the path, and of two the one that was given; with its number."""
        return max(enumerate(self.files), key=lambda entry: (entry[1].depth(path), -entry[0]))

    def told(self, problem: tree.Problem) -> str:
        """`file:line: key.path: message`, or `--set key.path=value: message`."""
        override = self.replaces(problem.path)
        if override is None:
            _, file = self.says(problem.path)
            return file.told(file.line(problem.path), problem)
        inside = tuple(part for part in problem.path[len(override) :] if isinstance(part, str))
        place = f"{dotted(inside)}: " if inside else ""
        return f"--set {self.replaced[override]}: {place}{problem.message}"

    def located(self, refusal: str, field: str | None = None) -> str:
        """A later refusal, told as those of the recipe itself are, where it begins with the name of a field.

        field: the one to blame where it does not. A name of one word may as well be a file's, so that it counts after `field`.
        """
        found = _BEGINS_WITH_A_FIELD.match(refusal)
        path: tree.Path = tuple(found[1].split(".")) if found else ()
        if path not in FIELDS or (len(path) == 1 and (field is not None or is_section(path))):
            if field is None:
                return refusal
            path, refusal = tuple(field.split(".")), f"{field}: {refusal}"
        override = self.replaces(path)
        if override is not None:
            return hidden(f"--set {self.replaced[override]}: {refusal.removeprefix(f'{dotted(path)}: ')}")
        _, file = self.says(path)
        return hidden(f"{file.name}:{file.line(path)}: {refusal}")


def _parse(text: str, name: str) -> _File:
    try:
        document = tree.parse(text)
    except tree.UnreadableError as error:
        raise RecipeError(f"{name}:{error.line}: {error.message}") from None
    if not isinstance(document.value, dict):
        raise RecipeError(f"{name}:{document.lines[()]}: expected a recipe: 'key: value' lines, such as 'name: my-run'")
    return _File(name, document.value, document.lines, document.problems)


def _with_parent(file: _File) -> list[_File]:
    """The file, and the one that it extends, if it does."""
    if EXTENDS not in file.value:
        return [file]
    wanted, line = file.value[EXTENDS], file.line((EXTENDS,))
    if not isinstance(wanted, str) or not wanted.strip():
        raise RecipeError(f"{file.name}:{line}: {EXTENDS}: expected one recipe, by the name of a built-in one or by its path")
    try:
        path = _find(path_text(wanted))
        name = _shown(path, wanted)
        parent = _parse(_read(path, name), name)
    except (RecipeError, ValueError) as error:
        raise RecipeError(f"{file.name}:{line}: {EXTENDS}: {error}") from None
    if EXTENDS in parent.value:
        raise RecipeError(f"{file.name}:{line}: {EXTENDS}: {parent.name} extends another recipe itself; extend that one directly")
    mine, theirs = file.value.get("data"), parent.value.get("data")
    moved = isinstance(mine, dict) and isinstance(theirs, dict) and mine.get("path", theirs.get("path")) != theirs.get("path")
    corpus = (CORPUS,) if moved else ()
    return [file.without((EXTENDS,)), parent.without(*NOT_INHERITED, *corpus, *_of_another_model(parent.value, file.value))]


def _of_another_model(below: dict[str, Any], above: dict[str, Any]) -> Iterator[tree.Path]:
    """What of `below` goes with another model than the one that `above` names, by a preset or by weights.

    Weights decide the shape alone: what is said of how a context is extended stays. In the place of others, or of a preset, they
    are taken for more of the same model, whose shape is compared when they are read.
    """
    lower, upper = below.get("model"), above.get("model")
    if not isinstance(lower, dict) or not isinstance(upper, dict):
        return
    preset, init = (upper.get(name) not in (None, lower.get(name)) for name in ("preset", "init"))
    if preset:
        yield from SHAPE
    elif init and lower.get("preset") is None and lower.get("init") is None:
        yield from (("model", name) for name in FIXED)
    if init:
        yield TOKENIZER


def dump_recipe(recipe: Recipe) -> str:
    """The whole recipe, defaults included, as YAML that `load_recipe` reads back to an equal recipe; the same text for two files
    that say the same, so that its digest stands for the recipe."""
    return tree.dump(recipe.model_dump(mode="json"))


def _find(name_or_path: str | Path) -> Path:
    text = str(name_or_path)
    if isinstance(name_or_path, Path) or text.endswith(_SUFFIXES) or "/" in text or "\\" in text:
        return Path(name_or_path)
    known = builtin_recipes()
    if text in known:
        return known[text]
    if not known:
        nowhere = f"there are no built-in recipes in {recipes_folder()}"
        raise RecipeError(f"no recipe {hidden(text)!r}: {nowhere}; give the path of a file")
    close = get_close_matches(text.lower(), known, n=1)
    hint = f"did you mean {close[0]!r}? The" if close else "the"
    raise RecipeError(
        f"no built-in recipe {hidden(text)!r}; {hint} built-in recipes are {', '.join(known)}; "
        "a file of your own needs a path such as my-recipe.yaml"
    )


def _shown(path: Path, given: str | Path) -> str:
    """What messages call the file. given: as it was written: what a Path leaves of an address is not seen to hold a password."""
    if hidden(str(given)) != str(given):
        return hidden(str(given))
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


def _settings(overrides: Sequence[str]) -> tuple[dict[tree.Path, tuple[str, object]], list[str]]:
    """The argument and the value of every path that is overridden, and what is wrong with other overrides."""
    settings: dict[tree.Path, tuple[str, object]] = {}
    complaints: list[str] = []
    for argument in overrides:
        key, _, text = argument.partition("=")
        path: tree.Path = tuple(key.strip().split("."))
        if path in settings:
            complaints.append(f"--set {argument}: key given twice, first as --set {settings[path][0]}; delete one")
            continue
        try:
            settings[path] = argument, _override_value(path, argument, text)
        except ValueError as error:
            complaints.append(f"--set {argument}: {error}")
    return settings, complaints


def _write(values: dict[str, Any], settings: dict[tree.Path, tuple[str, object]]) -> dict[tree.Path, str]:
    """Writes the settings into the values; returns the argument of every path that was written."""
    replaced: dict[tree.Path, str] = {}
    for path, (argument, value) in settings.items():
        section: Any = values
        for name in path[:-1]:
            section = section.setdefault(name, {}) if isinstance(section, dict) else None
        # A section that is no mapping is reported with the file.
        if isinstance(section, dict):
            section[path[-1]] = value
            replaced[path] = argument
    return replaced


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
