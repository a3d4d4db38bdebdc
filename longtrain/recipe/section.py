"""What every section of a recipe is: frozen, strictly typed fields, and the values that cannot hold together."""

import posixpath
from collections.abc import Iterator
from typing import Annotated, NamedTuple, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from longtrain.recipe.secret import hidden

CONFLICT = "conflict"
SYSTEM = ("/bin", "/boot", "/dev", "/etc", "/lib", "/lib64", "/proc", "/sbin", "/sys", "/usr")
"""Folders of the operating system, in which no run writes."""
OURS = ("/dev/shm", "/usr/local")
"""Folders in these that are used for other things."""
LONGEST_PATH, LONGEST_NAME = 4095, 255
"""In bytes: what Linux takes of a path, and its file systems of one name in it."""


class Conflict(NamedTuple):
    """Fields that cannot hold together: the dotted field to blame, seen from the section that reports it, and what to do."""

    field: str
    message: str


class Section(BaseModel):
    """A frozen group of fields that refuses unknown keys, converted types, nan and infinity."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    def conflicts(self) -> Iterator[Conflict]:
        """Every pair of values in this section that cannot hold together. Each value alone is already valid."""
        yield from ()

    @model_validator(mode="after")
    def _refuse_conflicts(self) -> Self:
        found = tuple(self.conflicts())
        if found:
            text = "; ".join(f"{conflict.field}: {conflict.message}" for conflict in found)
            raise PydanticCustomError(CONFLICT, "{text}", {"text": text, "conflicts": found})
        return self


def path_text(text: str) -> str:
    """The path. Raises ValueError, in words for the user, where it does not say plainly which file or folder it means."""
    if not text.strip() or not text.isprintable():
        raise ValueError("expected a path, without line breaks or other invisible characters")
    if text.startswith("~"):
        raise ValueError("write the path out, because '~' stands for no folder here; ./~ is a folder of that name")
    words = text.split("/")
    if len(text.encode()) > LONGEST_PATH or any(len(word.encode()) > LONGEST_NAME for word in words):
        raise ValueError(f"a path has at most {LONGEST_PATH} bytes, {LONGEST_NAME} between two slashes; choose a shorter one")
    names = (index for index, word in enumerate(words) if word not in ("", ".", ".."))
    if ".." in words[0 if text.startswith("/") else next(names, len(words)) :]:
        # from behind a link it would lead elsewhere, and the folders that it leaves again would have to be made
        # hidden first: without one of its slashes, the address that a password is in looks like none
        raise ValueError(f"a path must not go up by '..' after a name; write {posixpath.normpath(hidden(text))}")
    return text


def output_text(text: str) -> str:
    """`path_text` of a folder that is written to."""
    folder = system_folder(posixpath.normpath(path_text(text)))
    if folder is not None:
        raise ValueError(f"{folder} is of the operating system; choose a folder for this run alone")
    return text


def system_folder(path: str) -> str | None:
    """The folder of the operating system in which an absolute, normal path lies, if any."""
    path = "/" + path.lstrip("/") if path.startswith("/") else path
    inside = [folder for folder in (*OURS, *SYSTEM) if path == folder or path.startswith(f"{folder}/")]
    return inside[0] if inside and inside[0] not in OURS else None


# Counts end up in int64 tensors and file offsets.
Int = Annotated[int, Field(le=2**63 - 1)]
PathText = Annotated[str, AfterValidator(path_text)]
OutputText = Annotated[str, AfterValidator(output_text)]


def as_written(value: object) -> str:
    """A value as a recipe has it."""
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)
