"""Dropout of a decoder: against a plain one with the same masks, in training only, and the same in every mode of recomputation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from longtrain.attention.dropout import Noise, derive, keep_mask
from longtrain.kernels.local import LocalAttend
from longtrain.models import Activations, Decoder, ModelConfig, held_bytes
from tests.models.test_activations import ContiguousKernel, bytes_saved

P, ATTENTION_P = 0.3, 0.2


@pytest.fixture
def opt(small: ModelConfig) -> ModelConfig:
    return replace(small, family="opt", kv_heads=4, tied_embeddings=True, dropout=P, attention_dropout=ATTENTION_P)


def noise_of(batch: tuple) -> Noise:
    return Noise(torch.tensor([5, 2**40 + 1]), torch.arange(batch[0].shape[1]))


def plain_opt(model: Decoder, config: ModelConfig, batch: tuple, seeds: Tensor) -> Tensor:
    """The summed loss of OPT as Zhang et al. 2022 train it: dropout of probabilities and of what both layers add."""
    weights = dict(model.named_parameters())
    tokens, positions, _, labels = batch
    length = torch.arange(tokens.shape[1])

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])

    def drop(x: Tensor, layer: int, place: int) -> Tensor:
        kept = keep_mask(derive(derive(seeds, layer), place), 1, length, torch.arange(x.shape[-1]), P)[:, 0]
        return x * kept / (1 - P)

    x = weights["embedding.weight"][tokens] + weights["positions.weight"][positions + 2]
    for layer in range(config.layers):
        name = f"blocks.{layer}."
        y = norm(x, name + "attention_norm")
        q, k, v = (
            linear(y, f"{name}attention.{which}").unflatten(-1, (config.heads, -1)).transpose(1, 2)
            for which in ("query", "key", "value")
        )
        scores = (q @ k.mT / config.head_dim**0.5).masked_fill(length[:, None] < length, -torch.inf)
        kept = keep_mask(derive(derive(seeds, layer), 0), config.heads, length, length, ATTENTION_P)
        out = (scores.softmax(-1) * kept / (1 - ATTENTION_P)) @ v
        x = x + drop(linear(out.transpose(1, 2).flatten(2), name + "attention.output"), layer, 1)
        y = norm(x, name + "mlp_norm")
        x = x + drop(linear(F.relu(linear(y, name + "mlp.up")), name + "mlp.down"), layer, 2)
    logits = F.linear(norm(x, "norm"), weights["embedding.weight"])
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")


def gradients(model: Decoder, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


def test_it_is_that_of_opt(opt: ModelConfig, build: Callable[..., Decoder], plain_batch: Callable) -> None:
    model, batch = build(opt).double(), plain_batch(opt)
    noise = noise_of(batch)
    found, true = model(*batch, noise), plain_opt(model, opt, batch, noise.seeds)
    torch.testing.assert_close(found.double(), true, rtol=1e-6, atol=0)
    for mine, theirs in zip(gradients(model, found), gradients(model, true), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    other = model(*batch, Noise(noise.seeds + 1, noise.places))
    assert abs(other - found) > 1e-3


@pytest.mark.parametrize("mode", list(Activations))
def test_every_mode_recomputes_the_same(
    opt: ModelConfig, build: Callable[..., Decoder], plain_batch: Callable, mode: Activations
) -> None:
    batch = plain_batch(opt)
    plain, recomputing = build(opt), build(opt, mode)
    losses = [model(*batch, noise_of(batch)) for model in (plain, recomputing)]
    assert torch.equal(*losses)
    pairs = zip(gradients(plain, losses[0]), gradients(recomputing, losses[1]), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_evaluation_drops_nothing(opt: ModelConfig, build: Callable[..., Decoder], plain_batch: Callable) -> None:
    batch, without = plain_batch(opt), replace(opt, dropout=0.0, attention_dropout=0.0)
    model = build(opt)
    assert abs(model(*batch, noise_of(batch)) - build(without)(*batch)) > 1e-3
    model.eval()
    assert torch.equal(model(*batch), build(without)(*batch))
    assert torch.equal(model(*batch, noise_of(batch)), build(without)(*batch))


def test_training_without_noise_is_refused(opt: ModelConfig, build: Callable[..., Decoder], plain_batch: Callable) -> None:
    with pytest.raises(ValueError, match="needs noise"):
        build(opt)(*plain_batch(opt))


def test_bytes_held(small: ModelConfig, build: Callable[..., Decoder], plain_batch: Callable) -> None:
    config = replace(small, tied_embeddings=True, dropout=P)
    batch = plain_batch(config)
    batch = (*batch, noise_of(batch))
    attend = LocalAttend(ContiguousKernel())
    two, four = (bytes_saved(build(replace(config, layers=layers), "none", attend), batch) for layers in (2, 4))
    assert (four - two) / 2 == held_bytes(config, Activations.NONE, batch[0].numel(), 4)
