"""Files below a folder: a text file is one document, named by its path; a file of records holds many."""

from __future__ import annotations

import hashlib
import os
import re
import stat
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from longtrain.errors import DataError

_PROSE = {".txt", ".text", ".md", ".markdown", ".rst", ".adoc", ".org", ".tex"}
_CODE = {".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".java", ".kt", ".scala", ".js", ".ts", ".go", ".rs", ".rb"}
_SCRIPTS = {".php", ".pl", ".lua", ".jl", ".r", ".m", ".swift", ".cs", ".hs", ".ml", ".sh", ".sql"}

TEXT_SUFFIXES = frozenset(_PROSE | _CODE | _SCRIPTS)
"""What counts as text without --glob: a file is one document."""

JSON_LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".ndjson", ".ndjson.gz", ".ndjson.zst", ".json.gz", ".json.zst")
PARQUET = (".parquet",)
CONTAINERS = JSON_LINES + PARQUET
"""Ends of the names of files of records, each of them a document."""

STDLIB_SKIPPED = frozenset({"test", "tests", "idle_test", "encodings", "site-packages", "dist-packages", "__pycache__"})
"""Tests, generated code tables, and what is not the standard library."""

STDLIB_HELD_OUT = frozenset(
    {
        "argparse.py",
        "asyncio/tasks.py",
        "dataclasses.py",
        "heapq.py",
        "json/decoder.py",
        "statistics.py",
        "tempfile.py",
        "textwrap.py",
    }
)
"""In every Python from 3.11 on, long and short, prose and code: about 3% of the tokens."""


EXAMPLES = 5
"""Of what did not become a document, shown by name."""

_REASONS = {"not_utf8": "not UTF-8", "unreadable": "unreadable", "empty": "empty", "malformed": "malformed"}


@dataclass(frozen=True)
class Document:
    """A file: `name` is its path below the source with forward slashes, on every machine the same. modified: in nanoseconds.

    held_out: whether it is kept from training; None: its text decides.
    """

    name: str
    path: Path
    size: int = 0
    modified: int = 0
    held_out: bool | None = None


@dataclass
class Skipped:
    """Files and records that did not become documents: how many by reason, and the names of the first few."""

    number: dict[str, int] = field(default_factory=lambda: dict.fromkeys(_REASONS, 0))
    examples: dict[str, list[str]] = field(default_factory=lambda: {reason: [] for reason in _REASONS})

    def add(self, reason: str, name: str) -> None:
        """reason: not_utf8, unreadable, empty or malformed."""
        self.number[reason] += 1
        if len(self.examples[reason]) < EXAMPLES:
            self.examples[reason].append(name.encode("utf-8", "replace").decode())

    def extend(self, later: Skipped) -> None:
        """Adds what was skipped after this."""
        for reason, names in later.examples.items():
            self.number[reason] += later.number[reason]
            self.examples[reason] = (self.examples[reason] + names)[:EXAMPLES]

    def counts(self) -> dict[str, int]:
        """Number of files and records by reason."""
        return dict(self.number)

    def __str__(self) -> str:
        found = ((reason, number) for reason, number in self.number.items() if number)
        return "; ".join(f"{number} {_REASONS[reason]} ({_some(self.examples[reason], number)})" for reason, number in found)


@dataclass(frozen=True)
class Corpus:
    """Text files in the shuffled order in which they are written, and files that hold many documents."""

    documents: tuple[Document, ...]
    containers: tuple[Document, ...]
    skipped: Skipped


def find_corpus(
    source: Path,
    *,
    globs: Sequence[str] = (),
    held_out: frozenset[str] = frozenset(),
    seed: int = 0,
    skip_folders: frozenset[str] = frozenset(),
) -> Corpus:
    """All text files below `source`, shuffled. Hidden files and folders are left out, and those named in `skip_folders`.

    globs: patterns on a document's name ('**' crosses folders); none means TEXT_SUFFIXES and CONTAINERS, but not both in a folder.
    held_out: names of what is kept from training; without any, the texts decide. The order depends on names and seed alone.
    DataError where the folder is missing or holds no text, and where names leave a split without a document.
    """
    if not source.is_dir():
        known = ", ".join((*CONTAINERS, ".json"))
        a_file = f"is a file that does not end in {known}, as files of records do; rename it if it is one, or give its folder"
        problem = a_file if source.exists() else "no such file or folder"
        raise DataError(f"--source {source}: {problem}")
    skipped = Skipped()
    wanted = _name_filter(globs)
    others: Counter[str] = Counter()
    documents, containers = [], []
    for document in _walk(source, skip_folders, skipped):
        if wanted(document.name):
            (containers if document.name.lower().endswith(CONTAINERS) else documents).append(document)
        else:
            others[document.path.suffix or "no suffix"] += 1
    containers = tuple(sorted(containers, key=lambda container: container.name))
    if documents and containers and not globs:
        raise DataError(
            f"--source {source}: holds {len(documents)} text files ({_some([document.name for document in documents])}) and "
            f"{len(containers)} files of records ({_some([container.name for container in containers])}); say which with --glob, "
            f"for example --glob '**/*{containers[0].path.suffix}'"
        )
    if not documents and containers:
        return Corpus((), containers, skipped)
    if not documents:
        found = ", ".join(f"{count} x {suffix}" for suffix, count in others.most_common(5)) or "no readable files at all"
        looked_for = f"--glob {' --glob '.join(globs)}" if globs else "the usual text suffixes"
        raise DataError(f"--source {source}: no text files; looked for {looked_for}, found {found}. Name them with --glob")
    documents.sort(key=lambda document: (_hash(f"order {seed}", os.fsencode(document.name)), document.name))
    return Corpus(tuple(_split(documents, held_out) if held_out else documents), containers, skipped)


