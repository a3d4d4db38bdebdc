"""Frequencies of rotary positions (Su et al. 2021) and the ways to stretch them over longer sequences.

Each way gives what transformers computes for an input of the length that is trained; the tests compare them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from longtrain.errors import PlanError


class RopeScaling(Protocol):
    """A way to stretch rotary positions; an instance of one of SCALINGS."""

    def frequencies(self, theta: float, dim: int) -> Tensor:
        """fp32 [dim / 2], on the CPU: radians that a pair of features turns from one position to the next."""
        ...

    @property
    def magnitude(self) -> float:
        """What cosines and sines are multiplied with: attention gets sharper where there are more keys to tell apart."""
        ...


def plain_frequencies(theta: float, dim: int) -> Tensor:
    """theta^(-2i / dim) for i < dim / 2, rounded to fp32 as elsewhere."""
    return 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim))


@dataclass(frozen=True)
class Linear:
    """Positions divided by `factor` (Chen et al. 2023)."""

    factor: float
    magnitude = 1.0

    def frequencies(self, theta: float, dim: int) -> Tensor:
        return plain_frequencies(theta, dim) / self.factor


@dataclass(frozen=True)
class Dynamic:
    """NTK-aware scaling of theta (bloc97 and emozilla 2023), for `length` tokens of a model that knows `original_length`.

    transformers chooses theta anew for every input longer than `original_length`; training has one length, and so one theta.
    """

    factor: float
    original_length: int
    length: int
    magnitude = 1.0

    def frequencies(self, theta: float, dim: int) -> Tensor:
        ratio = max(self.length, self.original_length) / self.original_length
        return plain_frequencies(theta * (self.factor * ratio - (self.factor - 1)) ** (dim / (dim - 2)), dim)


@dataclass(frozen=True)
class Yarn:
    """Peng et al. 2023: fast features keep their frequency, slow ones are divided by `factor`, with a ramp in between.

    beta_fast, beta_slow: turns within `original_length` where the ramp begins and ends. attention_factor: `magnitude`; None: what
    the paper advises, or the ratio that `mscale` and `mscale_all_dim` (DeepSeek-AI 2024) give.
    """

    factor: float
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None

    @property
    def magnitude(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._advised(self.mscale) / self._advised(self.mscale_all_dim)
        return self._advised(1.0)

    def _advised(self, scale: float) -> float:
        return 1.0 if self.factor <= 1 else 0.1 * scale * math.log(self.factor) + 1.0

    def frequencies(self, theta: float, dim: int) -> Tensor:
        low, high = (
            max(math.floor(self._feature(self.beta_fast, theta, dim)), 0),
            math.ceil(self._feature(self.beta_slow, theta, dim)),
        )
        high = min(high, dim - 1)
        span = high - low if high != low else 0.001
        ramp = ((torch.arange(dim // 2, dtype=torch.float32, device="cpu") - low) / span).clamp(0, 1)
        kept = 1 - ramp
        powers = theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim)
        return 1.0 / (self.factor * powers) * (1 - kept) + 1.0 / powers * kept

    def _feature(self, turns: float, theta: float, dim: int) -> float:
        """The pair of features, as a real number, that turns so often within `original_length`."""
        return dim * math.log(self.original_length / (turns * 2 * math.pi)) / (2 * math.log(theta))


@dataclass(frozen=True)
class Llama3:
    """LLaMA 3.1's: wavelengths above original_length / low_freq_factor are stretched by `factor`, those below original_length /
    high_freq_factor are kept, with a ramp in between."""

    factor: float
    original_length: int
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    magnitude = 1.0

    def frequencies(self, theta: float, dim: int) -> Tensor:
        plain = plain_frequencies(theta, dim)
        wavelengths = 2 * math.pi / plain
        ramp = (self.original_length / wavelengths - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        between = (1 - ramp) * plain / self.factor + ramp * plain
        long = wavelengths > self.original_length / self.low_freq_factor
        short = wavelengths < self.original_length / self.high_freq_factor
        return torch.where(long, plain / self.factor, torch.where(short, plain, between))


@dataclass(frozen=True)
class LongRope:
    """Ding et al. 2024: every frequency divided by a factor of its own: `short_factor` for training lengths up to
    `original_length`, `long_factor` beyond; each of dim / 2 numbers.

    factor: how much longer than `original_length` the model is meant to see, for the default of attention_factor.
    """

    factor: float
    original_length: int
    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    length: int
    attention_factor: float | None = None

    @property
    def magnitude(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        return 1.0 if self.factor <= 1 else math.sqrt(1 + math.log(self.factor) / math.log(self.original_length))

    def frequencies(self, theta: float, dim: int) -> Tensor:
        factors = self.long_factor if self.length > self.original_length else self.short_factor
        if len(factors) != dim // 2:
            raise PlanError(
                f"model.rope_scaling: longrope needs {dim // 2} short and long factors, one a pair of features of a head"
            )
        powers = theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim)
        return 1.0 / (torch.tensor(factors, dtype=torch.float32, device="cpu") * powers)


SCALINGS: Mapping[str, type] = {"linear": Linear, "dynamic": Dynamic, "yarn": Yarn, "llama3": Llama3, "longrope": LongRope}
"""By their names in recipes and in Hugging Face's config.json."""

