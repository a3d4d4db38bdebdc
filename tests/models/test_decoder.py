from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from longtrain.attention import AttentionMask, Band
from longtrain.attention.reference import ReferenceKernel
from longtrain.errors import PlanError
from longtrain.kernels.local import LocalAttend
from longtrain.kernels.plain import rotary
from longtrain.models import Decoder, ModelConfig, families, initialise, parameter_count, parameter_shapes
from longtrain.models.initialise import initial_value
from longtrain.models.rope import tables

FIRST_VALUES = [0.0316937, -0.1214039, 0.1223782]
"""Of one parameter under seed 1: a change of these changes every run that names a seed."""


def test_shapes_and_count_are_those_of_the_module(config: ModelConfig) -> None:
    model = Decoder(config, LocalAttend(ReferenceKernel()))
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == parameter_shapes(config)
    assert list(dict(model.named_parameters())) == list(parameter_shapes(config))
    assert parameter_count(config) == sum(p.numel() for p in model.parameters())


def test_llama_7b_has_its_published_size() -> None:
    config = ModelConfig("llama", 32000, 4096, 32, 32, 32, 128, 11008, 32768)
    assert parameter_count(config) == 6_738_415_616


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv_heads": 3}, "kv_heads 3 does not divide model.heads 4"),
        ({"head_dim": 7}, "head_dim 7 is odd"),
        ({"window": 0}, "window 0"),
        ({"layers": 0}, "layers is 0"),
        ({"hidden_act": "relu"}, "hidden_act 'relu' is not implemented; choose one of: silu, gelu, gelu_pytorch_tanh"),
    ],
)
def test_impossible_configurations_are_refused(small: ModelConfig, change: dict, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        replace(small, **change)


def test_unknown_families_and_parts_are_refused(small: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PlanError, match="'bert' is not implemented; choose one of: llama, qwen2, opt"):
        Decoder(replace(small, family="bert"), LocalAttend(ReferenceKernel()))
    for part in ("norm", "mlp", "positions"):
        other = replace(families.LLAMA, **{part: "strange"})
        monkeypatch.setattr(families, "FAMILIES", {"llama": other})
        with pytest.raises(PlanError, match=f"{part} 'strange' is not implemented"):
            Decoder(small, LocalAttend(ReferenceKernel()))


def test_a_tied_head_is_the_embedding(small: ModelConfig, build: Callable[..., Decoder], plain_batch: Callable) -> None:
    config = replace(small, tied_embeddings=True)
    model = build(config)
    assert model.head.weight is model.embedding.weight
    assert "head.weight" not in dict(model.named_parameters())
    assert dict(model.head.named_parameters())["weight"] is model.embedding.weight
    untied = build(replace(small, tied_embeddings=False))
    untied.load_state_dict(model.state_dict())
    batch = plain_batch(config)
    for m in (model, untied):
        m(*batch).backward()
    assert untied.embedding.weight.grad is not None
    torch.testing.assert_close(model.embedding.weight.grad, untied.embedding.weight.grad + untied.head.weight.grad)


def test_documents_do_not_see_each_other(small: ModelConfig, build: Callable[..., Decoder]) -> None:
    """A packed row gives every document the logits it has alone."""
    model = build(small)
    lengths = (1, 6, 4)
    tokens = torch.randint(small.vocab_size, (1, sum(lengths)))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    segments = torch.cat([torch.full((n,), i, dtype=torch.int32) for i, n in enumerate(lengths)])[None]
    packed = model(tokens, positions, AttentionMask(Band.causal(), segments, segments))
    for logits, document in zip(packed.split(lengths, 1), tokens.split(lengths, 1), strict=True):
        alone = model(document, torch.arange(document.shape[1])[None], AttentionMask(Band.causal()))
        torch.testing.assert_close(logits, alone)


def test_without_labels_that_bear_loss_gradients_are_zero(small: ModelConfig, build: Callable, plain_batch: Callable) -> None:
    model = build(small)
    tokens, positions, mask, labels = plain_batch(small)
    loss = model(tokens, positions, mask, torch.full_like(labels, -100))
    assert loss.item() == 0
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_low_precision_gives_fp32_loss_and_logits(small: ModelConfig, build: Callable, plain_batch: Callable) -> None:
    model = build(small).bfloat16()
    tokens, positions, mask, labels = plain_batch(small)
    assert model(tokens, positions, mask).dtype == torch.float32
    loss = model(tokens, positions, mask, labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), build(small).double()(tokens, positions, mask, labels).double(), rtol=0.02, atol=0)


