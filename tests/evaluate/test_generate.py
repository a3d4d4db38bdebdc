from __future__ import annotations

import pytest
import torch

from longtrain.attention import AttentionMask, Band
from longtrain.evaluate.generate import generate
from longtrain.kernels.local import LocalAttend
from longtrain.kernels.memory_efficient import MemoryEfficientKernel
from longtrain.models import Decoder, ModelConfig, initialise

VOCAB, LONGEST = 23, 12


@pytest.fixture(scope="module")
def model() -> Decoder:
    config = ModelConfig("llama", VOCAB, 16, 2, 2, 1, 8, 24, max_positions=LONGEST, window=7, init_std=0.5)
    decoder = Decoder(config, LocalAttend(MemoryEfficientKernel()))
    initialise(decoder, 0)
    return decoder


def test_the_same_seed_gives_the_same_text(model: Decoder) -> None:
    first = generate(model, [1, 2, 3], 8, temperature=1.0, seed=5)
    torch.manual_seed(99)
    assert generate(model, [1, 2, 3], 8, temperature=1.0, seed=5) == first
    assert len({tuple(generate(model, [1, 2, 3], 8, temperature=1.0, seed=seed)) for seed in range(8)}) > 1
    assert first[:3] == [1, 2, 3]
    assert len(first) == 11


@torch.no_grad()
def test_greedy_takes_the_most_likely_token_of_the_last_positions(model: Decoder) -> None:
    ids = generate(model, [4, 5], 20, temperature=0.0, seed=0)
    assert len(ids) == 22, "beyond the longest sequence"
    for end in range(2, 22):
        context = torch.tensor([ids[max(0, end - LONGEST) : end]])
        logits = model(context, torch.arange(context.shape[1])[None], AttentionMask(Band.causal(7)))
        assert ids[end] == int(logits[0, -1].argmax())
    assert ids == generate(model, [4, 5], 20, temperature=0.0, seed=1)


def test_stops_at_the_end_token(model: Decoder) -> None:
    free = generate(model, [4, 5], 20, temperature=0.0, seed=0)
    end = free[6]
    stopped = generate(model, [4, 5], 20, temperature=0.0, seed=0, end=end)
    assert stopped == free[: free.index(end, 2) + 1]


def test_an_end_token_in_the_prompt_is_text(model: Decoder) -> None:
    free = generate(model, [4, 5], 3, temperature=0.0, seed=0)
    assert generate(model, [4, 5], 3, temperature=0.0, seed=0, end=4)[:3] == free[:3]


@pytest.mark.parametrize("temperature", [1e-320, 1e-30, 1e-3, 1e3, float("inf")])
def test_any_temperature_is_finite(model: Decoder, temperature: float) -> None:
    ids = generate(model, [1], 4, temperature=temperature, seed=0)
    assert len(ids) == 5
    assert all(0 <= token < VOCAB for token in ids)
    if temperature < 1e-20:
        assert ids == generate(model, [1], 4, temperature=0.0, seed=0)


def test_no_tokens(model: Decoder) -> None:
    assert generate(model, [1, 2], 0, temperature=0.0, seed=0) == [1, 2]


def test_a_prompt_beyond_the_longest_sequence_is_cut_at_its_start(model: Decoder) -> None:
    prompt = list(range(20))
    ids = generate(model, prompt, 1, temperature=0.0, seed=0)
    assert ids[:20] == prompt
    assert ids[20] == generate(model, prompt[-LONGEST:], 1, temperature=0.0, seed=0)[-1]
