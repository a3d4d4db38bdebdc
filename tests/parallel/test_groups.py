"""Many small parameter groups train as two do, and checkpoints do not know of groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longtrain.parallel.context import ParallelContext
from longtrain.parallel.deepspeed import Engine
from longtrain.train.checkpoint import load, save
from longtrain.train.checkpoint_format import TrainState
from longtrain.train.optim import decay_groups
from longtrain.train.step import prepare_step, train_step
from tests import grid
from tests.distributed import run_ranks
from tests.grid import RATES, Case, Task, deal, make_engine, pieces_of, train, whole
from tests.parallel.test_gradients import check
from tests.tiny import ragged_batch

SMALL = 1600
"""Elements of a group: less than the decoder's largest parameter, more than most."""
KINDS = ("master", "exp_avg", "exp_avg_sq")
TASK = Task(clip=0.3)
TODO = [Case(2, 1, stage, "contiguous", 1, "none", "memory_efficient", TASK) for stage in range(4)]


def _train_all(ctx: ParallelContext, todo: Sequence[Case]) -> list[dict[str, Any]]:
    grid.decay_groups = partial(decay_groups, largest=SMALL)
    return [train(ctx, case, [ragged_batch(step, case.task.length) for step in range(len(RATES))]) for case in todo]


def test_many_groups_train_as_one_process_does() -> None:
    ranks = run_ranks(_train_all, 2, TODO, dp=2)
    for index, case in enumerate(TODO):
        check(case, [rank[index] for rank in ranks])


def _go_on(ctx: ParallelContext, case: Case, folder: str, before: int, after: int) -> list[dict[str, Any]]:
    """Saved with groups of `before`, loaded with groups of `after`; what both hold then, and after one more step."""
    plan = case.plan()
    grid.decay_groups = partial(decay_groups, largest=before)
    first = make_engine(case, plan, ctx)

    def step(engine: Engine, number: int) -> None:
        batches = deal(ragged_batch(number, case.task.length), case, ctx.dp_rank)
        train_step(engine, plan, ctx, prepare_step(plan, ctx, batches), RATES[number])

    step(first, 0)
    save(Path(folder), first, TrainState(step=1, tokens=1, cursor=1, recipe="name: groups\n"), keep=1)
    grid.decay_groups = partial(decay_groups, largest=after)
    second = make_engine(case, plan, ctx)
    load(Path(folder), second)
    held = [{kind: pieces_of(engine, kind) for kind in KINDS} for engine in (first, second)]
    steps = [engine.adam_steps() for engine in (first, second)]
    for engine in (first, second):
        step(engine, 1)
    held += [{kind: pieces_of(engine, kind) for kind in KINDS} for engine in (first, second)]
    assert steps[0] == steps[1] == dict.fromkeys(steps[0], 1)
    first.close()
    second.close()
    return held


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize(("before", "after"), [(1 << 28, SMALL), (SMALL, 1 << 28)], ids=["two to many", "many to two"])
def test_a_checkpoint_goes_on_with_other_groups(tmp_path: Path, stage: int, before: int, after: int) -> None:
    ranks = run_ranks(_go_on, 2, replace(TODO[stage], stage=stage), str(tmp_path), before, after, dp=2)
    for kind in KINDS:
        saved, loaded, went_on, other = (whole([rank[i][kind] for rank in ranks], kind) for i in range(4))
        for name, value in saved.items():
            assert np.array_equal(value, loaded[name]), f"{kind} of {name}"
            assert not np.array_equal(value, went_on[name]), f"{kind} of {name} stood still"
            # norms of groups are summed in another order, and clip the gradient
            np.testing.assert_allclose(went_on[name], other[name], rtol=1e-5, atol=1e-8)
