from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from longtrain.train.optim import decay_groups, learning_rate

SHAPES = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(["cosine", "linear", "wsd", "constant"]),
        "steps": st.integers(1, 200),
        "warmup_steps": st.integers(0, 50),
        "decay_steps": st.integers(1, 100),
        "final_ratio": st.floats(0, 1),
    }
)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 5)
        self.head.weight = self.embedding.weight


def test_weights_decay_and_vectors_do_not_and_tied_ones_count_once() -> None:
    model = Tied()
    decayed, others = decay_groups(model, 0.1)
    assert [p is model.embedding.weight for p in decayed["params"]] == [True]
    assert decayed["weight_decay"] == 0.1
    assert {id(p) for p in others["params"]} == {id(model.norm.weight), id(model.norm.bias), id(model.head.bias)}
    assert others["weight_decay"] == 0.0


def test_empty_groups_are_left_out() -> None:
    assert [len(group["params"]) for group in decay_groups(nn.Linear(2, 2, bias=False), 0.1)] == [1]


def test_a_partitioned_weight_counts_by_its_whole_shape() -> None:
    model = nn.Linear(2, 2, bias=False)
    model.weight.data = torch.empty(0)
    model.weight.ds_shape = torch.Size([2, 2])  # type: ignore[assignment]
    assert decay_groups(model, 0.5)[0]["weight_decay"] == 0.5


def test_groups_are_bounded_and_keep_the_order_of_the_model() -> None:
    """ZeRO copies a whole group at each step; what is larger than the bound is a group of its own."""
    sizes = (3, 4, 20, 2, 2, 2, 1, 10)
    model = nn.Sequential(*(nn.Linear(size, 1) for size in sizes))
    groups = decay_groups(model, 0.1, largest=10)
    assert [[p.numel() for p in group["params"]] for group in groups] == [[3, 4], [20], [2, 2, 2, 1], [10], [1] * len(sizes)]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.1, 0.1, 0.1, 0.0]
    once = [id(p) for group in groups for p in group["params"]]
    assert sorted(once) == sorted(id(p) for p in model.parameters())
    assert len(decay_groups(model, 0.1)) == 2


@given(SHAPES)
def test_schedule_rises_then_never_rises_again(shape: dict) -> None:
    lr, warmup, last = 2.0, shape["warmup_steps"], shape["steps"] - 1
    rates = [learning_rate(step, lr=lr, **shape) for step in range(shape["steps"] + 3)]
    assert all(0 <= rate <= lr * (1 + 1e-12) for rate in rates)
    if warmup:
        assert rates[0] == lr / warmup
    if warmup <= last:
        assert rates[:warmup] == sorted(rates[:warmup])
        falling = rates[warmup:]
        assert all(later <= earlier * (1 + 1e-12) for earlier, later in itertools.pairwise(falling))
        end = lr if shape["kind"] == "constant" else lr * shape["final_ratio"]
        assert rates[last] == pytest.approx(end)
        assert rates[last + 1 :] == pytest.approx([rates[last]] * 3)


@given(SHAPES)
def test_schedule_has_no_jumps(shape: dict) -> None:
    lr, steps, warmup = 1.0, shape["steps"], shape["warmup_steps"]
    if warmup >= steps:
        return
    falling = steps - warmup if shape["kind"] != "wsd" else min(shape["decay_steps"], steps - warmup)
    # Nothing changes faster than the steepest of warm-up, a straight fall, and the middle of a cosine.
    bound = max(1 / warmup if warmup else 0, math.pi / 2 / falling) * lr * (1 + 1e-9)
    rates = [learning_rate(step, lr=lr, **shape) for step in range(steps)]
    assert all(abs(b - a) <= bound for a, b in itertools.pairwise(rates))


def test_wsd_stays_and_then_falls_linearly() -> None:
    rates = [learning_rate(s, kind="wsd", lr=1.0, steps=10, warmup_steps=2, decay_steps=4, final_ratio=0.0) for s in range(10)]
    assert rates == pytest.approx([0.5, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0])


def test_cosine_is_half_way_in_the_middle() -> None:
    assert learning_rate(4, kind="cosine", lr=1.0, steps=10, final_ratio=0.0) == pytest.approx(0.5)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="'step' is not known"):
        learning_rate(0, kind="step", lr=1.0, steps=2)
    with pytest.raises(ValueError, match="needs decay_steps"):
        learning_rate(0, kind="wsd", lr=1.0, steps=2)
