"""Checkpoints on disk: finding, checking, reading, publishing and deleting them. No engine, no GPU, no other ranks.

A checkpoint is complete when its folder is called step-N; one that then lacks anything is damaged. Others are in the making (.tmp),
were set aside because they are damaged (.damaged), or wait, for the moment between two renames, to be replaced (.replaced).
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from longtrain.errors import CheckpointError
from longtrain.files import sha256_of, sync_path
from longtrain.train.checkpoint_format import (
    DAMAGED,
    MANIFEST,
    STATE,
    STEP_FOLDER,
    GoneError,
    Manifest,
    UnreadableError,
    content_of,
    read_manifest,
    read_state,
)
from longtrain.train.threads import in_threads

KINDS = ("master", "exp_avg", "exp_avg_sq")


def complete(folder: Path) -> list[Path]:
    """Finished checkpoints under `folder`, by step, damaged ones too; none where it does not exist.

    Raises UnreadableError where it cannot be listed: what a run has learnt may be there.
    """
    try:
        with os.scandir(folder) as entries:
            found = [match for entry in entries if (match := STEP_FOLDER.fullmatch(entry.name)) and entry.is_dir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise UnreadableError(f"{folder}: cannot be listed: {error.strerror}; see to its permissions and its disk") from error
    steps: dict[int, Path] = {}
    # step-N sorts before step-N.replaced, which counts only where the rename after it never came
    for match in sorted(found, key=lambda match: match[0]):
        steps.setdefault(int(match[1]), folder / match[0])
    return [steps[step] for step in sorted(steps)]


def find_latest(folder: Path) -> Path | None:
    """The finished checkpoint with the highest step under `folder`, None where there is none."""
    return (complete(folder) or [None])[-1]


def is_checkpoint(path: Path) -> bool:
    """Whether this is a step folder, a damaged one too, and not a folder with some. Prepared data has a manifest as well."""
    named = STEP_FOLDER.fullmatch(path.name) is not None and path.is_dir()
    return named or all((path / name).is_file() for name in (MANIFEST, STATE))


def resolve(path: Path) -> Path:
    """`path` if it is a step folder, else the newest one under it. Raises CheckpointError where there is none."""
    if is_checkpoint(path):
        return path
    latest = find_latest(path)
    if latest is None:
        if not path.exists():
            raise CheckpointError(f"{path}: no such folder; name a run's folder or one of its checkpoints")
        raise CheckpointError(f"{path}: no whole checkpoint here (no {MANIFEST}, and no step-... folder)")
    return latest


def digest_of(step: Path) -> str:
    """A digest of all that a step folder holds: its manifest has the digest of every file. Raises as
    `content_of`."""
    return hashlib.sha256(content_of(step / MANIFEST)).hexdigest()


def check_files(
    step: Path, manifest: Manifest, names: Iterable[str], *, content: bool = True, alive: Callable[[], None] = lambda: None
) -> None:
    """Raises CheckpointError that names the first of these files that is missing or not what was written, or UnreadableError.

    content: whether to read every byte; else only sizes are compared. alive: called before each file.
    """
    if found := _wrong_files(step, manifest, names, content, alive):
        raise found[0]


def _wrong_files(
    step: Path, manifest: Manifest, names: Iterable[str], content: bool, alive: Callable[[], None] = lambda: None
) -> list[CheckpointError]:
    """What is wrong with these files, one for every one that is."""

    def wrong(name: str) -> CheckpointError | None:
        alive()
        path, entry = step / name, manifest.files[name]
        try:
            found = path.stat()
            if not stat.S_ISREG(found.st_mode):
                return CheckpointError(f"{path}: is no file; {DAMAGED}")
            if found.st_size != entry.size:
                return CheckpointError(f"{path}: {found.st_size} bytes instead of {entry.size}; {DAMAGED}")
            if content and sha256_of(path) != entry.sha256:
                return CheckpointError(f"{path}: SHA-256 differs from the manifest; {DAMAGED}")
        except FileNotFoundError:
            return CheckpointError(f"{path}: missing; {DAMAGED}")
        except OSError as error:
            return UnreadableError(f"{path}: cannot be read: {error.strerror}")
        return None

    return [problem for problem in in_threads(wrong, names) if problem is not None]


def problems(step: Path, *, content: bool = True) -> list[CheckpointError]:
    """What is wrong with a step folder, one for every file; nothing where it is sound.

    UnreadableError or OtherVersionError where that is all that is known of a file; any other says that it is damaged. content: as
    for `check_files`. Raises GoneError where it is not there, or no longer: a run that goes on deletes its older ones.
    """
    before = _identity(step)
    found = _problems(step, content)
    if found and _identity(step) != before:
        # of two folders that had the same name in turn; the newer one has said nothing yet
        return problems(step, content=content)
    return found


def _identity(step: Path) -> tuple[int, int] | None:
    """Equal as long as a step folder is the same one; None where the system does not say. Raises GoneError where there is none."""
    try:
        found = step.stat()
    except FileNotFoundError as error:
        raise GoneError(f"{step}: deleted meanwhile") from error
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _problems(step: Path, content: bool) -> list[CheckpointError]:
    try:
        manifest = read_manifest(step)
        found = _wrong_files(step, manifest, sorted(manifest.files), content)
        if not found:
            read_state(step)
            check_ranges(step, manifest)
    except CheckpointError as error:
        return [error]
    return found


def damage(step: Path, *, content: bool = True) -> list[str]:
    """`problems` in words, a line for each."""
    return [str(problem) for problem in problems(step, content=content)]


def verify(path: Path) -> Manifest:
    """Check sizes and SHA-256 of every file of a step folder (or the newest one) and that every parameter is covered.

    Raises CheckpointError that names the damaged file or the parameter.
    """
    step = resolve(path)
    if found := damage(step):
        raise CheckpointError("\n".join(found))
    return read_manifest(step)


def check_ranges(step: Path, manifest: Manifest) -> None:
    """Opens every rank file, and reads none. Raises CheckpointError that names the file that is no safetensors file of ranges, or
    the parameter of which elements are in none, or that the manifest lacks."""
    pieces = Pieces(step, manifest)
    if unknown := pieces.parameters - manifest.parameters.keys():
        raise CheckpointError(f"{step / MANIFEST}: lacks parameter {min(unknown)}, of which its files hold ranges; {DAMAGED}")
    for name, entry in manifest.parameters.items():
        if prod(entry.shape) != entry.numel:
            raise CheckpointError(f"{step / MANIFEST}: parameter {name} of shape {entry.shape} cannot have {entry.numel} elements")
        for kind in KINDS:
            pieces.find(kind, name, 0, entry.numel)


def read_master(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Every parameter of a verified checkpoint, whole, fp32, on the host, one at a time; needs no engine and no GPU."""
    manifest = verify(path)
    pieces = Pieces(resolve(path), manifest)
    for name, entry in manifest.parameters.items():
        whole = torch.empty(entry.numel, dtype=torch.float32)
        pieces.read("master", name, 0, whole)
        yield name, whole.view(entry.shape)


