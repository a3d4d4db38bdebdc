"""What `longtrain checkpoint` does: listing, checking and pruning the checkpoints of a run. No engine, no GPU, no other ranks."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from longtrain.errors import CheckpointError
from longtrain.train.checkpoint_folder import complete, delete, found_aside, is_checkpoint, problems
from longtrain.train.checkpoint_format import (
    DAMAGED,
    GoneError,
    OtherVersionError,
    UnreadableError,
    read_manifest,
    read_state,
)
from longtrain.train.resume import CHECKPOINTS


@dataclass(frozen=True)
class Verdict:
    """What is to be said of checkpoints that are not right. kind: of all that is wrong with one. short: in a list. reason: why it
    goes, or stays, when others are deleted. advice: what to do about it."""

    kind: type[CheckpointError]
    short: str
    reason: str
    advice: str


DAMAGE = Verdict(
    CheckpointError,
    "DAMAGED",
    "damaged",
    "training, export and report pass over damaged checkpoints; `longtrain checkpoint prune` deletes them, and all but the newest "
    "sound ones",
)
OTHERS = (
    Verdict(
        UnreadableError,
        "UNREADABLE",
        "cannot be read, and may be right",
        "what cannot be read may be right: see to its permissions and its disk; until then training, export and report pass over "
        "it, and `longtrain checkpoint prune` leaves it",
    ),
    Verdict(
        OtherVersionError,
        "OTHER VERSION",
        "another version of longtrain wrote it",
        "training refuses to go on beside a checkpoint of another version, and `longtrain checkpoint prune` leaves it",
    ),
)
"""A checkpoint is damaged unless one of these is all that is known to be wrong with it."""


@dataclass(frozen=True)
class Entry:
    """A checkpoint as it is listed. problems: as for a step folder, empty where it is sound. The rest is None where it cannot be
    read.

    loss: of the step, None in older ones. bytes: of its files. world, stage: what saved it.
    """

    path: Path
    problems: tuple[CheckpointError, ...]
    step: int | None = None
    tokens: int | None = None
    loss: float | None = None
    bytes: int | None = None
    world: int | None = None
    stage: int | None = None

    def state(self, sound: str) -> str:
        """The verdict in short, or `sound`."""
        return judge(self.problems).short if self.problems else sound


def find(path: Path) -> list[Path]:
    """The checkpoint at `path`, or all under the folder of a run, by step. Raises CheckpointError where there is none."""
    if is_checkpoint(path):
        return [path]
    found = complete(_folder(path))
    if not found:
        problem = "no whole checkpoint here" if path.exists() else "no such folder"
        raise CheckpointError(f"{path}: {problem}; name a run's folder or a checkpoint's")
    return found


def _folder(path: Path) -> Path:
    """Where the checkpoints of the run at `path` are, or the folder itself."""
    return path / CHECKPOINTS if (path / CHECKPOINTS).is_dir() else path


def aside(path: Path) -> str | None:
    """What is to be said of checkpoints that a run at `path` went back past and set aside, None where there are none."""
    if not (found := found_aside(_folder(path))):
        return None
    size = sum(_size(step) for step in found)
    names = ", ".join(step.name for step in found)
    return f"set aside, {size / 2**20:,.1f} MiB: {names}; `longtrain checkpoint prune` deletes what was set aside"


def _size(folder: Path) -> int:
    """Bytes of all files below a folder that may be deleted meanwhile."""
    size = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                size += os.lstat(Path(place, name)).st_size
    return size


def is_ours(path: Path) -> bool:
    """Whether this is a checkpoint of ours, or a folder with some."""
    return is_checkpoint(path) or any(complete(folder) for folder in (path, path / CHECKPOINTS))


def without_advice(problems: Iterable[str]) -> list[str]:
    """What is wrong with files, without what to do about it, which several of them have in common."""
    return [problem.removesuffix(f"; {DAMAGED}") for problem in problems]


def judge(found: Sequence[CheckpointError]) -> Verdict:
    """The verdict on a checkpoint of which this, and at least something, is wrong."""
    return next((other for other in OTHERS if all(isinstance(problem, other.kind) for problem in found)), DAMAGE)


def refuse_unsound(entries: Iterable[Entry]) -> None:
    """Raises CheckpointError of all that is wrong with these, and what to do about it; nothing where they are sound."""
    unsound = [entry for entry in entries if entry.problems]
    if unsound:
        advice = dict.fromkeys(judge(entry.problems).advice for entry in unsound)
        raise CheckpointError("\n".join([*_lines(problem for entry in unsound for problem in entry.problems), *advice]))


def _lines(found: Iterable[CheckpointError]) -> list[str]:
    return without_advice(str(problem) for problem in found)


def examine_all(path: Path, *, content: bool) -> list[Entry]:
    """Every checkpoint of `find` that is still there once it is read, and at least one; content: as for `examine`."""
    while True:
        entries = [examine(step, content=content) for step in find(path)]
        # a run may meanwhile have saved others, and deleted all that were there
        if left := [entry for entry in entries if entry is not None]:
            return left


def examine(path: Path, *, content: bool) -> Entry | None:
    """One checkpoint, read as far as it can be; None where it was deleted meanwhile. content: whether to read every byte; else only
    what tells of torn files."""
    try:
        found = tuple(problems(path, content=content))
    except GoneError:
        return None
    try:
        manifest, state = read_manifest(path), read_state(path)
    except CheckpointError:
        # right a moment ago: it is another one by now, or none
        return Entry(path, found) if found else examine(path, content=content)
    return Entry(path, found, manifest.step, state.tokens, state.loss, manifest.bytes, manifest.world, manifest.stage)


def table(entries: Sequence[Entry], *, verified: bool) -> Table:
    """Entries for people. verified: they were examined with their content."""
    shown = Table("step", "tokens", "loss", "size", "ranks", "ZeRO", "state", box=None, header_style="bold", pad_edge=False)
    for entry in entries:
        state = entry.state("verified" if verified else "whole, not verified")
        if entry.step is None:
            shown.add_row(entry.path.name, *[""] * 5, state)
            continue
        loss = "" if entry.loss is None else f"{entry.loss:.4f}"
        size = f"{(entry.bytes or 0) / 2**20:,.1f} MiB"
        shown.add_row(f"{entry.step}", f"{entry.tokens:,}", loss, size, f"{entry.world}", f"{entry.stage}", state)
    return shown


def prune(path: Path, keep: int, *, dry_run: bool = False) -> Iterator[tuple[Path, bool, str]]:
    """Deletes all but the `keep` newest checkpoints of a run of which every byte is right; yields each that goes, or that stays and
    is not known to be right, whether it goes, and why.

    Damaged ones go too, and what was set aside. What a run in training deletes meanwhile is passed over. Raises CheckpointError,
    and deletes nothing, where none is right.
    """
    if keep < 1:
        raise CheckpointError(f"--keep {keep}: keep at least 1")
    if is_checkpoint(path):
        raise CheckpointError(f"{path}: is one checkpoint; name the folder of its run")
    while True:
        good, answers, wrong, gone = 0, [], [], False
        for step in reversed(find(path)):
            if good == keep:
                answers.append((step, True, "a newer one is right" if keep == 1 else f"{keep} newer ones are right"))
                continue
            try:
                found = problems(step)
            except GoneError:
                gone = True
                continue
            if found:
                verdict = judge(found)
                answers.append((step, verdict is DAMAGE, verdict.reason))
                wrong += found
            else:
                good += 1
        if good:
            break
        if not gone:  # else a newer one may be there by now
            raise CheckpointError("\n".join([*_lines(wrong), f"{path}: not one checkpoint is right, so that nothing was deleted"]))
    for step in found_aside(_folder(path)):
        with suppress(GoneError):
            found = problems(step, content=False)
            spared = bool(found) and judge(found) is not DAMAGE
            answers.append((step, not spared, judge(found).reason if spared else "was set aside"))
    for step, goes, reason in answers:
        if not goes or dry_run or delete(step):
            yield step, goes, reason
