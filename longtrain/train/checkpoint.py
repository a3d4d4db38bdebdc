"""Checkpoints as sets of parameter ranges: every rank writes what it owns, any number of ranks at any ZeRO stage reads it.

    step-00000123/
        rank-00000.safetensors ...   fp32 tensors [n] named master/<parameter>@<start>, exp_avg/..., exp_avg_sq/...
        state.json                   TrainState
        manifest.json                Manifest: what there is, with sizes and SHA-256; written last

A checkpoint appears under its name only when it is whole and on disk: it is written to step-N.tmp, synced, and renamed. Nothing
is pickled. Functions that take an engine are collectives: every rank calls them, and all of them raise if one fails.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

import longtrain
from longtrain.errors import CheckpointError, LongtrainError
from longtrain.files import sha256_of, sync_file, sync_path
from longtrain.parallel.context import ParallelContext
from longtrain.parallel.deepspeed import MOMENTS, Engine
from longtrain.train.checkpoint_format import (
    MANIFEST,
    STATE,
    FileEntry,
    Manifest,
    ParameterEntry,
    TrainState,
    read_manifest,
    read_state,
    write_json,
)

STEP_FOLDER = re.compile(r"step-(\d{8,})")
KINDS = ("master", *MOMENTS)
DAMAGED = "the checkpoint is damaged; delete its folder to go on from an earlier one"


def save(folder: Path, engine: Engine, state: TrainState, keep: int) -> Path:
    """Write `folder`/step-N for N = state.step, then delete all but the newest `keep` checkpoints; returns its path.

    Raises CheckpointError on every rank if any rank fails; what was there before is then untouched.
    """
    if keep < 1:
        raise CheckpointError(f"checkpoint.keep is {keep}: keep at least 1")
    ctx = engine.ctx
    final = folder / f"step-{state.step:08d}"
    temporary = final.with_name(final.name + ".tmp")
    libraries = ("torch", "deepspeed", "safetensors")
    versions = {"longtrain": longtrain.__version__} | {name: importlib.metadata.version(name) for name in libraries}
    state = state.model_copy(update={"scaler": engine.scaler_state(), "versions": versions})
    engine.create_moments()

    def prepare() -> None:
        if ctx.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)

    def write_rank() -> tuple[str, dict[str, Any]]:
        name = f"rank-{ctx.rank:05d}.safetensors"
        ranges = [(f"{kind}/{piece.name}@{piece.start}", piece.tensors[kind]) for piece in engine.owned_ranges() for kind in KINDS]
        return name, _write_tensors(temporary / name, ranges).model_dump()

    def finish() -> None:
        if ctx.is_main:
            files[STATE] = write_json(temporary / STATE, state)
            write_json(temporary / MANIFEST, _describe(engine, state, files))
            _publish(temporary, final)
            _prune(folder, keep, final)

    try:
        _together(ctx, prepare)
        files = {name: FileEntry.model_validate(entry) for name, entry in _together(ctx, write_rank)}
        _together(ctx, finish)
    except CheckpointError:
        if ctx.is_main:  # every rank is past its writing; what is half there would only fill the disk further
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def load(path: Path, engine: Engine) -> TrainState:
    """Restore weights, moments, Adam's step and the loss scale from a step folder, or from the newest one under `path`.

    The engine may have another world size or ZeRO stage than the one that saved. Whether the returned state belongs to the same
    recipe is for the caller to decide. Raises CheckpointError on every rank if the checkpoint is missing, damaged, incomplete or
    of another model; the engine may then hold parts of it.
    """
    ctx = engine.ctx
    loaded: list[tuple[Manifest, TrainState]] = []

    def read() -> None:
        step = resolve(path)
        manifest = read_manifest(step)
        _check_files(step, manifest, sorted(manifest.files)[ctx.rank :: ctx.world])
        _check_model(step, manifest, engine)
        state = read_state(step)
        pieces = _Pieces(step, manifest)
        engine.create_moments()
        for piece in engine.held_ranges():
            for kind, view in piece.tensors.items():
                pieces.read(kind, piece.name, piece.start, view)
        loaded.append((manifest, state))

    _together(ctx, read)
    manifest, state = loaded[0]
    engine.set_adam_steps({name: entry.adam_step for name, entry in manifest.parameters.items()})
    engine.set_scaler_state(state.scaler)
    engine.refresh_weights()
    return state


def find_latest(folder: Path) -> Path | None:
    """The whole checkpoint with the highest step under `folder`, None where there is none."""
    complete = _complete(folder)
    return complete[-1] if complete else None


def remove_leftovers(folder: Path) -> None:
    """Delete what dead runs left half written. For the main rank, at start, before anything is saved."""
    for leftover in folder.glob("step-*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)


def verify(path: Path) -> Manifest:
    """Check sizes and SHA-256 of every file of a step folder (or the newest one) and that every parameter is covered.

    Raises CheckpointError that names the damaged file or the parameter.
    """
    step = resolve(path)
    manifest = read_manifest(step)
    _check_files(step, manifest, sorted(manifest.files))
    read_state(step)
    pieces = _Pieces(step, manifest)
    for name, entry in manifest.parameters.items():
        for kind in KINDS:
            pieces.find(kind, name, 0, entry.numel)
    return manifest


def read_master(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Every parameter of a verified checkpoint, whole, fp32, on the host, one at a time; needs no engine and no GPU."""
    manifest = verify(path)
    pieces = _Pieces(resolve(path), manifest)
    for name, entry in manifest.parameters.items():
        whole = torch.empty(entry.numel, dtype=torch.float32)
        pieces.read("master", name, 0, whole)
        yield name, whole.view(entry.shape)


