"""Going on where a run stopped: which checkpoint, whether it is of this run, and what is kept in one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longtrain.data.packed import PackedSplit
from longtrain.errors import CheckpointError
from longtrain.parallel.deepspeed import Engine
from longtrain.recipe.load import dump_recipe, parse_recipe
from longtrain.recipe.schema import Recipe
from longtrain.train import checkpoint
from longtrain.train.state import Progress

CHECKPOINTS = "checkpoints"

# Fields that a resumed run may change: how the work is done and reported, not what is learnt. A longer run is allowed too, though
# it moves the learning rate.
FREE_SECTIONS = {"attention", "parallel", "zero", "checkpoint", "evaluation", "tracking"}
FREE_FIELDS = {
    "name",
    "output",
    "device",
    "data.path",
    "training.steps",
    "training.micro_batch_size",
    "training.activations",
}


@dataclass(frozen=True)
class Start:
    """Where a run begins: at a checkpoint, or at step 0 where there is none. remarks: what to tell the user."""

    checkpoint: Path | None
    remarks: tuple[str, ...] = ()


def choose(recipe: Recipe, split: PackedSplit, wanted: str) -> Start:
    """Resolves --resume auto | never | PATH for this recipe and data; reads small files only, writes nothing.

    Raises CheckpointError where the checkpoint is missing, of another recipe or of other data, or would be written over.
    """
    folder = Path(recipe.run_folder) / CHECKPOINTS
    latest = checkpoint.find_latest(folder)
    if wanted == "never":
        if latest is not None:
            raise CheckpointError(
                f"{folder}: holds checkpoints of an earlier run, which --resume never would write over; set another name or "
                "output, or delete the folder"
            )
        return Start(None)
    if wanted == "auto":
        path = latest
    else:
        path = find_checkpoint(Path(wanted))
        if latest is not None and latest.resolve() != path.resolve():
            # going on from an older step here would leave two futures in one folder, and auto would take the abandoned one
            raise CheckpointError(
                f"{folder}: holds checkpoints up to {latest.name}; to go on from {path} instead, set another name or output, or "
                "delete the newer ones"
            )
    if path is None:
        return Start(None)
    checkpoint.read_manifest(path)  # a folder of something else is refused as such
    state = checkpoint.read_state(path)
    changes = list(_changes(parse_recipe(state.recipe, f"{path}/state.json"), recipe))
    _refuse_other_run(path, changes)
    if state.data != split.manifest.fingerprint("train"):
        raise CheckpointError(
            f"{path}: was trained on other data than {split.folder} (other tokens, documents or tokenizer); "
            "set data.path to the data of that run, or start a new run under another name"
        )
    remarks = [f"resuming {path} (step {state.step})"]
    remarks += [f"changed since that checkpoint: {field}: {before} -> {after}" for field, before, after in changes]
    if any(field == "training.steps" for field, _, _ in changes) and recipe.schedule.kind != "constant":
        remarks.append(
            f"the {recipe.schedule.kind} schedule now ends at step {recipe.training.steps}: the learning rate jumps here"
        )
    return Start(path, tuple(remarks))


def find_checkpoint(run: Path) -> Path:
    """The newest checkpoint of a run's folder, or the one at that path. Raises CheckpointError where there is none."""
    return checkpoint.resolve(run / CHECKPOINTS if (run / CHECKPOINTS).is_dir() else run)


def restore(engine: Engine, start: Path) -> Progress:
    """Loads a checkpoint into the engine. A collective of all ranks."""
    state = checkpoint.load(start, engine)
    return Progress(state.step, state.tokens, state.cursor)


def save_checkpoint(engine: Engine, recipe: Recipe, split: PackedSplit, progress: Progress, folder: Path) -> Path:
    """Writes a checkpoint into the run's folder. A collective of all ranks."""
    state = checkpoint.TrainState(
        step=progress.step,
        tokens=progress.tokens,
        cursor=progress.sequences,
        recipe=dump_recipe(recipe),
        data=split.manifest.fingerprint("train"),
    )
    return checkpoint.save(folder / CHECKPOINTS, engine, state, recipe.checkpoint.keep)


def _refuse_other_run(path: Path, changes: list[tuple[str, Any, Any]]) -> None:
    fixed = [change for change in changes if change[0] not in FREE_FIELDS and change[0].split(".")[0] not in FREE_SECTIONS]
    if fixed:
        lines = "\n".join(f"  {field}: {before} in the checkpoint, {after} in this recipe" for field, before, after in fixed)
        raise CheckpointError(
            f"{path}: is a checkpoint of another recipe:\n{lines}\nset these back; or start from step 0 without that checkpoint, "
            "under a name of its own (starting a run from the weights of another is not implemented yet)"
        )


def _changes(before: Recipe, after: Recipe) -> Iterator[tuple[str, Any, Any]]:
    """(field, value before, value after) of every field that differs."""
    old, new = flat(before.model_dump(mode="json")), flat(after.model_dump(mode="json"))
    for field in sorted(old.keys() | new.keys()):
        if old.get(field) != new.get(field):
            yield field, old.get(field), new.get(field)


def flat(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted names and values of nested sections."""
    fields: dict[str, Any] = {}
    for name, value in section.items():
        fields |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return fields
