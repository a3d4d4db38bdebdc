"""Pieces of a source that a worker reads by itself: a few files, some lines, a row group, some examples."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from longtrain.data.corpus import Document
from longtrain.errors import DataError

EXCERPT = 40


class Record(NamedTuple):
    """One document, or why it is none. problem: not_utf8, unreadable or malformed, whose details stand in `name`.

    held_out: whether it is kept from training; None: its text decides.
    """

    name: str
    text: str = ""
    problem: str | None = None
    held_out: bool | None = None


class Piece(Protocol):
    """Part of a source, small enough to send to another process."""

    def records(self, field: str) -> Iterator[Record]:
        """Every record in order. field: the name of the text in a record. DataError where the file itself is damaged."""
        ...


class Step(NamedTuple):
    """A piece, where to go on after it (plain JSON values), and how many bytes of the source are read then."""

    piece: Piece
    after: Any
    read: int


@dataclass(frozen=True)
class TextFiles:
    """Files that are a document each."""

    documents: tuple[Document, ...]

    def records(self, field: str) -> Iterator[Record]:
        for document in self.documents:
            try:
                text = document.path.read_bytes().decode("utf-8-sig")
            except UnicodeDecodeError:
                yield Record(document.name, problem="not_utf8")
            except OSError:
                yield Record(document.name, problem="unreadable")
            else:
                yield Record(document.name, text, held_out=document.held_out)


@dataclass(frozen=True)
class Lines:
    """Lines of a JSON Lines file, the first of them line `first`, counted from 1. Blank lines are no records."""

    name: str
    first: int
    lines: tuple[bytes, ...]

    def records(self, field: str) -> Iterator[Record]:
        for number, line in enumerate(self.lines, self.first):
            if line.strip():
                yield _from_json(f"{self.name}:{number}", line, field)


@dataclass(frozen=True)
class RowGroup:
    """A row group of a Parquet file, whose first row is row `first`, counted from 1."""

    name: str
    path: Path
    group: int
    first: int

    def records(self, field: str) -> Iterator[Record]:
        import pyarrow as pa
        import pyarrow.parquet

        number = self.first
        try:
            with pyarrow.parquet.ParquetFile(self.path) as file:
                for batch in file.iter_batches(batch_size=1024, row_groups=[self.group], columns=[field]):
                    for value in batch.column(0):
                        yield from_value(f"{self.name}: row {number}", _text(value))
                        number += 1
        except (pa.ArrowException, OSError) as error:
            raise DataError(
                f"{self.path}: row {number} (row group {self.group}) cannot be read: {first_line(error)}; the file is damaged: "
                "copy it again"
            ) from None


@dataclass(frozen=True)
class Examples:
    """Texts that `datasets` read in this process, the first of them example `first`, counted from 1."""

    name: str
    first: int
    texts: tuple[object, ...]

    def records(self, field: str) -> Iterator[Record]:
        for number, text in enumerate(self.texts, self.first):
            yield from_value(f"{self.name}: example {number}", text)


def from_value(name: str, value: object) -> Record:
    """A record from what stands where its text should be."""
    if not isinstance(value, str):
        kind = "null" if value is None else "not UTF-8" if isinstance(value, bytes) else f"of type {type(value).__name__}"
        return Record(f"{name}: the text is {kind}, not a string", problem="malformed")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            return Record(f"{name}: the text holds half of a surrogate pair, which is no Unicode", problem="malformed")
    return Record(name, value)


def first_line(error: BaseException) -> str:
    """What an error of another library says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _from_json(name: str, line: bytes, field: str) -> Record:
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return Record(f"{name}: not UTF-8 (byte 0x{line[error.start]:02x})", problem="malformed")
    except json.JSONDecodeError as error:
        return Record(f"{name}: not JSON ({error.msg}, column {error.pos + 1})", problem="malformed")
    except (ValueError, RecursionError):
        return Record(f"{name}: not JSON that can be read (nested too deep, or a number too long)", problem="malformed")
    if not isinstance(value, dict):
        return Record(f"{name}: a JSON {type(value).__name__}, not an object with a field {field!r}", problem="malformed")
    if field not in value:
        fields = ", ".join(ascii(key) for key in list(value)[:8]) or "none"
        return Record(f"{name}: no field {field!r}; its fields are {fields} (--text-field chooses one)", problem="malformed")
    return from_value(name, value[field])


def _text(value: object) -> object:
    """A Python value of an Arrow scalar; bytes that are not UTF-8 in a text column stay bytes."""
    try:
        return value.as_py()  # type: ignore[attr-defined]
    except UnicodeDecodeError:
        return b""
