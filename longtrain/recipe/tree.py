"""Strict YAML: text to plain values, with the line of every key and every problem found on the way.

PyYAML follows YAML 1.1: it reads `1e-4` as text, `017` as 15, `1:30` as 90, `no` as false, and lets a key appear twice. Here
`1e-4` is a number, `017` and `1:30` are refused, only `true` and `false` are booleans, and a second key is a problem. Anchors,
aliases, merge keys and tags are refused: what a line says is what it means.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

Path = tuple[str | int, ...]

# Stands for a value that was already reported; it fails every validation, and explain.py skips it.
UNREADABLE = object()

_MAX_DEPTH = 16
_NULL, _BOOL, _INT, _FLOAT = (f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float"))
_ZERO_LED, _BASE_60 = "!zero-led", "!base-60"
_DIGITS = r"[0-9]+(?:_[0-9]+)*"
# In this order: the first that matches decides.
_PLAIN_SCALARS = (
    (_NULL, r"|~|null|Null|NULL", None),
    (_BOOL, r"true|True|TRUE|false|False|FALSE", "tTfF"),
    (_ZERO_LED, r"[-+]?0[0-9_]+(?:\.[0-9_]*)?(?:[eE][-+]?[0-9]+)?", "-+0"),
    (_BASE_60, r"[-+]?[0-9][0-9_]*(?::[0-5]?[0-9])+(?:\.[0-9_]*)?", "-+0123456789"),
    (_INT, rf"[-+]?{_DIGITS}", "-+0123456789"),
    (_FLOAT, rf"[-+]?(?:{_DIGITS}(?:\.(?:{_DIGITS})?)?|\.{_DIGITS})(?:[eE][-+]?[0-9]+)?", "-+.0123456789"),
    (_FLOAT, r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", "-+."),
)
# What PyYAML says, and what a user can do about it.
_ADVICE = {
    "found character '\\t'": "a tab cannot indent or separate; use spaces",
    "cannot start any token": "a value cannot begin with '@', '`' or '%'; put it in quotes",
    "mapping values are not allowed here": "unexpected ':'; check the indentation, or put the value in quotes",
    "could not find expected ':'": "this line, or the one before it, is not 'key: value'",
    "while scanning a quoted scalar": "the quote that opens here is never closed",
    "while parsing a flow": "the bracket that opens here is not closed properly",
}


class UnreadableError(Exception):
    """Text that is not one document of the accepted YAML. Reading stops here, at `line` (counted from 1)."""

    def __init__(self, line: int, message: str) -> None:
        super().__init__(message)
        self.line = line
        self.message = message


@dataclass(frozen=True)
class Problem:
    """Something wrong at a key path. `line` is given where the path alone does not tell it."""

    path: Path
    message: str
    line: int | None = None


@dataclass
class Tree:
    """Plain values (dict, list, str, int, float, bool, None, UNREADABLE), the line of every key path, and the problems."""

    value: Any = None
    lines: dict[Path, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


class StrictLoader(yaml.SafeLoader):
    """Composes nodes, never objects."""

    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012 (PyYAML's own way to hold them)
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        line = _line(event.start_mark)
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise UnreadableError(line, "anchors (&x) and aliases (*x) are not allowed; write the value out, or quote the text")
        if getattr(event, "tag", None):
            tag = event.tag.replace("tag:yaml.org,2002:", "!!")
            raise UnreadableError(line, f"tags such as {tag} are not allowed; delete it, or quote the text")
        if self.depth == _MAX_DEPTH:
            raise UnreadableError(line, f"nested more than {_MAX_DEPTH} levels deep")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class StrictDumper(yaml.SafeDumper):
    """Quotes exactly the texts that StrictLoader would not read back as text."""

    yaml_implicit_resolvers = StrictLoader.yaml_implicit_resolvers


for _tag, _pattern, _first in _PLAIN_SCALARS:
    StrictLoader.add_implicit_resolver(_tag, re.compile(rf"(?:{_pattern})\Z"), None if _first is None else list(_first))


def parse(text: str, *, whole_value: bool = False) -> Tree:
    """Reads one YAML document.

    Args:
        text: the document.
        whole_value: refuse a comment or anything else after the value (for values from a command line).

    Raises:
        UnreadableError: the text is empty, not YAML, or uses a feature that is refused as a whole.
    """
    try:
        loader = StrictLoader(text)
        node = loader.get_node() if loader.check_node() else None
        if node is None:
            raise UnreadableError(1, "nothing is written here")
        if loader.check_node():
            raise UnreadableError(_line(loader.peek_event().start_mark), "a second document begins; keep only one")
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise UnreadableError(line, f"holds the invisible character U+{int(error.character):04X}; delete it") from None
    except yaml.MarkedYAMLError as error:
        raise _syntax_error(error) from None
    if whole_value and text[node.end_mark.index :].strip():
        raise UnreadableError(1, "only part of this is the value; put it in quotes")
    tree = Tree()
    tree.lines[()] = _line(node.start_mark)
    tree.value = _value(node, (), tree)
    return tree


def dump(values: Mapping[str, Any]) -> str:
    """YAML that `parse` reads back to the same values, in their order."""
    return yaml.dump(values, Dumper=StrictDumper, sort_keys=False, allow_unicode=True, width=2**20)


def overlaid(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`below` with the leaves of `above` in it."""
    merged = dict(below)
    for name, value in above.items():
        lower = merged.get(name)
        merged[name] = overlaid(lower, value) if isinstance(lower, Mapping) and isinstance(value, Mapping) else value
    return merged


