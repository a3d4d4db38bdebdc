"""Going on where a run stopped: which checkpoint, whether it is of this run, and what is kept in one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from longtrain.data.mixture import Split
from longtrain.errors import CheckpointError
from longtrain.parallel.context import ParallelContext
from longtrain.parallel.deepspeed import Engine
from longtrain.recipe.load import dump_recipe, parse_recipe
from longtrain.recipe.schema import Recipe
from longtrain.recipe.section import as_written
from longtrain.train import checkpoint
from longtrain.train.checkpoint_folder import check_files, complete, digest_of, find_latest, problems, resolve
from longtrain.train.checkpoint_format import (
    MANIFEST,
    STATE,
    Origin,
    OtherVersionError,
    TrainState,
    read_manifest,
    read_state,
    step_of,
)
from longtrain.train.state import Progress, RecentLosses

CHECKPOINTS = "checkpoints"

# Fields that a resumed run may change: how the work is done and reported, not what is learnt. A longer run is allowed too, though
# it moves the learning rate. What is learnt from is compared by its fingerprint, a preset by the shape that it gives, and where the
# first weights came from no longer matters.
FREE_SECTIONS = {"data", "attention", "parallel", "zero", "checkpoint", "guards", "evaluation", "tracking"}
FREE_FIELDS = {
    "name",
    "output",
    "device",
    "model.preset",
    "model.init",
    "model.positions.extend",
    "training.steps",
    "training.micro_batch_size",
    "training.activations",
    "training.fused",
    "training.max_skipped",
}

SHAPE = {
    f"model.{field}"
    for field in (
        "family",
        "vocab_size",
        "hidden_size",
        "layers",
        "heads",
        "kv_heads",
        "head_dim",
        "intermediate_size",
        "tied_embeddings",
    )
}
"""Of which parameters have their shapes: nothing goes on from another one."""

Damaged = tuple[Path, str]
"""A checkpoint that cannot be gone on from, and why."""
Change = tuple[str, Any, Any]
"""A field of a recipe, its value before, and now."""


@dataclass(frozen=True)
class Start:
    """Where a run begins: at a checkpoint, or at step 0 where there is none.

    remarks: what to tell the user of this checkpoint. notes: what to tell him whichever it is. tracker: the id that an experiment
    tracker has the run under. origin: as in TrainState. damaged: newer checkpoints that were passed over. earlier: given the reason
    for which this one is passed over too, where the run begins then; None where nothing but this one will do.
    """

    checkpoint: Path | None
    remarks: tuple[str, ...] = ()
    tracker: str | None = None
    origin: Origin | None = None
    damaged: tuple[Path, ...] = ()
    earlier: Callable[[str], Start] | None = None
    notes: tuple[str, ...] = ()


def choose(recipe: Recipe, split: Split, wanted: str, *, force: bool = False) -> Start:
    """Resolves --resume auto | never | PATH for the recipe of a plan and its data; writes nothing, and reads small files only, but
    for a checkpoint that it would refuse as another run's: one that is damaged is told to be that.

    auto: the newest checkpoint of the run that is all there; `confirm` reads its bytes. PATH: that one; and auto where the run has
    begun there already, so that the same command goes on. force: go on from one of another recipe or of other data. Raises
    CheckpointError where the checkpoint is missing, damaged, of another recipe, other data or another version of longtrain, or
    would be written over.
    """
    folder = Path(recipe.run_folder) / CHECKPOINTS
    latest = find_latest(folder)
    if wanted == "never":
        if latest is not None:
            raise CheckpointError(
                f"{folder}: holds checkpoints of an earlier run, which --resume never would write over; to go on from them, give "
                "--resume auto; to start again, set another name or output, or delete the folder"
            )
        return Start(None)
    if wanted == "auto":
        return _newest(recipe, split, force, ())
    if latest is not None and _began_at(folder, Path(wanted)):
        start = _newest(recipe, split, force, ())
        return replace(start, notes=(f"this run began at {wanted}: it goes on from its newest checkpoint, as with --resume auto",))
    path = find_checkpoint(Path(wanted))
    if latest is not None and latest.resolve() != path.resolve():
        # going on from an older step here would leave two futures in one folder, and auto would take the abandoned one
        raise CheckpointError(
            f"{folder}: holds checkpoints up to {latest.name}; to go on from that one, give --resume auto; to go on from {path} "
            "instead, set another name or output, or delete the newer ones"
        )
    if reason := _wrong(path, recipe, split, force):
        raise CheckpointError(f"{reason}; {_ANOTHER}")
    return replace(_start_at(path, recipe, split, force), origin=Origin(path=str(path.resolve()), manifest=digest_of(path)))


_ANOTHER = "name another one: `longtrain checkpoint ls --verify` says which of a run are sound"


def _began_at(folder: Path, wanted: Path) -> bool:
    """Whether the run with these checkpoints began at the one, or at one of the run, that is wanted: by its digest, or by its place
    where it is gone."""
    origin = _origin_of(folder)
    if origin is None:
        return False
    place = Path(origin.path)
    if place.is_relative_to(wanted.resolve()):
        # a run that was named may have saved newer ones, and deleted this one
        return not (place / MANIFEST).exists() or digest_of(place) == origin.manifest
    return digest_of(find_checkpoint(wanted)) == origin.manifest


def _origin_of(folder: Path) -> Origin | None:
    """Of the run with these checkpoints, by the newest that can be read."""
    for path in reversed(complete(folder)):
        with suppress(CheckpointError):
            return read_state(path).origin
    return None


def confirm(ctx: ParallelContext, start: Start, alive: Callable[[], None] = lambda: None) -> Start:
    """The main rank's `start` when every byte of its checkpoint is what was written, or an earlier one of the run: the same one on
    all ranks, whatever they chose; what else it says is the main rank's. A collective of all ranks. alive: as for
    `check_together`.

    Raises CheckpointError on every rank where there is none, where the user asked for this one, where the main rank does not see
    what another one sees, or where a rank fails for another reason.
    """
    start = _agreed(ctx, start)
    while start.checkpoint is not None:
        try:
            checkpoint.check_together(ctx, start.checkpoint, alive)
            return start
        except checkpoint.RankFailedError:
            raise
        except CheckpointError as error:
            if start.earlier is None:
                raise CheckpointError(f"{error}; {_ANOTHER}") from error
            start = _earlier(ctx, start, start.earlier, str(error))
    return start


def _agreed(ctx: ParallelContext, start: Start) -> Start:
    """The main rank's choice: others may have failed to read what it reads, or read what it does not. A collective of all ranks."""
    answer = [None if start.checkpoint is None else str(start.checkpoint), [str(path) for path in start.damaged]]
    rows = [json.loads(text) for text in ctx.all_gather_text(json.dumps([*answer, start.earlier is not None]))]
    name, passed, goes_back = rows[0]
    chosen = None if name is None else Path(name)
    for rank, (other, *_) in enumerate(rows):
        if other not in (None, name, *passed) and (chosen is None or step_of(Path(other)) > step_of(chosen)):
            # going on without it would write over it
            raise CheckpointError(
                f"{other}: rank {rank} sees this checkpoint, and rank 0 does not; see to it that all hosts share this folder, and "
                "start again"
            )
    return start if ctx.is_main else replace(start, checkpoint=chosen, earlier=_of_the_main_rank if goes_back else None)


