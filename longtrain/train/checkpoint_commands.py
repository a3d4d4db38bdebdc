"""What `longtrain checkpoint` does: listing, checking and pruning the checkpoints of a run. No engine, no GPU, no other ranks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from longtrain.errors import CheckpointError
from longtrain.train.checkpoint_folder import complete, damage, delete
from longtrain.train.checkpoint_format import DAMAGED, MANIFEST, STATE, read_manifest, read_state
from longtrain.train.resume import CHECKPOINTS


@dataclass(frozen=True)
class Entry:
    """A checkpoint as it is listed. damage: in words, empty where it is sound. The rest is None where it cannot be read.

    loss: of the step, None in older ones. bytes: of its files. world, stage: what saved it.
    """

    path: Path
    damage: tuple[str, ...]
    step: int | None = None
    tokens: int | None = None
    loss: float | None = None
    bytes: int | None = None
    world: int | None = None
    stage: int | None = None


def find(path: Path) -> list[Path]:
    """The checkpoint at `path`, or all under the folder of a run, by step. Raises CheckpointError where there is none."""
    if (path / MANIFEST).is_file():
        return [path]
    folder = path / CHECKPOINTS if (path / CHECKPOINTS).is_dir() else path
    found = complete(folder)
    if not found:
        problem = "no whole checkpoint here" if path.exists() else "no such folder"
        raise CheckpointError(f"{path}: {problem}; name a run's folder or a checkpoint's")
    return found


def is_ours(path: Path) -> bool:
    """Whether this is a checkpoint of ours, or a folder with some."""
    # other libraries have files of either name
    return all((path / name).is_file() for name in (MANIFEST, STATE)) or any(
        complete(folder) for folder in (path, path / CHECKPOINTS)
    )


def without_advice(problems: Iterable[str]) -> list[str]:
    """What is wrong with files, without what to do about it, which several of them have in common."""
    return [problem.removesuffix(f"; {DAMAGED}") for problem in problems]


def refuse_damage(problems: Sequence[str]) -> None:
    """Raises CheckpointError of all of these, and what to do about them; nothing where there are none."""
    if problems:
        advice = (
            "training, export and report pass over damaged checkpoints; `longtrain checkpoint prune` deletes them, and all but "
            "the newest sound ones"
        )
        raise CheckpointError("\n".join([*without_advice(problems), advice]))


def examine(path: Path, *, content: bool) -> Entry:
    """One checkpoint, read as far as it can be. content: whether to read every byte; else only what tells of torn files."""
    found = tuple(damage(path, content=content))
    try:
        manifest, state = read_manifest(path), read_state(path)
    except CheckpointError:
        return Entry(path, found)
    return Entry(path, found, manifest.step, state.tokens, state.loss, manifest.bytes, manifest.world, manifest.stage)


def table(entries: Sequence[Entry], *, verified: bool) -> Table:
    """Entries for people. verified: they were examined with their content."""
    shown = Table("step", "tokens", "loss", "size", "ranks", "ZeRO", "state", box=None, header_style="bold", pad_edge=False)
    for entry in entries:
        state = "DAMAGED" if entry.damage else "verified" if verified else "whole, not verified"
        if entry.step is None:
            shown.add_row(entry.path.name, *[""] * 5, state)
            continue
        loss = "" if entry.loss is None else f"{entry.loss:.4f}"
        size = f"{(entry.bytes or 0) / 2**20:,.1f} MiB"
        shown.add_row(f"{entry.step}", f"{entry.tokens:,}", loss, size, f"{entry.world}", f"{entry.stage}", state)
    return shown


def prune(path: Path, keep: int, *, dry_run: bool = False) -> Iterator[tuple[Path, str]]:
    """Deletes all but the `keep` newest checkpoints of a run of which every byte is right; yields each that goes, and why.

    Damaged ones go too. Raises CheckpointError, and deletes nothing, where none is right.
    """
    if keep < 1:
        raise CheckpointError(f"--keep {keep}: keep at least 1")
    good, doomed, problems = 0, [], []
    for step in reversed(find(path)):
        if good == keep:
            doomed.append((step, "a newer one is right" if keep == 1 else f"{keep} newer ones are right"))
        elif found := damage(step):
            doomed.append((step, "damaged"))
            problems += found
        else:
            good += 1
    if not good:
        raise CheckpointError(
            "\n".join([*without_advice(problems), f"{path}: not one checkpoint is right, so that nothing was deleted"])
        )
    for step, reason in doomed:
        if not dry_run:
            delete(step)
        yield step, reason
