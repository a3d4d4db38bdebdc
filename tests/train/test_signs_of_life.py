"""A run that begins or ends slowly is not stuck, and what ended it is what is told."""

from __future__ import annotations

import io
import time
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from longtrain.errors import TrainingError
from longtrain.parallel.context import ParallelContext
from longtrain.plan import make_plan
from longtrain.train import checkpoint_folder, run
from longtrain.train import watchdog as watchdog_module
from longtrain.train.assemble import Run, assemble, open_data
from longtrain.train.checkpoint_format import read_manifest
from longtrain.train.resume import Start, choose, confirm, restore
from longtrain.train.run import run_training
from longtrain.train.watchdog import STACKS, STUCK
from tests.chain import Chain
from tests.distributed import RankError, run_ranks, start_ranks
from tests.tiny import tiny_recipe, write_corpus

SECONDS = 1.0


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus") / "data"
    write_corpus(folder, 7)
    return folder


def _recipe(data: str, output: str) -> Any:
    return tiny_recipe(f"data.path={data}", f"output={output}", f"guards.watchdog_seconds={SECONDS}", "training.steps=2")


def test_every_file_and_every_range_is_a_sign(tmp_path: Path, data: Path) -> None:
    chain, signs = Chain(tmp_path / "run", data), list[int]()
    alive = partial(signs.append, 1)
    last = chain.steps[-1]
    start = confirm(chain.engine.ctx, choose(chain.recipe, chain.split, "auto"), alive)
    files = len(read_manifest(last).files)
    assert (start.checkpoint, len(signs)) == (last, files)
    restore(chain.engine, last, verified=True, alive=alive)
    ranges = 3 * len(list(chain.engine.held_ranges()))
    assert len(signs) == files + files + ranges, "of a verified checkpoint the sizes are looked at"


def _parameters(ctx: ParallelContext, data: str, output: str) -> tuple[int, int]:
    plan, signs = make_plan(_recipe(data, output), 1, "cpu"), list[int]()
    made = assemble(plan, ctx, open_data(plan)[0], Start(None), alive=partial(signs.append, 1))
    try:
        return len(signs), len(list(made.engine.model.parameters()))
    finally:
        made.close()


def test_every_parameter_is_a_sign(tmp_path: Path, data: Path) -> None:
    [(signs, parameters)] = run_ranks(_parameters, 1, str(data), str(tmp_path / "run"))
    assert signs > parameters > 9


def _slow_start(ctx: ParallelContext, data: str, output: str) -> list[int]:
    """Every file takes a third of the patience that the whole start has, and there are four."""
    steps = []
    plan = make_plan(_recipe(data, output), 1, "cpu")
    split, _ = open_data(plan)
    hashed = checkpoint_folder.sha256_of

    def slow_hash(path: Path) -> str:
        time.sleep(watchdog_module.SLOW * SECONDS / 3)
        return hashed(path)

    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()):
        patch.setattr(watchdog_module, "START", 0.0)
        steps.append(run_training(plan, ctx, split, choose(plan.recipe, split, "auto"), until=1, evaluate=None).step)
        patch.setattr(checkpoint_folder, "sha256_of", slow_hash)
        patch.setattr(checkpoint_folder, "in_threads", lambda action, items: [action(item) for item in [*items] * 2])
        steps.append(run_training(plan, ctx, split, choose(plan.recipe, split, "auto"), until=2, evaluate=None).step)
    return steps


def test_a_start_that_reads_much_is_not_stuck(tmp_path: Path, data: Path) -> None:
    assert run_ranks(_slow_start, 1, str(data), str(tmp_path / "run")) == [[1, 2]]


def _end(ctx: ParallelContext, data: str, output: str, seconds: float) -> None:
    """Training fails, and what is to be closed takes so long."""
    plan = make_plan(_recipe(data, output), 1, "cpu")
    split, _ = open_data(plan)
    close = Run.close

    def fail(run: Run, **more: Any) -> None:
        more["beat"](1, "data")
        more["beat"](2, "data")
        raise TrainingError("the true reason")

    def slow_close(run: Run) -> None:
        time.sleep(seconds)
        close(run)

    said = Path(f"{output}-said").open("w")  # noqa: SIM115 (the process may end here)
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()), redirect_stderr(said):
        patch.setattr(watchdog_module, "START", 0.0)
        patch.setattr(watchdog_module, "GRACE", 1.0)
        patch.setattr(watchdog_module, "LAST_WORDS", 0.5)
        patch.setattr(run, "train", fail)
        patch.setattr(Run, "close", slow_close)
        run_training(plan, ctx, split, choose(plan.recipe, split, "never"), until=None, evaluate=None)


def test_what_takes_long_to_close_keeps_no_error_from_being_told(tmp_path: Path, data: Path) -> None:
    with pytest.raises(RankError, match="the true reason"):
        run_ranks(_end, 1, str(data), str(tmp_path / "run"), 2 * SECONDS)


def test_what_never_closes_is_ended_with_the_error(tmp_path: Path, data: Path) -> None:
    with start_ranks(_end, 1, str(data), str(tmp_path / "run"), 3600.0) as ranks:
        ranks.processes[0].join(60)
        assert ranks.processes[0].exitcode == STUCK
    told = "rank 0: stuck at step 2, closing, after TrainingError: the true reason: no sign of life"
    assert told in (tmp_path / "run-said").read_text()
    assert "in slow_close" in (tmp_path / "run" / STACKS / "step-00000002-rank-00000.txt").read_text()