LISTS = frozenset({"short_factor", "long_factor"})
"""The numbers of a scaling of which there is one for every pair of features."""

LENGTH = "original_max_position_embeddings"
"""Hugging Face's name of original_length."""


def kind_of(scaling: RopeScaling) -> str:
    """The name in SCALINGS."""
    return next(name for name, kind in SCALINGS.items() if isinstance(scaling, kind))


def make_scaling(kind: str, length: int, **values: object) -> RopeScaling:
    """The scaling of that kind for training at `length` tokens; values of None are left out. Raises PlanError by field."""
    made = SCALINGS[kind]
    known = {field.name: field for field in fields(made)}
    given = {name: value for name, value in values.items() if value is not None}
    if "length" in known:
        given["length"] = length
    unknown, needed = (
        given.keys() - known.keys(),
        {name for name, field in known.items() if field.default is MISSING} - given.keys(),
    )
    if unknown:
        raise PlanError(f"model.rope_scaling.{min(unknown)}: {kind} has no such number; delete it")
    if needed:
        raise PlanError(f"model.rope_scaling.{min(needed)}: {kind} needs it; add it")
    return made(**given)


def check_scaling(scaling: RopeScaling | None, theta: float, dim: int) -> None:
    """Raises PlanError where a scaling shortens, or where it or `theta` gives no usable frequencies for heads of `dim` features."""
    if getattr(scaling, "factor", 1.0) < 1:
        raise PlanError(f"model.rope_scaling.factor: must be at least 1, found {scaling.factor:g}")  # type: ignore[union-attr]
    try:
        usable = plain_frequencies(theta, dim) if scaling is None else scaling.frequencies(theta, dim)
        fine = bool((usable.isfinite() & (usable > 0)).all()) and 0 < (1.0 if scaling is None else scaling.magnitude) < math.inf
    except (ArithmeticError, ValueError):
        fine = False
    if not fine and scaling is None:
        raise PlanError(f"model.rope_theta: {theta:g} gives no usable frequencies with heads of {dim}; 10000 and more are usual")
    if not fine:
        raise PlanError(f"model.rope_scaling: {scaling} gives no usable frequencies with rope_theta {theta:g} and heads of {dim}")


def to_hugging_face(scaling: RopeScaling) -> dict[str, object]:
    """The scaling's part of config.json."""
    values = {name: value for name, value in asdict(scaling).items() if value is not None and name != "length"}  # type: ignore[call-overload]
    length = {LENGTH: values.pop("original_length")} if "original_length" in values else {}
    # of this kind transformers takes the original length from max_position_embeddings
    length = {} if isinstance(scaling, Dynamic) else length
    lists = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    return {"rope_type": kind_of(scaling)} | lists | length


@lru_cache(maxsize=16)
def frequencies(theta: float, dim: int, scaling: RopeScaling | None, device: torch.device) -> Tensor:
    """fp32 [dim / 2] on `device`, copied there once: the same numbers on every kind of device."""
    chosen = plain_frequencies(theta, dim) if scaling is None else scaling.frequencies(theta, dim)
    return chosen.to(device)


def tables(positions: Tensor, dim: int, theta: float, scaling: RopeScaling | None = None) -> tuple[Tensor, Tensor]:
    """cos and sin, fp32 [B, T, 1, dim / 2], of int64 positions [B, T] of any order.

    Frequencies are rounded to fp32 as elsewhere; their products with positions are not: at a million positions fp32 products
    would be wrong by up to 0.06 radian, in fp64 an angle is as exact as its cosine.
    """
    turns = frequencies(theta, dim, scaling, positions.device)
    angles = positions[..., None, None].double() * turns.double()
    angles = angles.remainder_(2 * torch.pi).float()
    if scaling is None or scaling.magnitude == 1.0:
        return angles.cos(), angles.sin()
    return angles.cos() * scaling.magnitude, angles.sin() * scaling.magnitude
