"""The part of a recipe that says how ranks share the work."""

from collections.abc import Iterator
from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field

from longtrain.recipe.section import Conflict, Int, Section


class Layout(StrEnum):
    CONTIGUOUS = "contiguous"
    ZIGZAG = "zigzag"
    STRIPED = "striped"


class ParallelSection(Section):
    """How ranks share the work: the number of ranks is dp * cp."""

    dp: Annotated[Int, Field(ge=1)] | Literal["auto"] = Field(
        default="auto", description="Data-parallel groups of ranks; auto: all ranks divided by cp."
    )
    cp: Annotated[Int, Field(ge=1)] | Literal["auto"] = Field(
        default=1,
        description="Ranks that share each sequence (context parallelism); auto: as few as keep to tokens_per_rank, inside one "
        "host where its ranks can hold a sequence.",
    )
    tokens_per_rank: Int = Field(
        default=16384,
        ge=1,
        description="Tokens of one forward pass that a rank should hold at most, where cp is auto; too few ranks hold more, and "
        "the plan says so.",
    )
    ulysses: Int = Field(
        default=1,
        ge=1,
        description="How many of the cp ranks share attention heads in the place of positions, a divisor of cp: 1 (all are one "
        "ring) to cp (no ring). Query heads must split over them; key-value heads must too, or each goes to several.",
    )
    layout: Layout = Field(
        default=Layout.ZIGZAG,
        strict=False,
        description="Which positions of a sequence each ring rank holds: contiguous (one run each), zigzag (an early and "
        "a late run each, balances causal attention), striped (every cp-th position). With ulysses, the ranks that share heads "
        "hold equal runs of what one rank of a ring of cp / ulysses would.",
    )

    def conflicts(self) -> Iterator[Conflict]:
        if self.cp != "auto" and self.cp % self.ulysses:
            yield Conflict("ulysses", f"{self.ulysses} does not divide cp {self.cp}; change one of them")


def refuses_heads(heads: int | None, kv_heads: int | None, ulysses: int) -> str | None:
    """Why so many ranks cannot share these heads, in the words of `parallel.ulysses`; None where they can, or nobody knows yet."""
    if heads is not None and heads % ulysses:
        return f"{heads} query heads do not split over {ulysses} ranks"
    if kv_heads is not None and kv_heads % ulysses and ulysses % kv_heads:
        return f"{kv_heads} key-value heads neither split over {ulysses} ranks nor does each go to equally many of them"
    return None
