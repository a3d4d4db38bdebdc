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
DAMAGED = "the checkpoint is damaged"
_OTHER_VERSION = "another version of longtrain wrote this checkpoint; go on from it with that one (versions in its state.json)"
STEP_FOLDER = re.compile(r"step-(\d{8,})(\.replaced)?")

UNSIGNED = "0" * 64
_OWN_DIGEST = re.compile(rb'"sha256": "([0-9a-f]{64})"')

Parsed = TypeVar("Parsed", bound=BaseModel)


class UnreadableError(CheckpointError):
    """A file or folder that the system does not let us read now. It may hold what was written: that is not known."""


class OtherVersionError(CheckpointError):
    """A file of a checkpoint that is what was written, and not by this version of longtrain."""


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Origin(_Strict):
    """A checkpoint that a run was told by name to go on from: where it was, and the SHA-256 of its manifest then."""

    path: str
    manifest: str = Field(pattern=r"^[0-9a-f]{64}$")


class TrainState(_Strict):
    """Where training stands, beside weights and moments.

    step: optimizer steps done. tokens: trained on so far. cursor: sequences consumed. skipped, skipped_in_row: steps without an
    update, in all and at the end. spikes, roll_backs: so far. sound: the newest step from whose weights an update was made, None in
    older checkpoints. loss: of the newest step that had one, None in older checkpoints. loss_count, loss_mean, loss_variance: of
    recent losses. recipe: its text. data, tokenizer: digests of what was trained on, and of what made its ids. tracker: the id
    under which the experiment tracker continues the run. origin: what --resume last named, None where it named none, and in older
    checkpoints. scaler and versions are filled in by the save.
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
    origin: Origin | None = None
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


class _Unsigned(BaseModel):
    """What tells a manifest of version 1: it has no digest of its own."""

    format: Literal["longtrain-checkpoint"]
    version: Literal[1]
    sha256: None = None


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


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint of a run is called after."""
    match = STEP_FOLDER.fullmatch(checkpoint.name)
    return int(match[1]) if match else 0


def read_manifest(step: Path) -> Manifest:
    """The manifest of a step folder. Raises CheckpointError where it is missing, truncated, changed, of something else or of
    another step than its folder is called after; UnreadableError and OtherVersionError as they say."""
    path = step / MANIFEST
    text = _content(path)
    own = _OWN_DIGEST.search(text)
    signed = own is not None and _signed(text, UNSIGNED)[0] == own[1].decode()
    manifest = parse(path, text, Manifest, as_written=signed or _is_version_1(text))
    if not signed:
        raise CheckpointError(f"{path}: does not match its own SHA-256; {DAMAGED}")
    foreign = [name for name in manifest.files if name != STATE and not re.fullmatch(r"rank-\d{5}(-\d{5})?\.safetensors", name)]
    if foreign or STATE not in manifest.files:
        raise OtherVersionError(
            f"{path}: field files is not that of a checkpoint: {', '.join(foreign) or 'no ' + STATE}; {_OTHER_VERSION}"
        )
    named = STEP_FOLDER.fullmatch(step.name)
    if named and int(named[1]) != manifest.step:
        raise CheckpointError(f"{path}: is of step {manifest.step}, and its folder, {step.name}, was copied or renamed; {DAMAGED}")
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
    than the manifest says, and whatever `read_manifest` raises; UnreadableError and OtherVersionError as they say."""
    manifest, path = read_manifest(step), step / STATE
    text = _content(path)
    state = parse(path, text, TrainState, as_written=hashlib.sha256(text).hexdigest() == manifest.files[STATE].sha256)
    if state.recipe_sha256 != manifest.recipe_sha256:
        raise CheckpointError(f"{path}: its recipe is not the one of {MANIFEST} (recipe_sha256); {DAMAGED}")
    return state


def write_json(path: Path, model: BaseModel) -> FileEntry:
    """Write a file of a checkpoint to disk, and describe it."""
    data = _encoded(model)
    write_durably(path, data)
    return FileEntry(size=len(data), sha256=hashlib.sha256(data).hexdigest())


def _encoded(model: BaseModel) -> bytes:
    return (model.model_dump_json(indent=1) + "\n").encode()


def _content(path: Path) -> bytes:
    """Of a file that a checkpoint must have. Raises CheckpointError where it is missing, UnreadableError as it says."""
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: missing; {DAMAGED}") from error
    except OSError as error:
        raise UnreadableError(f"{path}: cannot be read: {error.strerror}") from error


def _is_version_1(text: bytes) -> bool:
    try:
        _Unsigned.model_validate_json(text)
    except ValidationError:
        return False
    return True


def parse(path: Path, text: bytes, kind: type[Parsed], *, as_written: bool) -> Parsed:
    """The text of a JSON file as `kind`. as_written: whether no byte of it was changed. Raises CheckpointError that names the file
    and the field: OtherVersionError where the text is an unchanged object of other fields."""
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        problem = f"{path}: {field or 'the file'}: {first['msg']}"
        if as_written and field:
            raise OtherVersionError(f"{problem}; {_OTHER_VERSION}") from error
        raise CheckpointError(f"{problem}; truncated or changed; {DAMAGED}") from error
