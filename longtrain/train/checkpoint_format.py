"""The JSON files of a checkpoint: what they hold, and reading them with suspicion."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from longtrain.errors import CheckpointError
from longtrain.files import write_durably

MANIFEST = "manifest.json"
STATE = "state.json"
DAMAGED = "the checkpoint is damaged; delete its folder to go on from an earlier one"

UNSIGNED = "0" * 64
_OWN_DIGEST = re.compile(rb'"sha256": "([0-9a-f]{64})"')

Parsed = TypeVar("Parsed", bound=BaseModel)


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class TrainState(_Strict):
    """Where training stands, beside weights and moments.

    step: optimizer steps done. tokens: trained on so far. cursor: sequences consumed. skipped, skipped_in_row: steps without an
    update, in all and at the end. spikes, roll_backs: so far. sound: the newest step from whose weights an update was made, None in
    older checkpoints. loss: of the newest step that had one, None in older checkpoints. loss_count, loss_mean, loss_variance: of
    recent losses. recipe: its text. data, tokenizer: digests of what was trained on, and of what made its ids. tracker: the id
    under which the experiment tracker continues the run. scaler and versions are filled in by the save.
    """

    step: int = Field(ge=0)
    tokens: int = Field(ge=0)
    cursor: int = Field(ge=0)
    skipped: int = Field(default=0, ge=0)
    skipped_in_row: int = Field(default=0, ge=0)
    spikes: int = Field(default=0, ge=0)
    roll_backs: int = Field(default=0, ge=0)
    sound: int | None = Field(default=None, ge=0)
    loss: float | None = None
    loss_count: int = Field(default=0, ge=0)
    loss_mean: float = 0.0
    loss_variance: float = Field(default=0.0, ge=0)
    recipe: str
    data: str = ""
    tokenizer: str = ""
    tracker: str | None = None
    scaler: dict[str, int | float] | None = None
    versions: dict[str, str] = {}

    @property
    def recipe_sha256(self) -> str:
        """Of `recipe`, the text of `dump_recipe`: equal for two recipes that say the same."""
        return hashlib.sha256(self.recipe.encode()).hexdigest()


class FileEntry(_Strict):
    """A file of a checkpoint."""

    size: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class ParameterEntry(_Strict):
    """A whole parameter; dtype is the one the model computes with, the ranges are always fp32."""

    shape: list[int]
    numel: int = Field(ge=0)
    dtype: str
    adam_step: int = Field(ge=0)


class Manifest(_Strict):
    """What a checkpoint consists of. sha256: of the manifest itself, with zeros in its place. `recipe_sha256` repeats the digest
    for readers that do not open state.json."""

    format: Literal["longtrain-checkpoint"] = "longtrain-checkpoint"
    version: Literal[2] = 2
    # before `files`, so that it is the first of its name in the text
    sha256: str = UNSIGNED
    step: int = Field(ge=0)
    world: int = Field(ge=1)
    stage: int = Field(ge=0, le=3)
    recipe_sha256: str
    files: dict[str, FileEntry]
    parameters: dict[str, ParameterEntry]

    @property
    def bytes(self) -> int:
        """Of all files but the manifest itself."""
        return sum(entry.size for entry in self.files.values())


def read_manifest(step: Path) -> Manifest:
    """The manifest of a step folder. Raises CheckpointError where it is missing, truncated, changed or of something else."""
    path = step / MANIFEST
    manifest = parse(path, Manifest)
    if _signed(path.read_bytes(), UNSIGNED)[0] != manifest.sha256:
        raise CheckpointError(f"{path}: does not match its own SHA-256; {DAMAGED}")
    foreign = [name for name in manifest.files if name != STATE and not re.fullmatch(r"rank-\d{5}(-\d{5})?\.safetensors", name)]
    if foreign or STATE not in manifest.files:
        raise CheckpointError(f"{path}: field files is not that of a checkpoint: {', '.join(foreign) or 'no ' + STATE}")
    return manifest


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Writes a manifest with its own digest to disk."""
    text = _encoded(manifest.model_copy(update={"sha256": UNSIGNED}))
    write_durably(path, _signed(text, hashlib.sha256(text).hexdigest())[1])


def _signed(text: bytes, digest: str) -> tuple[str, bytes]:
    """SHA-256 of a manifest's text with zeros in the place of its own, and the text with `digest` there."""
    zeros, signed = (_OWN_DIGEST.sub(b'"sha256": "' + value.encode() + b'"', text, count=1) for value in (UNSIGNED, digest))
    return hashlib.sha256(zeros).hexdigest(), signed


def read_state(step: Path) -> TrainState:
    """state.json of a step folder. Raises CheckpointError where it is missing, truncated, of something else, or of another recipe
    than the manifest says."""
    state = parse(step / STATE, TrainState)
    if state.recipe_sha256 != read_manifest(step).recipe_sha256:
        raise CheckpointError(f"{step / STATE}: its recipe is not the one of {MANIFEST} (recipe_sha256); {DAMAGED}")
    return state


def write_json(path: Path, model: BaseModel) -> FileEntry:
    """Write a file of a checkpoint to disk, and describe it."""
    data = _encoded(model)
    write_durably(path, data)
    return FileEntry(size=len(data), sha256=hashlib.sha256(data).hexdigest())


def _encoded(model: BaseModel) -> bytes:
    return (model.model_dump_json(indent=1) + "\n").encode()


def parse(path: Path, kind: type[Parsed]) -> Parsed:
    """A JSON file as `kind`. Raises CheckpointError that names the file and the field."""
    try:
        return kind.model_validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: missing; {DAMAGED}") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "the file"
        raise CheckpointError(f"{path}: {field}: {first['msg']}; truncated, or not of this version of longtrain") from error
