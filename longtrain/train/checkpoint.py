"""Checkpoints as sets of parameter ranges: every rank writes what it owns, any number of ranks at any ZeRO stage reads it.

    step-00000123/
        rank-00000.safetensors ...   fp32 tensors [n] named master/<parameter>@<start>, exp_avg/..., exp_avg_sq/...; what is more
                                     than PART elements of a rank goes to rank-00000-00000.safetensors, rank-00000-00001...
        state.json                   TrainState
        manifest.json                Manifest: what there is, with sizes and SHA-256; written last

A checkpoint appears under its name only when it is whole and on disk: it is written to step-N.tmp, synced, and renamed. Nothing
is pickled. Training stands still while the ranges are copied to host memory; threads of every rank hash and write them from
there, and one of the main rank publishes the checkpoint when all ranks have posted that theirs are on disk.
"""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import socket
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

import longtrain
from longtrain.cores import usable_cores
from longtrain.errors import CheckpointError, LongtrainError
from longtrain.files import sync_path
from longtrain.parallel.context import ParallelContext
from longtrain.parallel.deepspeed import Engine
from longtrain.parallel.mailbox import Mailbox, MailboxGoneError
from longtrain.plan.host import SHARE, available_memory, disk_bytes, fits
from longtrain.train.checkpoint_folder import KINDS, Pieces, check_files, check_ranges, complete, delete, publish, resolve
from longtrain.train.checkpoint_format import (
    MANIFEST,
    STATE,
    FileEntry,
    Manifest,
    ParameterEntry,
    TrainState,
    read_manifest,
    read_state,
    step_of,
    write_json,
    write_manifest,
)
from longtrain.train.snapshot import PART, HostMemory, Part, header_of, parts_of, write_tensors
from longtrain.train.threads import THREADS, in_threads

PATIENCE = 30.0
"""Seconds that a run which is on its way out waits for what other ranks were writing."""

Copied = Callable[[Part], AbstractContextManager[Tensor]]


class RankFailedError(CheckpointError):
    """What a rank met says nothing of a checkpoint: it has no memory, no thread, or there is a mistake in the program."""


@dataclass
class _Save:
    """A checkpoint on its way. key: under which the ranks post that their part is written. post: what this one posts. alone:
    whether it cannot reach the others behind the training."""

    folder: Path
    final: Path
    temporary: Path
    key: str
    keep: int
    state: TrainState
    manifest: Manifest | None
    post: dict[str, Any] = field(default_factory=dict)
    alone: bool = False
    error: str | None = None
    remark: str | None = None
    done: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True)
class Saved:
    """A published checkpoint. remark: what went wrong afterwards, or None."""

    path: Path
    remark: str | None