class TestInitialise:
    def test_values_depend_on_seed_name_and_shape_only(self, small: ModelConfig) -> None:
        name = "blocks.1.mlp.up.weight"
        value = initial_value(small, 1, name, (48, 32))
        torch.manual_seed(5)
        assert torch.equal(value, initial_value(small, 1, name, (48, 32)))
        for seed, other, shape in ((2, name, (48, 32)), (1, name.replace("1", "0"), (48, 32)), (1, name, (32, 48))):
            assert not torch.equal(value.flatten(), initial_value(small, seed, other, shape).flatten())
        assert value.flatten()[:3].tolist() == pytest.approx(FIRST_VALUES, abs=1e-6)

    def test_scales(self, small: ModelConfig) -> None:
        config = replace(small, hidden_size=256, layers=8)
        model = Decoder(config, LocalAttend(ReferenceKernel()))
        initialise(model, 3)
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                assert torch.equal(parameter, torch.ones_like(parameter))
                continue
            residual = name.endswith(("attention.output.weight", "mlp.down.weight"))
            assert parameter.std().item() == pytest.approx(config.init_std / (4 if residual else 1), rel=0.1), name
            assert abs(parameter.mean().item()) < 0.01

    def test_one_parameter_is_whole_at_a_time_and_tied_ones_are_filled_once(self, small: ModelConfig) -> None:
        """As under ZeRO-3: outside its context a parameter is empty."""
        model = Decoder(replace(small, tied_embeddings=True), LocalAttend(ReferenceKernel()))
        whole = {p: p.data for p in model.parameters()}
        for p in model.parameters():
            p.data = torch.empty(0)
        order: list[nn.Parameter] = []

        @contextmanager
        def gathered(parameter: nn.Parameter) -> Iterator[None]:
            parameter.data = whole[parameter]
            yield
            parameter.data = torch.empty(0)
            order.append(parameter)

        initialise(model, 1, gathered)
        assert [id(p) for p in order] == [id(p) for p in model.parameters()]
        for name, parameter in model.named_parameters():
            expected = initial_value(model.config, 1, name, tuple(whole[parameter].shape))
            assert torch.equal(whole[parameter], expected)

    def test_low_precision_is_the_rounded_value(self, small: ModelConfig, build: Callable) -> None:
        low = Decoder(small, LocalAttend(ReferenceKernel())).bfloat16()
        initialise(low, 1)
        for a, b in zip(low.parameters(), build(small).parameters(), strict=True):
            assert torch.equal(a, b.bfloat16())


class TestRotary:
    def test_angles_at_a_million_positions(self) -> None:
        positions = torch.tensor([[0, 1, 2**20, 2**20 + 1, 2**24 + 1, 5]])
        cos, sin = tables(positions, 128, 10000.0)
        assert cos.shape == sin.shape == (1, 6, 1, 64)
        assert cos.dtype == torch.float32
        frequencies = (1.0 / 10000.0 ** (torch.arange(0, 128, 2).float() / 128)).double()
        angles = positions[..., None, None].double() * frequencies
        torch.testing.assert_close(cos.double(), angles.cos(), atol=5e-7, rtol=0)
        torch.testing.assert_close(sin.double(), angles.sin(), atol=5e-7, rtol=0)

    def test_scores_depend_on_distance_only(self) -> None:
        q, k = torch.randn(1, 1, 1, 64), torch.randn(1, 1, 1, 64)

        def score(i: int, j: int) -> Tensor:
            a, b = (rotary(x, x, *tables(torch.tensor([[at]]), 64, 500000.0))[0] for x, at in ((q, i), (k, j)))
            return (a * b).sum()

        for far in (1000, 2**20, 2**22):
            torch.testing.assert_close(score(far + 37, far), score(37, 0), atol=2e-5, rtol=0)