class Pieces:
    """The ranges of all rank files of a checkpoint, as one address space per kind and parameter."""

    def __init__(self, step: Path, manifest: Manifest) -> None:
        self._step = step
        self._files: dict[str, Any] = {}
        self._index: dict[tuple[str, str], list[tuple[int, int, str, str]]] = {}
        for name in sorted(manifest.files):
            if name != STATE:
                self._add(name)
        for pieces in self._index.values():
            pieces.sort()

    @property
    def parameters(self) -> set[str]:
        """Of which there are ranges."""
        return {parameter for _, parameter in self._index}

    def _add(self, file: str) -> None:
        try:
            handle = self._files[file] = _open(self._step / file)
            for key in handle.keys():  # noqa: SIM118 (not a mapping)
                match, values = re.fullmatch(r"([a-z_]+)/(.+)@(\d{1,18})", key), handle.get_slice(key)
                shape = values.get_shape()
                if match is None or len(shape) != 1 or values.get_dtype() != "F32":
                    raise CheckpointError(f"{self._step / file}: tensor {key!r} is not a flat fp32 range of a parameter")
                kind, parameter, start = match[1], match[2], int(match[3])
                end = start + shape[0]
                self._index.setdefault((kind, parameter), []).append((start, end, file, key))
        except OSError as error:
            raise UnreadableError(f"{self._step / file}: cannot be read: {error.strerror or error}") from error
        except SafetensorError as error:
            raise CheckpointError(f"{self._step / file}: not readable: {error}") from error

    def find(self, kind: str, parameter: str, start: int, end: int) -> list[tuple[int, int, str, str]]:
        """The ranges that overlap [start, end), in order. Raises CheckpointError where they leave a hole."""
        found, covered = [], start
        for piece in self._index.get((kind, parameter), []):
            if piece[1] > covered and piece[0] < end:
                if piece[0] > covered:
                    break
                found.append(piece)
                covered = piece[1]
        if covered < end:
            raise CheckpointError(
                f"{self._step}: elements {covered} to {end} of {kind} of parameter {parameter} are in none of its files"
            )
        return found

    def read(self, kind: str, parameter: str, start: int, out: Tensor) -> None:
        """Fill `out` [n] with elements [start, start + n) of a parameter. Files are mapped: nothing else of them is read."""
        end = start + out.numel()
        for piece_start, piece_end, file, key in self.find(kind, parameter, start, end):
            low, high = max(start, piece_start), min(end, piece_end)
            values = self._files[file].get_slice(key)[low - piece_start : high - piece_start]
            out[low - start : high - start].copy_(values)