class Saver:
    """Writes the checkpoints of a run behind its training, one at a time."""

    def __init__(self, ctx: ParallelContext, part: int = PART) -> None:
        """part: fp32 elements of a file at most."""
        self._ctx, self._part = ctx, part
        self._memory = HostMemory(ctx.device)
        self._mailbox = Mailbox(ctx)
        self._save: _Save | None = None
        self._closing: float | None = None

    @property
    def busy(self) -> bool:
        """Whether a save was begun and not settled; the same on every rank."""
        return self._save is not None

    @property
    def finished(self) -> bool:
        """Whether the save that was begun is published or has failed, and waits for `settle`; only the main rank knows."""
        return self._ctx.is_main and self._save is not None and self._save.done.is_set()

    def begin(self, folder: Path, engine: Engine, state: TrainState, keep: int) -> str | None:
        """Begins to save `folder`/step-N for N = state.step, after which all but the newest `keep` checkpoints are deleted.

        A collective of all ranks, after `settle`. Returns when training may go on, with the reason where everything was written
        before that. Raises CheckpointError on every rank if any rank fails to begin.
        """
        if self._save is not None:
            raise RuntimeError("a save is on its way: settle it first")
        if keep < 1:
            raise CheckpointError(f"checkpoint.keep is {keep}: keep at least 1")
        together(self._ctx, engine.create_moments)
        ranges = ((f"{kind}/{piece.name}", piece.start, piece.tensors[kind]) for piece in engine.owned_ranges() for kind in KINDS)
        parts = parts_of(self._ctx.rank, ranges, self._part)
        final = folder / f"step-{state.step:08d}"
        save = _Save(folder, final, final.with_name(final.name + ".tmp"), f"{final.name}/{time.time_ns()}", keep, state, None)
        missing = self._memory.missing(parts)

        def prepare() -> dict[str, Any]:
            if self._ctx.is_main:
                save.state = state.model_copy(update={"scaler": engine.scaler_state(), "versions": _versions()})
                save.manifest = _describe(engine, save.state)
                _make_room(save, sum(entry.numel for entry in save.manifest.parameters.values()))
            return {"key": save.key, "host": socket.gethostname(), "missing": missing, "available": available_memory()}

        answers = together(self._ctx, prepare)
        save.key = answers[0]["key"]
        here = [answer for answer in answers if answer["host"] == socket.gethostname()]
        threads = max(1, min(THREADS, usable_cores() // len(here)))
        copied: Copied = self._memory.lend
        reason = _too_much(here)
        if reason is None:
            try:
                held = dict(zip(parts, self._memory.take(parts), strict=True))
                copied = lambda part: nullcontext(held[part])  # noqa: E731
            except (MemoryError, RuntimeError) as error:  # what is available cannot always be had
                reason = f"no memory for a copy: {error}"
        if reason is None:
            try:
                # not a daemon: the interpreter waits for it before it ends
                threading.Thread(target=self._write, args=(save, parts, copied, threads), name="checkpoint").start()
            except RuntimeError as error:  # of a limit on processes; a pool of threads would meet it too
                reason, threads = f"no thread for the background: {error}", 1
        if reason is not None:
            self._write(save, parts, copied, _affordable(threads, here, self._part))
        # only now: whoever waits for it waits for ever where nobody writes
        self._save = save
        return reason

    def settle(self) -> Saved | None:
        """Waits until the checkpoint on its way is published. A collective of all ranks; None where there was none.

        Raises CheckpointError on every rank where it was not; what was there before is then untouched.
        """
        save, self._save = self._save, None
        if save is None:
            return None
        save.done.wait()
        rows = [json.loads(text) for text in self._ctx.all_gather_text(json.dumps([save.post, save.alone, save.error]))]
        _, alone, error = rows[0]
        if error is not None:
            raise CheckpointError(error)
        if alone:
            together(self._ctx, lambda: self._finish(save, [post for post, _, _ in rows]) if self._ctx.is_main else None)
            save.remark = "torchrun is gone, or its host, and with it the store through which ranks save behind the training"
        return Saved(save.final, save.remark)

    def close(self) -> None:
        """Waits for what is on its way, however training ended; if other ranks are gone, not for long."""
        self._closing = time.monotonic()
        if self._save is not None:
            self._save.done.wait()

    def _write(self, save: _Save, parts: list[Part], copied: Copied, threads: int) -> None:
        """This rank's part, and on the main rank the rest; never raises. copied: gives the elements of a file."""

        def write(part: Part) -> tuple[str, dict[str, Any]]:
            with copied(part) as elements:
                return part.file, write_tensors(save.temporary / part.file, header_of(part.tensors), [elements]).model_dump()

        try:
            save.post = {"files": dict(in_threads(write, parts, threads))}
        except Exception as error:
            save.post = {"error": _in_words(error)}
        try:
            self._mailbox.post(save.key, json.dumps(save.post))
            if self._ctx.is_main:
                self._finish(save, [json.loads(text) for text in self._mailbox.collect(save.key, self._give_up)])
        except MailboxGoneError:
            save.alone = True
        except Exception as error:
            save.error = _in_words(error)
            shutil.rmtree(save.temporary, ignore_errors=True)
        finally:
            save.done.set()

    def _finish(self, save: _Save, posts: list[Any]) -> None:
        """Publishes what all ranks have written; for the main rank."""
        for rank, post in enumerate(posts):
            if "error" in post:
                raise CheckpointError(post["error"] if self._ctx.world == 1 else f"rank {rank}: {post['error']}")
        assert save.manifest is not None
        files = {name: FileEntry.model_validate(entry) for post in posts for name, entry in post["files"].items()}
        files[STATE] = write_json(save.temporary / STATE, save.state)
        write_manifest(save.temporary / MANIFEST, save.manifest.model_copy(update={"files": files}))
        publish(save.temporary, save.final)
        try:
            for old in _outdated(complete(save.folder), save.keep, save.state):
                if old != save.final:
                    delete(old)
        except (OSError, CheckpointError) as error:
            save.remark = f"older checkpoints could not be deleted: {_in_words(error)}"

    def _give_up(self) -> bool:
        return self._closing is not None and time.monotonic() > self._closing + PATIENCE


def save(folder: Path, engine: Engine, state: TrainState, keep: int) -> Path:
    """Write `folder`/step-N for N = state.step, then delete all but the newest `keep` checkpoints; returns its path.

    A collective of all ranks. Raises CheckpointError on every rank if any rank fails; what was there before is then untouched.
    """
    saver = Saver(engine.ctx)
    saver.begin(folder, engine, state, keep)
    saved = saver.settle()
    assert saved is not None
    return saved.path


def load(path: Path, engine: Engine, *, verified: bool = False, alive: Callable[[], None] = lambda: None) -> TrainState:
    """Restore weights, moments, Adam's step and the loss scale from a step folder, or from the newest one under `path`.

    A collective of all ranks. The engine may have another world size or ZeRO stage than the one that saved. Whether the returned
    state belongs to the same recipe is for the caller to decide. verified: `check_together` has just run. alive: called before
    each file and each range that this rank reads. Raises CheckpointError on every rank if the checkpoint is missing, damaged,
    incomplete, of another model or not the same one on all ranks; the engine may then hold parts of it.
    """
    ctx = engine.ctx
    loaded: list[tuple[Manifest, TrainState]] = []

    def read() -> list[Any]:
        step = resolve(path)
        manifest = read_manifest(step)
        check_files(step, manifest, sorted(manifest.files)[ctx.rank :: ctx.world], content=not verified, alive=alive)
        _check_model(step, manifest, engine)
        state = read_state(step)
        pieces = Pieces(step, manifest)
        engine.create_moments()
        ranges = [(kind, piece.name, piece.start, view) for piece in engine.held_ranges() for kind, view in piece.tensors.items()]

        def fill(wanted: tuple[str, str, int, Tensor]) -> None:
            alive()
            pieces.read(*wanted)

        in_threads(fill, ranges)
        try:
            engine.set_scaler_state(state.scaler)
        except KeyError as error:
            raise CheckpointError(f"{step / STATE}: scaler: lacks {error}, as this version of longtrain writes it") from error
        loaded.append((manifest, state))
        return [state.step, manifest.sha256]

    answers = together(ctx, read)
    for rank, (step, digest) in enumerate(answers):
        if [step, digest] != answers[0]:
            raise CheckpointError(
                f"{path}: rank {rank} read another checkpoint than rank 0: step {step}, manifest {digest[:8]}, instead of step "
                f"{answers[0][0]}, manifest {answers[0][1][:8]}; see to it that all hosts share this folder"
            )
    manifest, state = loaded[0]
    engine.set_adam_steps({name: entry.adam_step for name, entry in manifest.parameters.items()})
    engine.refresh_weights()
    return state


def check_together(ctx: ParallelContext, step: Path, alive: Callable[[], None] = lambda: None) -> None:
    """Reads every byte of a step folder, each rank a part. A collective; raises CheckpointError on all where a file is damaged, or
    is what was written and still cannot be loaded. alive: called before each file that this rank reads."""

    def check() -> None:
        manifest = read_manifest(step)
        check_files(step, manifest, sorted(manifest.files)[ctx.rank :: ctx.world], alive=alive)

    together(ctx, check)
    together(ctx, lambda: check_ranges(step, read_manifest(step)) if ctx.is_main else None)


def together(ctx: ParallelContext, action: Callable[[], Any]) -> list[Any]:
    """Run `action` on every rank; what it returned on each, in rank order, or CheckpointError on all of them: RankFailedError where
    `action` raised what is no LongtrainError."""
    cause: Exception | None = None
    try:
        answer = {"value": action()}
    except Exception as error:
        cause = error
        answer = {"error": _in_words(error), "failed": not isinstance(error, LongtrainError)}
    answers = [json.loads(text) for text in ctx.all_gather_text(json.dumps(answer))]
    for rank, other in enumerate(answers):
        if "error" in other:
            kind = RankFailedError if other["failed"] else CheckpointError
            raise kind(other["error"] if ctx.world == 1 else f"rank {rank}: {other['error']}") from cause
    return [other["value"] for other in answers]


def _outdated(steps: list[Path], keep: int, state: TrainState) -> list[Path]:
    """Of a run's checkpoints, in order, those that go. Where the last steps before `state` updated nothing, what was saved since
    may be spoilt: the newest one that is not stays, whatever `keep` is."""
    sound = [path for path in steps if state.skipped_in_row and state.sound is not None and step_of(path) <= state.sound]
    return [path for path in steps[:-keep] if path not in sound[-1:]]


def _in_words(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error) if isinstance(error, LongtrainError) else f"{type(error).__name__}: {error}"


def _versions() -> dict[str, str]:
    libraries = ("torch", "deepspeed", "safetensors")
    return {"longtrain": longtrain.__version__} | {name: importlib.metadata.version(name) for name in libraries}


def _make_room(save: _Save, elements: int) -> None:
    """An empty folder to write to. Raises CheckpointError where the disk has no room for master weights and moments."""
    made = not save.folder.exists()
    shutil.rmtree(save.temporary, ignore_errors=True)
    save.temporary.mkdir(parents=True)
    if made:
        sync_path(save.folder.parent)
    needed, free = disk_bytes(elements), shutil.disk_usage(save.temporary).free
    if free < needed:
        shutil.rmtree(save.temporary, ignore_errors=True)
        raise CheckpointError(
            f"{save.final}: needs {needed / 2**20:,.0f} MiB, and {free / 2**20:,.0f} MiB are free on its disk; free some, or set "
            "checkpoint.keep lower"
        )


def _too_much(here: list[dict[str, Any]]) -> str | None:
    """Why the ranks of this host, by what they answered, cannot all copy their part to its memory; None where they can."""
    needed, available = sum(answer["missing"] for answer in here), _available(here)
    if fits(needed, available):
        return None
    assert available is not None
    return (
        f"a copy for the background needs {needed / 2**20:,.0f} MiB of memory on {here[0]['host']}, where "
        f"{available / 2**20:,.0f} MiB are left"
    )


def _affordable(threads: int, here: list[dict[str, Any]], part: int) -> int:
    """Of so many threads a rank, those for which there is memory to hold one file each."""
    available = _available(here)
    return threads if available is None else max(1, min(threads, int(SHARE * available) // (4 * part * len(here))))


def _available(here: list[dict[str, Any]]) -> int | None:
    return min((answer["available"] for answer in here if answer["available"] is not None), default=None)


def _describe(engine: Engine, state: TrainState) -> Manifest:
    steps = engine.adam_steps()
    parameters = {
        name: ParameterEntry(shape=list(info.shape), numel=info.numel, dtype=info.dtype, adam_step=steps[name])
        for name, info in engine.parameters().items()
    }
    return Manifest(
        step=state.step,
        world=engine.ctx.world,
        stage=engine.stage,
        recipe_sha256=state.recipe_sha256,
        files={},
        parameters=parameters,
    )


def _check_model(step: Path, manifest: Manifest, engine: Engine) -> None:
    saved = {name: tuple(entry.shape) for name, entry in manifest.parameters.items()}
    wanted = {name: info.shape for name, info in engine.parameters().items()}
    for name in sorted(saved.keys() | wanted.keys()):
        if saved.get(name) != wanted.get(name):
            raise CheckpointError(
                f"{step}: parameter {name} is {saved.get(name, 'absent')} in the checkpoint and "
                f"{wanted.get(name, 'absent')} in the model: it is a checkpoint of another model"
            )
