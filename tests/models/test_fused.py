"""One switch fuses the layers of every family, in every activation mode, and what is learnt stays the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from longtrain.kernels.language import interprets
from longtrain.kernels.layers import FUSABLE, Layers, choose_layers
from longtrain.models import Activations, Decoder, ModelConfig

needs_interpreter = pytest.mark.skipif(not interprets(), reason="kernels run on CPUs in Triton's interpreter only")


def outcome(model: Decoder, batch: tuple) -> dict[str, Tensor]:
    loss = model(*batch)
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None} | {"loss": loss.detach()}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    largest = max(value.abs().max().item() for value in expected.values())
    for name, value in expected.items():
        # the gradient of a key's bias is rounding noise: softmax does not notice it
        unit = max(1e-3 * largest, value.abs().max().item())
        torch.testing.assert_close(found[name], value, atol=2e-5 * unit, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


@needs_interpreter
def test_fused_layers_give_the_gradients_of_plain_ones(config: ModelConfig, build: Callable, plain_batch: Callable) -> None:
    batch = plain_batch(config, length=7)
    assert_close(outcome(build(config, layers=choose_layers(FUSABLE)), batch), outcome(build(config), batch))


@needs_interpreter
@pytest.mark.parametrize("mode", list(Activations)[1:])
def test_fused_layers_are_recomputed(small: ModelConfig, build: Callable, plain_batch: Callable, mode: str) -> None:
    batch = plain_batch(small, length=7)
    fused = choose_layers(FUSABLE)
    expected = outcome(build(small, layers=fused), batch)
    found = outcome(build(small, mode, layers=fused), batch)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def counted(calls: dict[str, int]) -> Layers:
    plain = choose_layers()

    def count(name: str) -> Callable:
        def function(*args, **kwargs):
            calls[name] = calls.get(name, 0) + 1
            return getattr(plain, name)(*args, **kwargs)

        return function

    return Layers(**{field.name: count(field.name) for field in fields(Layers)})


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llama", {"rms_norm": 3, "add_rms_norm": 2, "rotary": 2, "gated": 2, "linear_cross_entropy": 1}),
        ("opt", {"layer_norm": 3, "add_layer_norm": 2, "linear_cross_entropy": 1}),
    ],
)
def test_every_layer_is_taken_from_what_is_injected(
    small: ModelConfig, build: Callable, plain_batch: Callable, family: str, expected: dict[str, int]
) -> None:
    calls: dict[str, int] = {}
    build(replace(small, family=family), layers=counted(calls))(*plain_batch(small))
    assert calls == expected