def _open(path: Path) -> Any:
    """A safetensors file. Raises OSError where the system does not let us open it."""
    try:
        return safe_open(path, framework="pt")
    except (OSError, RuntimeError):
        # safetensors calls every refusal a missing file, and torch, which opens the file once more, calls it a RuntimeError
        with path.open("rb"):
            raise


def publish(temporary: Path, final: Path) -> None:
    """Make a finished folder appear under its name, on disk. At every moment one of the two is a whole checkpoint."""
    sync_path(temporary)
    replaced = final.with_name(final.name + ".replaced")
    if os.path.lexists(final):
        # saved before and now again; a rename cannot replace a folder that is not empty, nor a file
        _remove(replaced)
        final.rename(replaced)
    try:
        temporary.rename(final)
    except OSError:
        if os.path.lexists(replaced):
            replaced.rename(final)
        raise
    sync_path(final.parent)
    _remove(replaced)


def delete(step: Path) -> bool:
    """Delete a checkpoint so that a kill in the middle does not leave something that looks like one. Whether it was still there: a
    run and `longtrain checkpoint prune` may delete the same one."""
    doomed = step.with_name(step.name + ".deleted.tmp")
    _remove(doomed)
    try:
        step.rename(doomed)
    except FileNotFoundError:
        return False
    _remove(doomed)
    return True


def _remove(path: Path) -> None:
    """Delete a folder and all that is in it, or what else has taken its name; as far as the system lets us."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def set_aside(step: Path) -> Path:
    """Rename a damaged checkpoint, so that it is neither found nor counted any more; returns where it is."""
    base = step.with_name(step.name + ".damaged")
    aside = next(path for path in (base, *(base.with_name(f"{base.name}-{n}") for n in range(2, 1000))) if not path.exists())
    step.rename(aside)
    return aside


def found_aside(folder: Path) -> list[Path]:
    """What `set_aside` put away, of all runs so far."""
    return sorted(path for path in folder.glob("step-*.damaged*") if path.is_dir())


def remove_leftovers(folder: Path) -> None:
    """Delete what dead runs left half written. For the main rank, at start, before anything is saved."""
    for leftover in folder.glob("step-*.tmp"):
        _remove(leftover)
    for replaced in folder.glob("step-*.replaced"):
        final = replaced.with_name(replaced.name.removesuffix(".replaced"))
        if os.path.lexists(final):
            _remove(replaced)
        else:
            replaced.rename(final)
