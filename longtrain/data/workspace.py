"""The folder of prepared data: it appears whole or not at all, and what a killed preparation wrote waits beside it."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from longtrain.data.corpus import Skipped
from longtrain.data.manifest import MANIFEST, TOKENIZER, TOKENIZER_JSON
from longtrain.data.shards import Written
from longtrain.errors import DataError
from longtrain.files import replace_durably, sync_path, write_durably

PLAN = "plan.json"
JOURNAL = "journal.json"

_FILES = "|".join(map(re.escape, (MANIFEST, TOKENIZER, TOKENIZER_JSON, PLAN, JOURNAL)))
_OURS = re.compile(rf"{_FILES}|(train|heldout)-\d+\.(bin|idx)")


class Journal(BaseModel):
    """How far an unfinished preparation is: everything before source number `source`, and that one up to `after`.

    written: the files of both splits at that point. records: all that were read, whatever became of them. unknown: tokens written
    that stand for text without one of its own.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: int = 0
    after: Any = None
    records: int = 0
    unknown: int = 0
    skipped: Skipped
    written: dict[str, Written] = {}

    def save(self, folder: Path) -> None:
        """Replaces the journal of a work folder; what it says must be on the disk already."""
        replace_durably(folder / JOURNAL, self.model_dump_json().encode())

    @classmethod
    def load(cls, folder: Path) -> Journal | None:
        """The journal of a work folder, None where work has only begun. DataError where it is damaged."""
        try:
            return cls.model_validate_json((folder / JOURNAL).read_bytes())
        except FileNotFoundError:
            return None
        except ValidationError:
            raise DataError(f"{folder / JOURNAL}: is damaged; start over with --overwrite, or delete {folder}") from None


def check_target(out: Path, overwrite: bool) -> None:
    """DataError unless `out` may be created, or replaced without losing anything but older prepared data."""
    if not out.exists() and not out.is_symlink():
        return
    if not out.is_dir():
        raise DataError(f"--out {out}: is a file; give a folder")
    entries = sorted(entry.name for entry in out.iterdir())
    if not entries:
        return
    if not overwrite:
        raise DataError(f"--out {out}: exists and is not empty; choose another folder, or replace it with --overwrite")
    foreign = [name for name in entries if not _OURS.fullmatch(name)]
    if foreign:
        raise DataError(f"--out {out}: holds {foreign[0]!r}, which is no prepared data: refusing to --overwrite it")


@contextmanager
def work_folder(out: Path, plan: Mapping[str, Any], overwrite: bool) -> Iterator[Path]:
    """A sibling folder to write into; on success it takes the place of `out`, on any error `out` stays as it is.

    A folder with a journal survives errors and kills as .NAME.partial, and is given again for the same plan (plain JSON values by
    the names that a message may use). DataError as in `check_target`, for an unfinished folder of another plan unless `overwrite`,
    and while another process works there.
    """
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial")
    replaced = out.with_name(f".{out.name}.replaced")
    if replaced.exists() and not out.exists():
        replaced.rename(out)  # a swap was cut between its two renames
    check_target(out, overwrite)
    partial.mkdir(exist_ok=True)
    with _locked(partial, out):
        try:
            _take_up(partial, plan, overwrite)
            yield partial
            sync_path(partial)
            check_target(out, overwrite)
            _swap(partial, out, replaced)
            for name in (JOURNAL, PLAN):
                (out / name).unlink(missing_ok=True)
        except BaseException:
            if partial.exists() and not (partial / JOURNAL).exists():
                shutil.rmtree(partial, ignore_errors=True)
            raise
    shutil.rmtree(replaced, ignore_errors=True)


@contextmanager
def _locked(folder: Path, out: Path) -> Iterator[None]:
    """The folder for this process alone. The lock goes with the process, however that ends."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            same = os.path.samestat(os.fstat(descriptor), os.stat(folder))
        except (BlockingIOError, FileNotFoundError):
            same = False
        if not same:
            raise DataError(f"--out {out}: another process is preparing it; wait for that, or choose another folder")
        yield
    finally:
        os.close(descriptor)


def _take_up(partial: Path, plan: Mapping[str, Any], overwrite: bool) -> None:
    """An empty folder with the plan in it, or the unfinished one of the same plan."""
    text = json.dumps(plan, sort_keys=True)
    if (partial / JOURNAL).exists():
        try:
            old = json.loads((partial / PLAN).read_bytes())
        except (OSError, ValueError, RecursionError):
            old = {}
        if json.dumps(old, sort_keys=True) == text:
            return
        if not overwrite:
            changed = ", ".join(key for key in plan if not isinstance(old, dict) or old.get(key) != plan[key])
            raise DataError(
                f"{partial}: holds an unfinished preparation that differs in: {changed}; give the command of that one to "
                "finish it, or throw it away with --overwrite"
            )
    for path in partial.iterdir():
        path.unlink()
    write_durably(partial / PLAN, text.encode())


def _swap(new: Path, out: Path, replaced: Path) -> None:
    shutil.rmtree(replaced, ignore_errors=True)
    if out.exists():
        out.rename(replaced)
    try:
        new.rename(out)
    except BaseException:
        if replaced.exists():
            replaced.rename(out)
        raise
    sync_path(out.parent)
