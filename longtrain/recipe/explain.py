"""What is wrong with a recipe, in plain words: unknown keys with the key that was meant, and values with what was expected."""

import re
import types
from collections.abc import Iterator
from difflib import get_close_matches
from enum import StrEnum
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from longtrain.recipe.schema import Recipe
from longtrain.recipe.secret import hidden
from longtrain.recipe.section import CONFLICT, Section
from longtrain.recipe.tree import UNREADABLE, Path, Problem, UnreadableError, parse

# Names of other libraries that no spelling distance would find.
FOREIGN_NAMES: dict[str, Path] = {
    "activation_function": ("model", "hidden_act"),
    "attn_implementation": ("attention", "kernel"),
    "block_size": ("training", "sequence_length"),
    "clip_grad": ("optimizer", "grad_clip"),
    "context_length": ("training", "sequence_length"),
    "context_parallel_size": ("parallel", "cp"),
    "deepspeed_config": ("zero", "deepspeed"),
    "ds_config": ("zero", "deepspeed"),
    "dtype": ("training", "precision"),
    "gradient_checkpointing": ("training", "activations"),
    "gradient_clipping": ("optimizer", "grad_clip"),
    "hidden_dropout": ("model", "dropout"),
    "initializer_range": ("model", "init_std"),
    "learning_rate": ("optimizer", "lr"),
    "liger_kernel": ("training", "fused"),
    "lr_scheduler_type": ("schedule", "kind"),
    "max_grad_norm": ("optimizer", "grad_clip"),
    "max_position_embeddings": ("model", "max_positions"),
    "max_length": ("training", "sequence_length"),
    "max_seq_len": ("training", "sequence_length"),
    "max_steps": ("training", "steps"),
    "min_lr_ratio": ("schedule", "final_ratio"),
    "num_attention_heads": ("model", "heads"),
    "num_hidden_layers": ("model", "layers"),
    "num_key_value_heads": ("model", "kv_heads"),
    "model_name_or_path": ("model", "init"),
    "num_layers": ("model", "layers"),
    "output_dir": ("output",),
    "save_steps": ("checkpoint", "every"),
    "sliding_window": ("model", "window"),
    "tie_word_embeddings": ("model", "tied_embeddings"),
    "train_batch_size": ("training", "batch_size"),
    "train_micro_batch_size_per_gpu": ("training", "micro_batch_size"),
    "zero_optimization": ("zero",),
}
_WITH_UNIT = re.compile(r"[-+]?[0-9][0-9._]* ?[A-Za-z%]+")
_SWITCHES = {"yes": "true", "y": "true", "on": "true", "no": "false", "n": "false", "off": "false"}
_LIMITS = {
    "greater_than": ("gt", "greater than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}


def _section_of(annotation: Any) -> type[Section] | None:
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None


def _walk(section: type[Section], path: Path = ()) -> Iterator[tuple[Path, FieldInfo]]:
    for name, info in section.model_fields.items():
        yield (*path, name), info
        inner = _section_of(info.annotation)
        if inner is not None:
            yield from _walk(inner, (*path, name))


FIELDS: dict[Path, FieldInfo] = dict(_walk(Recipe))
"""Every section and field of a recipe by its path, in the order of the schema."""


def is_section(path: Path) -> bool:
    return path == () or (path in FIELDS and _section_of(FIELDS[path].annotation) is not None)


def dotted(path: Path) -> str:
    """`a.b`, safe to print whatever the file held."""
    names = (str(part) for part in path)
    return ".".join(name if name.isascii() and name.isprintable() else ascii(name)[1:-1] for name in names)


def meant(section: Path, key: str) -> list[Path]:
    """The fields that an unknown `key` of `section` probably means, best first; empty where there is no good guess."""
    plain = key.strip().lower().replace("-", "_")
    own = {str(path[-1]): path for path in FIELDS if path[:-1] == section}
    if plain in own:
        return [own[plain]]
    path = tuple(plain.split("."))
    for candidate in ((*section, *path), path):
        if candidate in FIELDS:
            return [candidate]
    elsewhere = [path for path in FIELDS if path[-1] == plain]
    if elsewhere:
        return elsewhere
    if plain in FOREIGN_NAMES:
        return [FOREIGN_NAMES[plain]]
    close = get_close_matches(plain, own, n=1)
    if close:
        return [own[close[0]]]
    close = get_close_matches(plain, {str(path[-1]) for path in FIELDS}, n=1, cutoff=0.75)
    return [path for path in FIELDS if path[-1] in close]


def unknown_key(path: Path) -> str:
    """The message for an unknown key of a file."""
    section, key = path[:-1], str(path[-1])
    targets = meant(section, key)
    if not targets:
        known = ", ".join(str(path[-1]) for path in FIELDS if path[:-1] == section)
        return f"unknown key; the keys here are {known}"
    if "." in key:
        return f"unknown key; write {targets[0][-1]!r} under {dotted(targets[0][:-1])!r}"
    if any(target[:-1] == section for target in targets):
        return f"unknown key; did you mean {targets[0][-1]!r}?"
    if all(target[-1] == key for target in targets):
        places = [f"under {dotted(target[:-1])!r}" if target[:-1] else "at the top level" for target in targets]
        return f"unknown key; {key!r} belongs {' or '.join(places)}"
    return f"unknown key; did you mean {' or '.join(repr(dotted(target)) for target in targets)}?"


def expected(annotation: Any) -> str:
    """A type of the schema in words: 'a whole number or null'."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return expected(arguments[0])
    if origin in (Union, types.UnionType):
        return " or ".join(expected(argument) for argument in arguments)
    if origin is Literal:
        return " or ".join(repr(argument) for argument in arguments)
    if origin is tuple:
        return f"a list of {_items(arguments)}"
    if origin is dict:
        return "a section of 'key: value' lines" if arguments[1] is Any else "a section of 'name: number' lines"
    if _section_of(annotation) is not None:
        return "a section of 'key: value' lines"
    if issubclass(annotation, StrEnum):
        return f"one of {', '.join(annotation)}"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text", types.NoneType: "null"}[annotation]


def _items(arguments: tuple[Any, ...]) -> str:
    """The elements of a list in words, from the arguments of its tuple type: 2 numbers; numbers; 'a' or 'b'."""
    if arguments[-1] is not Ellipsis:
        return f"{len(arguments)} numbers"
    each = expected(arguments[0])
    return "numbers" if each == "a number" else each


def found(value: Any) -> str:
    """A value of a file in words: 'the text 'fast''."""
    if value is None:
        return "nothing"
    if isinstance(value, dict):
        return "a section"
    if isinstance(value, list):
        return f"a list of length {len(value)}"
    # before it is cut short: half of a key no longer looks like one
    value = hidden(value) if isinstance(value, str) else value
    shown = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
    if isinstance(value, bool):
        return shown.lower()
    kind = {str: "the text", int: "the whole number", float: "the number"}[type(value)]
    return f"{kind} {shown}"


def _advice(annotation: Any, value: Any) -> str:
    """How to mend a value of the wrong type, or nothing."""
    wanted = expected(annotation)
    if isinstance(value, str):
        return _text_advice(wanted, value)
    if isinstance(value, float) and value.is_integer() and "whole" in wanted and abs(value) < 2**63:
        return f"; write {int(value)}"
    if wanted.startswith("text") and isinstance(value, int | float):
        return "; put it in quotes"
    if value is None and wanted.startswith("a section"):
        return "; fill it, or delete the line"
    return ""


def _text_advice(wanted: str, value: str) -> str:
    lower = value.strip().lower()
    choices = wanted.removeprefix("one of ").split(", ") if wanted.startswith("one of ") else []
    # Stricter than for keys: 'gpu' is close to 'cpu' and means its opposite.
    close = get_close_matches(lower, choices, n=1, cutoff=0.7)
    if close:
        return f"; did you mean {close[0]!r}?"
    if "null" in wanted and lower in ("none", "nil", "no", "off"):
        return "; write null"
    if "number" in wanted and _WITH_UNIT.fullmatch(value):
        return "; write the number alone and in full, without a unit"
    if wanted == "true or false" and lower in _SWITCHES:
        return f"; write {_SWITCHES[lower]}"
    try:
        plain = parse(value).value
    except UnreadableError:
        return ""
    fits = (type(plain) is bool and "true" in wanted) or (type(plain) is int and "number" in wanted)
    return "; remove the quotes" if fits or (type(plain) is float and "a number" in wanted) else ""


def _bad_value(path: Path, error: Any) -> str:
    value, kind = error["input"], error["type"]
    if kind in _LIMITS:
        key, words = _LIMITS[kind]
        limit = error["ctx"][key]
        limit = int(limit) if float(limit).is_integer() else limit
        return f"must be {words} {limit}, found {found(value)}"
    if kind == "finite_number":
        return f"must be a finite number, found {found(value)}"
    if kind == "value_error":
        return f"{error['ctx']['error']}; found {found(value)}"
    field = _field(path)
    annotation = FIELDS[field].annotation
    annotation = annotation if path == field else _element(annotation)
    return f"expected {expected(annotation)}, found {found(value)}{_advice(annotation, value)}"


def _field(path: Path) -> Path:
    """The field of a recipe that the path leads to, or into."""
    return next(path[:end] for end in range(len(path), -1, -1) if path[:end] in FIELDS)


def _element(annotation: Any) -> Any:
    """The type of the elements of a list, or of the values of a section of numbers, which may be one of several types."""
    if get_origin(annotation) in (tuple, dict):
        return get_args(annotation)[0 if get_origin(annotation) is tuple else 1]
    return next((element for argument in get_args(annotation) if (element := _element(argument)) is not None), None)


def _field_path(location: Path) -> Path:
    """The path in the file, without what pydantic adds for the members of a union; of a key that is no path, its section."""
    field = _field(location)
    inside = location[len(field) :]
    if "'name: number'" in expected(FIELDS[field].annotation):
        return (*field, *inside) if len(inside) == 1 else field
    return (*field, *(part for part in inside if isinstance(part, int)))


def _missing_key(path: Path) -> str:
    if is_section(path):
        fields = {dotted(inner): info for inner, info in FIELDS.items() if inner[:-1] == path}
        needed = [name for name, info in fields.items() if info.is_required()]
        return f"required section is missing; it needs at least {', '.join(needed) or ' or '.join(list(fields)[:2])}"
    place = f"under {dotted(path[:-1])!r}" if path[:-1] else "at the top level"
    return f"required key is missing; add '{path[-1]}: <{expected(FIELDS[path].annotation)}>' {place}"


def explain(error: ValidationError) -> list[Problem]:
    """Every problem that pydantic found, in plain words. What stands for a problem already reported is left out."""
    unknown: list[Problem] = []
    missing: list[Path] = []
    others: dict[Path, Problem] = {}
    for entry in error.errors(include_url=False):
        location = entry["loc"]
        if entry["type"] == "extra_forbidden":
            unknown.append(Problem(location, unknown_key(location)))
        elif entry["type"] == CONFLICT:
            for conflict in entry.get("ctx", {})["conflicts"]:
                path = (*location, *conflict.field.split("."))
                others[path] = Problem(path, conflict.message)
        elif entry["type"] == "missing" and location in FIELDS:
            missing.append(location)
        elif entry["input"] is not UNREADABLE:
            path = _field_path(location)
            # A list that is too short is reported as its missing last element.
            path = path[:-1] if entry["type"] == "missing" else path
            # A union reports each member; the first member's complaint is the one about numbers.
            others.setdefault(path, Problem(path, _bad_value(path, entry)))
            if isinstance(path[-1], int):
                # what is wrong in a list says more than that the list is no name
                others.pop(path[:-1], None)
    misspelled = {target for problem in unknown for target in meant(problem.path[:-1], str(problem.path[-1]))}
    reported = [Problem(path, _missing_key(path)) for path in missing if path not in misspelled]
    return [*unknown, *reported, *others.values()]
