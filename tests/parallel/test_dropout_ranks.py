"""Dropout is the same on any ranks: the loss, the gradients and the weights are those of one process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from longtrain.parallel.context import ParallelContext
from tests.distributed import run_ranks
from tests.grid import RATES, Case, Grids, Task, train, whole
from tests.parallel.test_gradients import TOLERANCE, worst
from tests.tiny import ragged_batch

BOTH = Task(length=45, dropout=0.3, attention_dropout=0.2)
HIDDEN = Task(length=45, dropout=0.3)
ONE = Case(1, 1, 1, "contiguous", 1, "none", "memory_efficient", BOTH)
TWO = [
    Case(1, 2, 1, "zigzag", 1, "full", "memory_efficient", BOTH),
    Case(1, 2, 2, "striped", 2, "selective", "reference", BOTH),
    Case(1, 2, 3, "contiguous", 1, "none", "memory_efficient", BOTH),
    Case(2, 1, 3, "contiguous", 2, "minimal", "memory_efficient", BOTH),
    Case(1, 2, 2, "zigzag", 1, "full", "memory_efficient", HIDDEN, ulysses=2),
]


def _train_all(ctx: ParallelContext, todo: Sequence[Case], shift: int = 0) -> list[dict[str, Any]]:
    contexts = Grids(ctx)
    steps = [
        replace(ragged_batch(step, 45), seeds=torch.tensor([2**33 * step, 5, -step, 7 + step]) + shift)
        for step in range(len(RATES))
    ]
    return [train(contexts(case), case, steps) for case in todo]


@pytest.fixture(scope="module")
def alone() -> dict[Task, dict[str, Any]]:
    tasks = [BOTH, HIDDEN, Task(length=45)]
    [results] = run_ranks(_train_all, 1, [replace(ONE, task=task) for task in tasks])
    return dict(zip(tasks, results, strict=True))


def test_two_ranks_drop_what_one_does(alone: dict[Task, dict[str, Any]]) -> None:
    ranks = run_ranks(_train_all, 2, TWO)
    for index, case in enumerate(TWO):
        found, true = [rank[index] for rank in ranks], alone[case.task]
        assert found[0]["losses"] == pytest.approx(true["losses"], rel=TOLERANCE), case
        for kind in ("exp_avg", "master"):
            ratio, name = worst(whole([rank[kind] for rank in found], kind), whole([true[kind]], kind))
            assert ratio <= 3 * TOLERANCE, f"{case}: {kind} of {name} is off by {ratio:.2e}"


def test_something_is_dropped(alone: dict[Task, dict[str, Any]]) -> None:
    """Control: each kind of dropout, and each seed, changes the loss."""
    [[other]] = run_ranks(_train_all, 1, [ONE], 1)
    losses = [result["losses"][0] for result in alone.values()] + [other["losses"][0]]
    assert len({round(loss, 5) for loss in losses}) == 4