def find_stdlib(*, globs: Sequence[str] = (), seed: int = 0) -> Corpus:
    """The running interpreter's standard library, read in place, with STDLIB_HELD_OUT kept from training."""
    source = Path(sysconfig.get_path("stdlib"))
    return find_corpus(source, globs=globs or ("**/*.py",), held_out=STDLIB_HELD_OUT, seed=seed, skip_folders=STDLIB_SKIPPED)


def _walk(source: Path, skip_folders: frozenset[str], skipped: Skipped) -> Iterator[Document]:
    """Regular files below `source`. Links are followed, and no file or folder is seen twice, so loops end."""
    seen: set[tuple[int, int]] = set()

    def name_of(path: str) -> str:
        return Path(path).relative_to(source).as_posix()

    def first_visit(path: str) -> os.stat_result | None:
        try:
            status = os.stat(path)
        except OSError:
            skipped.add("unreadable", name_of(path))
            return None
        identity = (status.st_dev, status.st_ino)
        if identity in seen:
            return None
        seen.add(identity)
        return status

    def refused(error: OSError) -> None:
        skipped.add("unreadable", name_of(error.filename))

    first_visit(str(source))
    for folder, folders, files in os.walk(source, followlinks=True, onerror=refused):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in skip_folders)
        folders[:] = [name for name in folders if first_visit(os.path.join(folder, name))]
        for name in sorted(files):
            path = os.path.join(folder, name)
            status = None if name.startswith(".") else first_visit(path)
            if status is not None and stat.S_ISREG(status.st_mode):
                yield Document(name_of(path), Path(path), status.st_size, status.st_mtime_ns)


def _split(documents: Sequence[Document], held_out: frozenset[str]) -> list[Document]:
    chosen = [replace(document, held_out=document.name in held_out) for document in documents]
    if not any(document.held_out for document in chosen):
        raise DataError(f"none of the held-out files is among the documents: let --glob match {_some(sorted(held_out))}")
    if all(document.held_out for document in chosen):
        raise DataError(f"all {len(chosen)} documents are held out, none is left to train on: let --glob match others")
    return chosen


def check_share(held_out: float) -> None:
    """DataError where it is no share of documents to keep from training."""
    if not 0 < held_out < 1:
        raise DataError(f"--held-out {held_out} is not a share between 0 and 1")


def place_of(content: bytes) -> float:
    """A number in [0, 1) that a document's text decides; those below --held-out are held out."""
    return _hash("held-out", content) / 2**64


def _hash(purpose: str, content: bytes) -> int:
    digest = hashlib.blake2b(content, digest_size=8, key=hashlib.blake2b(purpose.encode()).digest())
    return int.from_bytes(digest.digest(), "big")


def _name_filter(globs: Sequence[str]) -> Callable[[str], bool]:
    if not globs:
        return lambda name: os.path.splitext(name)[1].lower() in TEXT_SUFFIXES or name.lower().endswith(CONTAINERS)
    patterns = [re.compile(_regex(glob)) for glob in globs]
    return lambda name: any(pattern.fullmatch(name) for pattern in patterns)


def _regex(glob: str) -> str:
    """A glob on whole names as a regular expression: '**/' is any folders or none, '*' and '?' stay inside one name."""
    signs = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return "".join(signs.get(part, re.escape(part)) for part in re.split(r"(\*\*/|\*\*|\*|\?)", glob))


def _some(names: Sequence[str], number: int | None = None, limit: int = 3) -> str:
    """The first few of `number` names."""
    shown = ", ".join(name.encode("utf-8", "replace").decode() for name in names[:limit])
    return shown + (", ..." if (number or len(names)) > limit else "")
