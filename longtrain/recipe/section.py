"""What every section of a recipe is: frozen, strictly typed fields, and the values that cannot hold together."""

from collections.abc import Iterator
from typing import Annotated, NamedTuple, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

CONFLICT = "conflict"


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


def _path_text(text: str) -> str:
    if not text.strip() or not text.isprintable():
        raise ValueError("expected a path, without line breaks or other invisible characters")
    if text.startswith("~"):
        raise ValueError("write the path out, because '~' stands for no folder here; ./~ is a folder of that name")
    return text


# Counts end up in int64 tensors and file offsets.
Int = Annotated[int, Field(le=2**63 - 1)]
PathText = Annotated[str, AfterValidator(_path_text)]
