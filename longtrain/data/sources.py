"""What --source names: folders, files of records, datasets of the hub; each cut into pieces that can be taken up again."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol, cast

from longtrain.data.corpus import CONTAINERS, JSON_LINES, Corpus, Document, Skipped, check_share, find_corpus, find_stdlib
from longtrain.data.hub import PREFIX, HubSource
from longtrain.data.records import Lines, RowGroup, Step, TextFiles, first_line
from longtrain.errors import DataError

STDLIB = "stdlib"
HELD_OUT = 0.02

PIECE_BYTES = 1 << 20
"""Text of one piece: tokenized in a second or less, so that all workers end at about the same time."""

PIECE_DOCUMENTS = 1024

LINE_BYTES = 1 << 30
"""A longer line is no document, but a file that is not JSON Lines."""


class Source(Protocol):
    """Something to prepare. size: in bytes, None where nobody knows. documents: how many, likewise.

    identity: what must be the same for an unfinished preparation to go on, as plain JSON values.
    """

    @property
    def name(self) -> str: ...
    @property
    def size(self) -> int | None: ...
    @property
    def documents(self) -> int | None: ...
    def identity(self) -> Any: ...
    def steps(self, field: str, after: Any = None) -> Iterator[Step]:
        """The pieces from the beginning, or `after` one. DataError where the source is damaged or has no such field."""
        ...


class Found(NamedTuple):
    """The sources of a preparation, the share of records to hold out, and what was passed over while looking."""

    sources: tuple[Source, ...]
    held_out: float
    skipped: Skipped


def find_sources(wanted: Sequence[str], *, globs: Sequence[str], held_out: float | None, seed: int, out: Path) -> Found:
    """Resolves every --source, in this order: "stdlib", "hf:NAME", a folder, a file of records. DataError where one is unusable."""
    share = HELD_OUT if held_out is None else held_out
    check_share(share)
    if not wanted:
        raise DataError("--source is missing: name a folder, a file of records, hf:DATASET or stdlib")
    doubled = [source for source in wanted if wanted.count(source) > 1]
    if doubled:
        raise DataError(f"--source {doubled[0]} is given twice")
    sources: list[Source] = []
    skipped = Skipped()
    for text in wanted:
        path = Path(text)
        if text == STDLIB:
            if held_out is not None:
                raise DataError("--held-out: the standard library has a fixed list of held-out files; leave the option out")
            corpus = find_stdlib(globs=globs, seed=seed)
        elif text.startswith(PREFIX):
            sources.append(HubSource.parse(text))
            continue
        elif path.is_file() and path.name.lower().endswith((*CONTAINERS, ".json")):
            sources.append(_container(_document(path)))
            continue
        else:
            if path.resolve().is_relative_to(out.resolve()):
                raise DataError(f"--out {out}: contains --source {text}; choose a folder outside the text")
            corpus = find_corpus(path, globs=globs, seed=seed)
        skipped.extend(corpus.skipped)
        sources += _of_corpus(text, corpus)
    return Found(tuple(sources), share, skipped)


def _of_corpus(name: str, corpus: Corpus) -> Iterator[Source]:
    if corpus.documents:
        yield TextSource(name, corpus.documents)
    for container in corpus.containers:
        yield _container(container)


def _container(document: Document) -> Source:
    return JsonLinesSource(document) if document.name.lower().endswith((*JSON_LINES, ".json")) else ParquetSource(document)


def _document(path: Path) -> Document:
    status = path.stat()
    return Document(path.name, path, status.st_size, status.st_mtime_ns)


@dataclass(frozen=True)
class TextSource:
    """A folder of text files."""

    name: str
    files: tuple[Document, ...]

    @property
    def size(self) -> int:
        return sum(document.size for document in self.files)

    @property
    def documents(self) -> int:
        return len(self.files)

    def identity(self) -> Any:
        return [[ascii(document.name), document.size, document.modified] for document in self.files]

    def steps(self, field: str, after: Any = None) -> Iterator[Step]:
        done, read = after or 0, 0
        end = 0
        for group in _groups(self.files):
            end += len(group)
            read += sum(document.size for document in group)
            if end > done:
                yield Step(TextFiles(group), end, read)


def _groups(documents: Sequence[Document]) -> Iterator[tuple[Document, ...]]:
    group: list[Document] = []
    size = 0
    for document in documents:
        group.append(document)
        size += document.size
        if len(group) == PIECE_DOCUMENTS or size >= PIECE_BYTES:
            yield tuple(group)
            group, size = [], 0
    if group:
        yield tuple(group)


@dataclass(frozen=True)
class _FileSource:
    """What every file of records is, whatever its format."""

    document: Document
    documents: None = None

    @property
    def name(self) -> str:
        return str(self.document.path)

    @property
    def size(self) -> int:
        return self.document.size

    def identity(self) -> Any:
        return [self.document.name, self.document.size, self.document.modified]


@dataclass(frozen=True)
class JsonLinesSource(_FileSource):
    """A JSON Lines file, plain or compressed."""

    def steps(self, field: str, after: Any = None) -> Iterator[Step]:
        offset, done = after or (0, 0)
        number = done
        try:
            with self.document.path.open("rb") as raw, _unpacked(raw, self.name) as file:
                self._skip(file, offset, number)
                while lines := self._read(file, number):
                    piece = Lines(self.name, number + 1, tuple(lines))
                    number += len(lines)
                    offset += sum(map(len, lines))
                    yield Step(piece, [offset, number], min(raw.tell(), self.size))
        except (EOFError, zlib.error, OSError) as error:
            reason = getattr(error, "strerror", None) or first_line(error)
            raise DataError(
                f"{self.name}: cannot be read after line {number} ({reason}): the file is cut short or damaged; copy it again"
            ) from None

    def _skip(self, file: BinaryIO, offset: int, number: int) -> None:
        """Goes to an offset of the unpacked text; a compressed file has to be read up to there."""
        if not number:
            if file.peek(64)[:64].lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):  # type: ignore[attr-defined]
                raise DataError(
                    f"{self.name}: is one JSON list, not JSON Lines, a record a line; convert it: jq -c '.[]' IN > OUT.jsonl"
                )
            return
        if self.document.path.suffix.lower() not in (".gz", ".zst"):
            file.seek(offset)
            return
        while offset:
            offset -= len(file.read(min(offset, 1 << 20)))

    def _read(self, file: BinaryIO, number: int) -> list[bytes]:
        lines: list[bytes] = []
        size = 0
        while size < PIECE_BYTES and len(lines) < PIECE_DOCUMENTS and (line := file.readline(LINE_BYTES)):
            if len(line) == LINE_BYTES:
                raise DataError(f"{self.name}:{number + len(lines) + 1}: the line is longer than 1 GiB: this is not JSON Lines")
            lines.append(line)
            size += len(line)
        return lines


def _unpacked(raw: BinaryIO, name: str) -> BinaryIO:
    """The file's text, buffered."""
    if name.lower().endswith(".gz"):
        return cast(BinaryIO, io.BufferedReader(gzip.GzipFile(fileobj=raw), 1 << 20))  # type: ignore[arg-type]
    if name.lower().endswith(".zst"):
        import pyarrow as pa  # a while to import

        stream = pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd")
        return cast(BinaryIO, io.BufferedReader(stream, 1 << 20))  # type: ignore[arg-type]
    return raw