def _of_the_main_rank(reason: str) -> Start:
    raise AssertionError("only the main rank chooses")


def _earlier(ctx: ParallelContext, start: Start, choose_earlier: Callable[[str], Start], reason: str) -> Start:
    """What the main rank chooses then. A collective of all ranks."""
    chosen: list[Start] = []

    def ask() -> str | None:
        if not ctx.is_main:
            return None
        chosen.append(replace(choose_earlier(reason), notes=start.notes))
        return str(chosen[0].checkpoint)

    name = checkpoint.together(ctx, ask)[0]
    return chosen[0] if ctx.is_main else replace(start, checkpoint=Path(name))


def _newest(recipe: Recipe, split: Split, force: bool, damaged: Sequence[Damaged]) -> Start:
    """The newest checkpoint of a run that is not `damaged` and has all its files. Raises OtherVersionError where it meets one of
    another version: passed over, it would be set aside."""
    damaged, passed = list(damaged), {path for path, _ in damaged}
    for path in reversed(complete(Path(recipe.run_folder) / CHECKPOINTS)):
        if path in passed:
            continue
        if reason := _wrong(path, recipe, split, force):
            damaged.append((path, reason))
            continue
        start = _start_at(path, recipe, split, force)
        return replace(
            start,
            remarks=(*(f"WARNING: passed over {bad.name}: {reason}" for bad, reason in damaged), *start.remarks),
            damaged=tuple(bad for bad, _ in damaged),
            earlier=lambda reason, path=path: _newest(recipe, split, force, [*damaged, (path, reason)]),
        )
    if damaged:
        lines = "\n".join(f"  {reason}" for _, reason in damaged)
        raise CheckpointError(
            f"every checkpoint of this run is damaged or cannot be read:\n{lines}\nwhat cannot be read may be right: see to its "
            "permissions and its disk; to start again, delete them"
        )
    return Start(None)


def _wrong(path: Path, recipe: Recipe, split: Split, force: bool) -> str | None:
    """What is wrong with the files of a checkpoint, as far as it can be told without reading tensors. They are read too where it
    would be refused as another run's: damaged, it is no reason to refuse one that is older. Raises OtherVersionError."""
    try:
        manifest = read_manifest(path)
        check_files(path, manifest, sorted(manifest.files), content=False)
        check_files(path, manifest, [STATE])
        state = read_state(path)
    except OtherVersionError:
        raise
    except CheckpointError as error:
        return str(error)
    refused = not force and _refusals(path, state, split, _changes_since(path, state, recipe))
    return next((str(problem) for problem in problems(path)), None) if refused else None


