"""The JSON files of a checkpoint: what they hold, and reading them with suspicion."""

from __future__ import annotations

import hashlib
import re
import stat
from pathlib import Path
from typing import Annotated, Literal, TypeVar

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

_OTHER_FIELDS = {"extra_forbidden", "missing", "literal_error"}
"""Pydantic's names of what tells an object of other fields from one of ours with a value that cannot be."""

# what float64, and with it every reader of JSON, counts exactly
Count = Annotated[int, Field(ge=0, le=1 << 53)]

Parsed = TypeVar("Parsed", bound=BaseModel)


class UnreadableError(CheckpointError):
    """A file or folder that the system does not let us read now. It may hold what was written: that is not known."""


class OtherVersionError(CheckpointError):
    """A file of a checkpoint that is what was written, and not by this version of longtrain."""


class GoneError(CheckpointError):
    """A checkpoint that was deleted or renamed while it was read, as a run in training does with its older ones: no damage."""


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


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

    step: Count
    tokens: Count
    cursor: Count
    skipped: Count = 0
    skipped_in_row: Count = 0
    spikes: Count = 0
    roll_backs: Count = 0
    sound: Count | None = None
    loss: float | None = None
    loss_count: Count = 0
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

    size: Count
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class ParameterEntry(_Strict):
    """A whole parameter; dtype is the one the model computes with, the ranges are always fp32."""

    shape: list[Count]
    numel: Count
    dtype: str
    adam_step: Count


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
    step: Count
    world: Count = Field(ge=1)
    stage: int = Field(ge=0, le=3)
    recipe_sha256: str
    files: dict[str, FileEntry]
    parameters: dict[str, ParameterEntry] = Field(min_length=1)

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
    text = content_of(path)
    own = _OWN_DIGEST.search(text)
    signed = own is not None and _signed(text, UNSIGNED)[0] == own[1].decode()
    manifest = parse(path, text, Manifest, as_written=signed or _is_version_1(text))
    if not signed:
        raise CheckpointError(f"{path}: does not match its own SHA-256; {DAMAGED}")
    foreign = [name for name in manifest.files if name != STATE and not re.fullmatch(r"rank-\d{5}(-\d{5})?\.safetensors", name)]
    if foreign or STATE not in manifest.files:
        raise CheckpointError(f"{path}: field files is not that of a checkpoint: {', '.join(foreign) or 'no ' + STATE}; {DAMAGED}")
    steps = {entry.adam_step: name for name, entry in manifest.parameters.items()}
    if len(steps) > 1:
        found = " and ".join(f"{step} of {name}" for step, name in list(steps.items())[:2])
        raise CheckpointError(f"{path}: field adam_step is not one number for all parameters: {found}; {DAMAGED}")
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
    or step than the manifest says, and whatever `read_manifest` raises; UnreadableError and OtherVersionError as they say."""
    manifest, path = read_manifest(step), step / STATE
    text = content_of(path)
    state = parse(path, text, TrainState, as_written=hashlib.sha256(text).hexdigest() == manifest.files[STATE].sha256)
    if state.recipe_sha256 != manifest.recipe_sha256:
        raise CheckpointError(f"{path}: its recipe is not the one of {MANIFEST} (recipe_sha256); {DAMAGED}")
    if state.step != manifest.step:
        raise CheckpointError(f"{path}: is of step {state.step}, and {MANIFEST} of step {manifest.step}; {DAMAGED}")
    return state


def write_json(path: Path, model: BaseModel) -> FileEntry:
    """Write a file of a checkpoint to disk, and describe it."""
    data = _encoded(model)
    write_durably(path, data)
    return FileEntry(size=len(data), sha256=hashlib.sha256(data).hexdigest())


def _encoded(model: BaseModel) -> bytes:
    return (model.model_dump_json(indent=1) + "\n").encode()


def content_of(path: Path) -> bytes:
    """Of a file that a checkpoint must have. Raises CheckpointError where it is missing, UnreadableError as it says."""
    try:
        # a named pipe would be waited for, and a device read, for ever
        if not stat.S_ISREG(path.stat().st_mode):
            raise CheckpointError(f"{path}: is no file; {DAMAGED}")
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
    and the field: OtherVersionError where the text is an unchanged object of other fields, or of another version of them."""
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        found = error.errors()
        other = [problem for problem in found if problem["type"] in _OTHER_FIELDS] if as_written else []
        first = (other or found)[0]
        field = ".".join(str(part) for part in first["loc"])
        problem = f"{path}: {field or 'the file'}: {first['msg']}"
        if other:
            raise OtherVersionError(f"{problem}; {_OTHER_VERSION}") from error
        raise CheckpointError(f"{problem}; {'' if as_written else 'truncated or changed; '}{DAMAGED}") from error