def _line(mark: yaml.Mark) -> int:
    return mark.line + 1


def _syntax_error(error: yaml.MarkedYAMLError) -> UnreadableError:
    reason = " ".join(part for part in (error.context, error.problem) if part)
    advice = next((advice for words, advice in _ADVICE.items() if words in reason), reason)
    mark = error.context_mark if "opens here" in advice else error.problem_mark
    return UnreadableError(1 if mark is None else _line(mark), f"not valid YAML: {advice}")


def _value(node: yaml.Node, path: Path, tree: Tree) -> Any:
    if isinstance(node, yaml.MappingNode):
        return _mapping(node, path, tree)
    if isinstance(node, yaml.SequenceNode):
        items = []
        for index, item in enumerate(node.value):
            tree.lines[(*path, index)] = _line(item.start_mark)
            items.append(_value(item, (*path, index), tree))
        return items
    try:
        return _scalar(node.tag, node.value)
    except ValueError as error:
        tree.problems.append(Problem(path, str(error), _line(node.start_mark)))
        return UNREADABLE


def _mapping(node: yaml.MappingNode, path: Path, tree: Tree) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key_node, value_node in node.value:
        line, key = _line(key_node.start_mark), key_node.value
        if not isinstance(key_node, yaml.ScalarNode):
            tree.problems.append(Problem(path, "a key must be a plain name; text in braces needs quotes", line))
        elif key == "<<":
            tree.problems.append(Problem((*path, key), "merge keys are not allowed; write the keys out", line))
        elif key in values:
            first = tree.lines[(*path, key)]
            tree.problems.append(Problem((*path, key), f"key given twice, first on line {first}; delete one", line))
        else:
            tree.lines[(*path, key)] = line
            values[key] = _value(value_node, (*path, key), tree)
    return values


def _scalar(tag: str, text: str) -> Any:
    """Raises: ValueError, in words for the user."""
    if tag == _NULL:
        return None
    if tag == _BOOL:
        return text.lower() == "true"
    if tag == _ZERO_LED:
        raise ValueError(f"{text} begins with a zero, which YAML may take for octal; drop the zero, or quote it as text")
    if tag == _BASE_60:
        raise ValueError(f"{text} would be a base-60 number in YAML; write the plain number, or quote it as text")
    if tag == _INT:
        if len(text) > 400:
            raise ValueError("a number of more than 400 digits")
        return int(text)
    if tag == _FLOAT:
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return text