def _start_at(path: Path, recipe: Recipe, split: Split, force: bool) -> Start:
    """A start at this checkpoint. Raises CheckpointError where it is of another recipe or of other data, unless forced."""
    state = read_state(path)
    changes = _changes_since(path, state, recipe)
    remarks = [f"resuming {path} (step {state.step})"]
    refusals = _refusals(path, state, split, changes)
    if refusals and not force:
        raise CheckpointError(refusals[0])
    # the fields follow among the changes
    remarks += [f"WARNING: forced to go on, although {refusal.splitlines()[0].rstrip(':')}" for refusal in refusals]
    changed = [f"{name}: {as_written(before)} -> {as_written(after)}" for name, before, after in changes]
    remarks += [f"changed since that checkpoint: {change}" for change in changed]
    if any(name == "training.steps" for name, _, _ in changes) and recipe.schedule.kind != "constant":
        remarks.append(
            f"the {recipe.schedule.kind} schedule now ends at step {recipe.training.steps}: the learning rate jumps here"
        )
    # a run of its own that goes on from the checkpoint of another has an id of its own
    own = path.parent.resolve() == (Path(recipe.run_folder) / CHECKPOINTS).resolve()
    return Start(path, tuple(remarks), state.tracker if own else None, state.origin)


def find_checkpoint(run: Path) -> Path:
    """The newest checkpoint of a run's folder, or the one at that path. Raises CheckpointError where there is none."""
    return resolve(run / CHECKPOINTS if (run / CHECKPOINTS).is_dir() else run)


def restore(engine: Engine, start: Path, *, verified: bool = False, alive: Callable[[], None] = lambda: None) -> Progress:
    """Loads a checkpoint into the engine. A collective of all ranks. verified: `confirm` has just read it. alive: as for
    `checkpoint.load`."""
    state = checkpoint.load(start, engine, verified=verified, alive=alive)
    return Progress(
        step=state.step,
        tokens=state.tokens,
        sequences=state.cursor,
        skipped=state.skipped,
        skipped_in_row=state.skipped_in_row,
        spikes=state.spikes,
        roll_backs=state.roll_backs,
        sound=max(0, state.step - state.skipped_in_row - 1) if state.sound is None else state.sound,
        losses=RecentLosses(state.loss_count, state.loss_mean, state.loss_variance),
        loss=state.loss,
    )


def state_of(recipe: Recipe, split: Split, progress: Progress, tracker: str | None, origin: Origin | None = None) -> TrainState:
    """What a checkpoint holds beside weights and moments; tracker, origin: as in `Start`, on the main rank."""
    return TrainState(
        step=progress.step,
        tokens=progress.tokens,
        cursor=progress.sequences,
        skipped=progress.skipped,
        skipped_in_row=progress.skipped_in_row,
        spikes=progress.spikes,
        roll_backs=progress.roll_backs,
        sound=progress.sound,
        loss=progress.loss,
        loss_count=progress.losses.count,
        loss_mean=progress.losses.mean,
        loss_variance=progress.losses.variance,
        recipe=dump_recipe(recipe),
        data=split.fingerprint,
        tokenizer=split.tokenizer.fingerprint,
        tracker=tracker,
        origin=origin,
    )


def _refusals(path: Path, state: TrainState, split: Split, changes: list[Change]) -> list[str]:
    return [*_other_run(path, changes), *_other_data(path, state, split)]


def _other_data(path: Path, state: TrainState, split: Split) -> Iterator[str]:
    if state.data != split.fingerprint:
        yield (
            f"{path}: was trained on other data than {split.folder} (other tokens, documents or tokenizer, other weights in "
            "data.sources, or another data.long_documents); set the section data to what that run had, start a new run under "
            "another name, or go on all the same with --force-resume"
        )


def _other_run(path: Path, changes: list[Change]) -> Iterator[str]:
    fixed = [change for change in changes if change[0] not in FREE_FIELDS and change[0].split(".")[0] not in FREE_SECTIONS]
    if fixed:
        forced = "" if any(field in SHAPE for field, *_ in fixed) else "or go on all the same with --force-resume; "
        shown = ((field, as_written(before), as_written(after)) for field, before, after in fixed)
        lines = "\n".join(f"  {field}: {before} in the checkpoint, {after} in this recipe" for field, before, after in shown)
        yield (
            f"{path}: is a checkpoint of another recipe:\n{lines}\nset these back; {forced}or "
            f"start from step 0 under a name of its own, if you like with these weights: `longtrain export {path} --out FOLDER "
            "--dtype fp32`, then model.init FOLDER"
        )


def _changes_since(path: Path, state: TrainState, recipe: Recipe) -> list[Change]:
    """Every field that differs from the recipe of a checkpoint."""
    before = parse_recipe(state.recipe, f"{path}/state.json")
    old, new = flat(before.model_dump(mode="json")), flat(recipe.model_dump(mode="json"))
    fields = sorted(old.keys() | new.keys())
    return [(field, old.get(field), new.get(field)) for field in fields if old.get(field) != new.get(field)]


def flat(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted names and values of nested sections."""
    fields: dict[str, Any] = {}
    for name, value in section.items():
        fields |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return fields
