"""Writing files so that they are on the disk before anything depends on them, and telling whether they are the same."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import IO


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_file(file: IO) -> None:
    """Waits until what was written to an open file is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_path(path: Path) -> None:
    """Waits until a file that was written and closed, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, content: bytes) -> None:
    """Writes a whole file and waits until it is on the disk. Not atomic: rename, or write what names it last."""
    with path.open("wb") as file:
        file.write(content)
        sync_file(file)


def replace_durably(path: Path, content: bytes) -> None:
    """Writes a whole file in the place of an older one: a reader, or a kill, finds either of them."""
    fresh = path.with_name(f".{path.name}.tmp")
    write_durably(fresh, content)
    fresh.replace(path)
    sync_path(path.parent)
