"""Every scaling gives the frequencies and the attention factor of transformers, and changes something."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from longtrain.errors import PlanError
from longtrain.models.rope import (
    SCALINGS,
    Dynamic,
    Linear,
    Llama3,
    LongRope,
    RopeScaling,
    Yarn,
    check_scaling,
    frequencies,
    kind_of,
    make_scaling,
    plain_frequencies,
    tables,
    to_hugging_face,
)
from longtrain.recipe.model import ROPE_NUMBERS, RopeKind

DIM, ORIGINAL, LENGTH = 64, 4096, 32768
FACTORS = tuple(1 + i / 8 for i in range(DIM // 2))
CASES: list[tuple[RopeScaling, float]] = [
    (Linear(8.0), 10000.0),
    (Linear(2.5), 500000.0),
    (Dynamic(2.0, ORIGINAL, LENGTH), 10000.0),
    (Dynamic(8.0, ORIGINAL, ORIGINAL + 1), 500000.0),
    (Yarn(8.0, ORIGINAL), 10000.0),
    (Yarn(16.0, 2048, beta_fast=16.0, beta_slow=2.0), 500000.0),
    (Yarn(40.0, ORIGINAL, mscale=1.0, mscale_all_dim=0.7), 10000.0),
    (Yarn(4.0, ORIGINAL, attention_factor=1.5), 10000.0),
    (Llama3(8.0, 8192), 500000.0),
    (Llama3(32.0, 8192, 1.0, 4.0), 500000.0),
    (Llama3(4.0, ORIGINAL, 2.0, 16.0), 10000.0),
    (LongRope(8.0, ORIGINAL, FACTORS[::-1], FACTORS, LENGTH), 10000.0),
    (LongRope(8.0, ORIGINAL, FACTORS[::-1], FACTORS, ORIGINAL), 10000.0),
    (LongRope(8.0, ORIGINAL, FACTORS[::-1], FACTORS, LENGTH, attention_factor=1.2), 10000.0),
]


def theirs(scaling: RopeScaling, theta: float) -> tuple[torch.Tensor, float]:
    positions = getattr(scaling, "original_length", LENGTH) if isinstance(scaling, Dynamic) else LENGTH
    config = LlamaConfig(
        hidden_size=2 * DIM,
        num_attention_heads=2,
        max_position_embeddings=positions,
        rope_parameters=to_hugging_face(scaling) | {"rope_theta": theta},
    )
    return ROPE_INIT_FUNCTIONS[kind_of(scaling)](config, torch.device("cpu"), seq_len=getattr(scaling, "length", LENGTH))


@pytest.mark.parametrize(("scaling", "theta"), CASES)
def test_frequencies_are_those_of_transformers_and_not_the_plain_ones(scaling: RopeScaling, theta: float) -> None:
    found = scaling.frequencies(theta, DIM)
    expected, magnitude = theirs(scaling, theta)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert scaling.magnitude == pytest.approx(magnitude, rel=1e-12)
    plain = plain_frequencies(theta, DIM)
    assert ((found - plain).abs() > 1e-3 * plain).sum() >= DIM // 8, "the scaling does something"


def test_every_kind_is_compared() -> None:
    assert {type(scaling) for scaling, _ in CASES} == set(SCALINGS.values())


@pytest.mark.parametrize("scaling", [Yarn(8.0, ORIGINAL), LongRope(8.0, ORIGINAL, FACTORS, FACTORS, LENGTH), Linear(4.0)])
def test_tables_hold_the_magnitude(scaling: RopeScaling) -> None:
    positions = torch.tensor([[0, 7, 30000]])
    cos, sin = tables(positions, DIM, 10000.0, scaling)
    angles = positions[..., None, None].double() * scaling.frequencies(10000.0, DIM).double()
    torch.testing.assert_close(cos.double(), angles.cos() * scaling.magnitude, atol=1e-6, rtol=0)
    torch.testing.assert_close(sin.double(), angles.sin() * scaling.magnitude, atol=1e-6, rtol=0)
    assert (scaling.magnitude > 1.05) == (not isinstance(scaling, Linear))


def test_frequencies_are_copied_to_a_device_once() -> None:
    assert frequencies(10000.0, 8, None, torch.device("cpu")) is frequencies(10000.0, 8, None, torch.device("cpu"))
    assert frequencies(10000.0, 8, Linear(2.0), torch.device("cpu")) is not frequencies(10000.0, 8, None, torch.device("cpu"))


def test_recipes_have_the_numbers_of_every_kind() -> None:
    assert {kind.value for kind in RopeKind} == {"none", *SCALINGS}
    for kind, made in SCALINGS.items():
        needed, optional = ROPE_NUMBERS[RopeKind(kind)]
        assert needed | optional == {field.name for field in fields(made)} - {"length"}
        given = dict.fromkeys(("short_factor", "long_factor"), FACTORS)
        values = {name: given.get(name, 4) for name in needed}
        assert kind_of(make_scaling(kind, LENGTH, **values, mscale=None)) == kind


def test_refusals() -> None:
    with pytest.raises(PlanError, match=r"model.rope_scaling.beta_fast: linear has no such number"):
        make_scaling("linear", 8, factor=2, beta_fast=3)
    with pytest.raises(PlanError, match=r"model.rope_scaling.original_length: yarn needs it"):
        make_scaling("yarn", 8, factor=2)
    with pytest.raises(PlanError, match="longrope needs 16 short and long factors"):
        check_scaling(LongRope(2.0, 8, FACTORS, FACTORS, 16), 10000.0, 32)
    for scaling, theta, dim in ((Dynamic(2.0, 8, 16), 10000.0, 2), (Yarn(2.0, 8), 1.0, 8), (Linear(1e45), 10000.0, 8)):
        with pytest.raises(PlanError, match="gives no usable frequencies"):
            check_scaling(scaling, theta, dim)