@dataclass(frozen=True)
class ParquetSource(_FileSource):
    """A Parquet file."""

    def steps(self, field: str, after: Any = None) -> Iterator[Step]:
        rows = self._rows(field)
        for group in range(after or 0, len(rows)):
            read = self.size * (group + 1) // len(rows)
            yield Step(RowGroup(self.name, self.document.path, group, 1 + sum(rows[:group])), group + 1, read)

    def _rows(self, field: str) -> list[int]:
        """Rows of every row group."""
        import pyarrow as pa
        import pyarrow.parquet

        try:
            with pyarrow.parquet.ParquetFile(self.document.path) as file:
                schema, metadata = file.schema_arrow, file.metadata
        except (pa.ArrowException, OSError) as error:
            reason = getattr(error, "strerror", None) or first_line(error)
            raise DataError(f"{self.name}: is not a Parquet file, or is cut short: {reason}; copy it again") from None
        if field not in schema.names:
            raise DataError(
                f"{self.name}: has no column {field!r}; its columns are {', '.join(schema.names)}: choose with --text-field"
            )
        if schema.names.count(field) > 1:
            raise DataError(
                f"{self.name}: has {schema.names.count(field)} columns {field!r}, and nobody can tell which is meant; write the "
                "file again with another name for each, or choose another column with --text-field"
            )
        kind = schema.field(field).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
            raise DataError(f"{self.name}: the column {field!r} holds {kind}, not text; choose another with --text-field")
        return [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