def digest_of(step: Path) -> str:
    """A digest of all that a step folder holds: its manifest has the digest of every file."""
    return hashlib.sha256((step / MANIFEST).read_bytes()).hexdigest()


class _Pieces:
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

    def _add(self, file: str) -> None:
        try:
            handle = self._files[file] = safe_open(self._step / file, framework="pt")
            for key in handle.keys():  # noqa: SIM118 (not a mapping)
                match = re.fullmatch(r"([a-z_]+)/(.+)@(\d+)", key)
                if match is None:
                    raise CheckpointError(f"{self._step / file}: tensor {key!r} is not a range of a parameter")
                kind, parameter, start = match[1], match[2], int(match[3])
                end = start + handle.get_slice(key).get_shape()[0]
                self._index.setdefault((kind, parameter), []).append((start, end, file, key))
        except (OSError, SafetensorError) as error:
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
        """Fill `out` [n] with elements [start, start + n) of a parameter."""
        end = start + out.numel()
        for piece_start, piece_end, file, key in self.find(kind, parameter, start, end):
            low, high = max(start, piece_start), min(end, piece_end)
            values = self._files[file].get_slice(key)[low - piece_start : high - piece_start]
            out[low - start : high - start].copy_(values)


def _together(ctx: ParallelContext, action: Callable[[], Any]) -> list[Any]:
    """Run `action` on every rank; what it returned on each, in rank order, or CheckpointError on all of them."""
    cause: Exception | None = None
    try:
        answer = {"value": action()}
    except Exception as error:
        cause = error
        answer = {"error": str(error) if isinstance(error, LongtrainError) else f"{type(error).__name__}: {error}"}
    answers = [json.loads(text) for text in ctx.all_gather_text(json.dumps(answer))]
    for rank, other in enumerate(answers):
        if "error" in other:
            raise CheckpointError(other["error"] if ctx.world == 1 else f"rank {rank}: {other['error']}") from cause
    return [other["value"] for other in answers]


def _describe(engine: Engine, state: TrainState, files: dict[str, FileEntry]) -> Manifest:
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
        files=files,
        parameters=parameters,
    )


def _write_tensors(path: Path, tensors: Iterable[tuple[str, Tensor]]) -> FileEntry:
    """A safetensors file of fp32 tensors, streamed: the library's writer would hold a second copy of all moments on the host."""
    tensors = list(tensors)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors:
        start, end = end, end + 4 * tensor.numel()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file:

        def put(data: bytes | memoryview) -> None:
            digest.update(data)
            file.write(data)

        put(len(text).to_bytes(8, "little"))
        put(text)
        for _, tensor in tensors:
            put(tensor.detach().to("cpu", torch.float32).contiguous().numpy().astype("<f4", copy=False).data)
        sync_file(file)
        return FileEntry(size=file.tell(), sha256=digest.hexdigest())


def _publish(temporary: Path, final: Path) -> None:
    """Make a finished folder appear under its name, on disk."""
    sync_path(temporary)
    if final.exists():
        # Saved before and now again, after a resume from an earlier step. A rename cannot replace a folder that is not empty.
        _delete(final)
    temporary.rename(final)
    sync_path(final.parent)


def _prune(folder: Path, keep: int, written: Path) -> None:
    for old in _complete(folder)[:-keep]:
        if old != written:
            _delete(old)


def _delete(step: Path) -> None:
    # Renamed first: a kill in the middle of deleting must not leave something that looks like a checkpoint.
    doomed = step.with_name(step.name + ".deleted.tmp")
    shutil.rmtree(doomed, ignore_errors=True)
    step.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _complete(folder: Path) -> list[Path]:
    """Whole checkpoints under `folder`, by step."""
    steps = {path: STEP_FOLDER.fullmatch(path.name) for path in folder.glob("step-*")}
    complete = [(int(match[1]), path) for path, match in steps.items() if match and (path / MANIFEST).is_file()]
    return [path for _, path in sorted(complete)]


def resolve(path: Path) -> Path:
    """`path` if it is a step folder, else the newest one under it. Raises CheckpointError where there is none."""
    if (path / MANIFEST).is_file():
        return path
    latest = find_latest(path)
    if latest is None:
        if not path.exists():
            raise CheckpointError(f"{path}: no such folder; name a run's folder or one of its checkpoints")
        raise CheckpointError(f"{path}: no whole checkpoint here (no {MANIFEST}, and no step-... folder that has one)")
    return latest


def _check_files(step: Path, manifest: Manifest, names: Iterable[str]) -> None:
    for name in names:
        path, entry = step / name, manifest.files[name]
        if not path.is_file():
            raise CheckpointError(f"{path}: missing; {DAMAGED}")
        if path.stat().st_size != entry.size:
            found = path.stat().st_size
            raise CheckpointError(f"{path}: {found} bytes instead of {entry.size}; {DAMAGED}")
        if sha256_of(path) != entry.sha256:
            raise CheckpointError(f"{path}: SHA-256 differs from the manifest; {DAMAGED}")


def _check_model(step: Path, manifest: Manifest, engine: Engine) -> None:
    saved = {name: tuple(entry.shape) for name, entry in manifest.parameters.items()}
    wanted = {name: info.shape for name, info in engine.parameters().items()}
    for name in sorted(saved.keys() | wanted.keys()):
        if saved.get(name) != wanted.get(name):
            raise CheckpointError(
                f"{step}: parameter {name} is {saved.get(name, 'absent')} in the checkpoint and "
                f"{wanted.get(name, 'absent')} in the model: it is a checkpoint of another model"
            )
