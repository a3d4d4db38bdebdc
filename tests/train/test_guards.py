"""A loss or gradient that is not finite, on one rank, changes nothing on any; too many end the run; a failed save does not."""

from __future__ import annotations

import io
import math
import random
import statistics
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch

from longtrain.batch import IGNORE
from longtrain.errors import LongtrainError, TrainingError
from longtrain.parallel.context import ParallelContext
from longtrain.parallel.deepspeed import Engine
from longtrain.plan import make_plan
from longtrain.train import checkpoint
from longtrain.train.assemble import open_data
from longtrain.train.checkpoint_format import read_state
from longtrain.train.guards import check_skips, poison_if_broken, step_poisoned
from longtrain.train.resume import CHECKPOINTS, choose
from longtrain.train.run import run_training
from longtrain.train.state import Progress, RecentLosses
from longtrain.train.tracking import METRICS_FILE, read_metrics
from tests.distributed import run_ranks
from tests.tiny import tiny_recipe, write_corpus


def test_a_finite_loss_is_not_touched() -> None:
    for value, earlier, broken in [(2.0, [], False), (2.0, [3.0], False), (float("inf"), [], True), (2.0, [float("nan")], True)]:
        loss = torch.tensor(value, requires_grad=True)
        poison_if_broken(loss, [torch.tensor(x) for x in earlier]).backward()
        assert loss.grad is not None
        assert bool(loss.grad.isnan()) == broken
        assert broken or loss.grad == 1.0


def test_the_last_good_checkpoint_is_named(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        (tmp_path / f"step-{step:08d}").mkdir()
        (tmp_path / f"step-{step:08d}" / "manifest.json").touch()
    check_skips(Progress(6, skipped_in_row=1, sound=4), 2, tmp_path)
    # steps 5 and 6 were skipped: nobody knows about the weights after step 4
    with pytest.raises(TrainingError, match=r"step 6: the last 2 steps updated nothing.* last good checkpoint is .*step-00000002"):
        check_skips(Progress(6, skipped_in_row=2, sound=3), 2, tmp_path)
    with pytest.raises(TrainingError, match=r"the newest checkpoint from before that is .*step-00000004"):
        check_skips(Progress(6, skipped_in_row=2, sound=0), 2, tmp_path)
    with pytest.raises(TrainingError, match="there is no checkpoint from before that"):
        check_skips(Progress(6, skipped_in_row=5, sound=0), 2, tmp_path)


def _train(ctx: ParallelContext, overrides: Sequence[str], broken: Sequence[int], disk: Sequence[int]) -> tuple[str, str]:
    """What was printed, and the refusal. broken: steps (from 1) with an infinite loss, whose gradients are finite, on the last
    rank. disk: saves (from 1) that find it full there."""
    plan = make_plan(tiny_recipe(*overrides), ctx.world, "cpu")
    split, _ = open_data(plan)
    start = choose(plan.recipe, split, "auto")
    ctx.all_gather_text("chosen")
    forward, write, calls = Engine.forward, checkpoint.write_tensors, {"forward": 0, "write": 0}
    mine, refused, said = ctx.rank == ctx.world - 1, "", io.StringIO()

    def spoilt(engine: Engine, *arguments: Any) -> Any:
        # the probe at the start runs forward with one tensor
        calls["forward"] += len(arguments) > 1
        step = (calls["forward"] - 1) // plan.accumulation + 1
        first = (calls["forward"] - 1) % plan.accumulation == 0
        loss = forward(engine, *arguments)
        return loss + float("inf") if mine and first and len(arguments) > 1 and step in broken else loss

    def full(*arguments: Any) -> Any:
        calls["write"] += 1
        if mine and calls["write"] in disk:
            raise OSError(28, "No space left on device")
        return write(*arguments)

    with pytest.MonkeyPatch.context() as patch, redirect_stdout(said):
        patch.setattr(Engine, "forward", spoilt)
        patch.setattr(checkpoint, "write_tensors", full)
        try:
            run_training(plan, ctx, split, start, until=None, evaluate=None)
        except LongtrainError as error:
            refused = f"{type(error).__name__}: {error}"
    return said.getvalue(), refused


def _train_all(ctx: ParallelContext, runs: Sequence[tuple[Any, ...]]) -> list[tuple[str, str]]:
    return [_train(ctx, *run) for run in runs]


@pytest.mark.parametrize("world", [pytest.param(1, marks=pytest.mark.faults), 2])
def test_bad_steps(tmp_path: Path, world: int) -> None:
    write_corpus(tmp_path / "data", 7)
    common = [f"data.path={tmp_path / 'data'}", "training.steps=5", "checkpoint.every=1", "checkpoint.keep=9"]
    common += [f"training.micro_batch_size={world}", "schedule.kind=constant"]
    stages = [0, 1, 2, 3]
    runs = [([*common, f"zero.stage={stage}", f"output={tmp_path / str(stage)}"], [3], []) for stage in stages]
    runs.append(([*common, "training.max_skipped=2", f"output={tmp_path / 'many'}"], [3, 4], []))
    ranks = run_ranks(_train_all, world, runs)
    for stage in stages:
        said, refused = ranks[0][stage]
        assert refused == ""
        assert "step 3: a loss or gradient was not finite; nothing was updated, on any rank" in said
        folder = tmp_path / str(stage)
        files = [folder / CHECKPOINTS / f"step-{step:08d}/rank-00000.safetensors" for step in (2, 3, 4)]
        before, at, after = (path.read_bytes() for path in files)
        assert before == at, "master weights and moments"
        assert at != after
        rows = read_metrics(folder / METRICS_FILE)
        assert [row["skipped_steps"] for row in rows] == [0, 0, 1, 1, 1]
        assert rows[2]["loss"] is None
        assert any(row["save_seconds"] for row in rows)
        assert read_state(folder / CHECKPOINTS / "step-00000005").skipped == 1
    for rank in ranks:
        said, refused = rank[-1]
        assert refused.startswith("TrainingError: step 4: the last 2 steps updated nothing")
        assert "last good checkpoint is" in refused
        assert "step-00000001." in refused


@pytest.mark.parametrize("world", [1, 2])
def test_a_full_disk_stops_nothing_unless_it_should(tmp_path: Path, world: int) -> None:
    write_corpus(tmp_path / "data", 7)
    common = [f"data.path={tmp_path / 'data'}", "training.steps=6", "checkpoint.every=2", "checkpoint.keep=9"]
    going = [*common, f"output={tmp_path / 'going'}"]
    stopping = [*common, f"output={tmp_path / 'stopping'}", "checkpoint.on_failure=stop"]
    last = [*common, f"output={tmp_path / 'last'}"]
    ranks = run_ranks(_train_all, world, [(going, [], [2]), (stopping, [], [2]), (last, [], [3, 4])])
    (said, refused), *_ = ranks[0]
    assert refused == ""
    prefix = "" if world == 1 else "rank 1: "
    assert f"ERROR: a checkpoint could not be saved: {prefix}OSError: [Errno 28] No space left on device" in said
    found = sorted(path.name for path in (tmp_path / "going" / CHECKPOINTS).iterdir())
    assert found == ["step-00000002", "step-00000006"]
    for rank in ranks:
        assert rank[1][1].startswith("CheckpointError: ")
        assert rank[2][1].startswith("CheckpointError: "), "the last checkpoint of a run must be there"
    assert [path.name for path in (tmp_path / "stopping" / CHECKPOINTS).iterdir()] == ["step-00000002"]
    assert sorted(path.name for path in (tmp_path / "last" / CHECKPOINTS).iterdir()) == ["step-00000002", "step-00000004"]


def test_spikes_are_told_from_noise() -> None:
    draw = random.Random(0)
    noise = [5.0 + draw.gauss(0, 0.1) for _ in range(300)]
    losses = RecentLosses()
    for number, loss in enumerate(noise):
        limit = losses.limit(6.0, 100)
        assert (limit == math.inf) == (number < 100)
        assert loss < limit
        losses = losses.after(loss, 100, limit)
        if number == 99:
            assert losses.mean == pytest.approx(statistics.fmean(noise[:100]))
            assert losses.variance == pytest.approx(statistics.pvariance(noise[:100]))
    assert losses.limit(None, 100) == math.inf
    assert losses.mean == pytest.approx(5, abs=0.1)
    assert 5.3 < losses.limit(6.0, 100) < 5.9
    assert losses.after(math.nan, 100, math.inf) == losses.after(math.inf, 100, math.inf) == losses
    after = losses.after(1e6, 100, losses.limit(6.0, 100))
    assert after.limit(6.0, 100) < 5.9 * 1.1, "a spike, however high, hardly moves the limit"
    level, rejected = losses, 0
    while (limit := level.limit(6.0, 100)) < 8.0:
        level, rejected = level.after(8.0, 100, limit), rejected + 1
    assert 5 < rejected < 30, "another level is accepted in the end"


class FakeScaler:
    """An engine in fp16, whose every step overflows."""

    def __init__(self, scale: float) -> None:
        self.state = {"cur_scale": scale, "cur_iter": 7.0}

    def scaler_state(self) -> dict[str, float]:
        return dict(self.state)

    def set_scaler_state(self, state: dict[str, float]) -> None:
        self.state = dict(state)

    def step(self) -> str:
        if self.state["cur_scale"] <= 1:
            raise RuntimeError("DeepSpeed ends the run")
        self.state = {"cur_scale": self.state["cur_scale"] / 2, "cur_iter": self.state["cur_iter"] + 1}
        return "stepped"


@pytest.mark.parametrize("scale", [1.0, 65536.0])
def test_a_spike_leaves_the_loss_scale_alone(scale: float) -> None:
    engine: Any = FakeScaler(scale)
    assert step_poisoned(engine) == "stepped"
    assert engine.state == {"cur_scale": scale, "cur_iter": 7.0}


def _train_bare(ctx: ParallelContext, runs: Sequence[tuple[Sequence[str], float]]) -> list[str]:
    """What was printed. The last micro batch of every step has no label, on any rank; the loss of the first one in step 6 is
    multiplied on the last rank."""
    said = []
    for overrides, factor in runs:
        plan = make_plan(tiny_recipe(*overrides), ctx.world, "cpu")
        split, _ = open_data(plan)
        start = choose(plan.recipe, split, "auto")
        calls, forward = 0, Engine.forward

        def spoilt(engine: Engine, *arguments: Any) -> Any:
            nonlocal calls
            if len(arguments) == 1:
                return forward(engine, *arguments)  # noqa: B023
            step, micro = divmod(calls, plan.accumulation)  # noqa: B023
            calls += 1
            tokens, positions, mask, labels, noise = arguments
            last = micro == plan.accumulation - 1  # noqa: B023
            loss = forward(engine, tokens, positions, mask, torch.full_like(labels, IGNORE) if last else labels, noise)  # noqa: B023
            assert not (last and loss)
            mine = ctx.rank == ctx.world - 1 and step == 5 and micro == 0
            return loss * factor if mine else loss  # noqa: B023

        with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as text:
            patch.setattr(Engine, "forward", spoilt)
            run_training(plan, ctx, split, start, until=None, evaluate=None)
        said.append(text.getvalue())
    return said


@pytest.mark.parametrize(("world", "stages"), [(1, (0, 2)), (2, (1, 3))])
def test_a_last_micro_batch_without_a_label_carries_the_verdict(tmp_path: Path, world: int, stages: Sequence[int]) -> None:
    """Its loss is 0, and what makes the engine skip is the gradient of that: 0 x NaN in the head's weight."""
    write_corpus(tmp_path / "data", 11)
    runs = []
    for stage in stages:
        for name, factor in (("inf", math.inf), ("spike", 10.0)):
            own = [f"data.path={tmp_path / 'data'}", *SPIKY, f"output={tmp_path / f'{name}-{stage}'}", f"zero.stage={stage}"]
            runs.append(([*own, "guards.on_spike=skip", "training.micro_batch_size=1"], factor))
    said = run_ranks(_train_bare, world, runs)[0]
    for (overrides, factor), text in zip(runs, said, strict=True):
        reason = "WARNING: loss " if math.isfinite(factor) else "a loss or gradient was not finite"
        [line] = [line for line in text.splitlines() if line.startswith(f"step 6: {reason}")]
        assert line.endswith("; nothing was updated, on any rank"), overrides
        folder = Path(overrides[-4].removeprefix("output=")) / CHECKPOINTS
        found = [[path.read_bytes() for path in sorted((folder / f"step-{step:08d}").glob("rank-*"))] for step in (5, 6, 7)]
        assert found[0] == found[1] != found[2], overrides
        assert len(found[0]) == world


SPIKY = ["training.steps=8", "checkpoint.every=1", "checkpoint.keep=9", "schedule.kind=constant", "guards.spike_window=5"]


def _train_spiky(ctx: ParallelContext, runs: Sequence[tuple[Sequence[str], Sequence[int], int | None]]) -> list[str]:
    """What was printed. The loss of the given steps (from 1) is ten times as high on the last rank; the run ends at a step."""
    said = []
    for overrides, high, until in runs:
        plan = make_plan(tiny_recipe(*overrides), ctx.world, "cpu")
        split, _ = open_data(plan)
        start = choose(plan.recipe, split, "auto")
        ctx.all_gather_text("chosen")
        done, calls, forward = (0 if start.checkpoint is None else int(start.checkpoint.name[5:])), 0, Engine.forward

        def spoilt(engine: Engine, *arguments: Any) -> Any:
            nonlocal calls
            calls += len(arguments) > 1
            step = done + (calls - 1) // plan.accumulation + 1  # noqa: B023
            loss = forward(engine, *arguments)  # noqa: B023
            mine = ctx.rank == ctx.world - 1 and len(arguments) > 1 and step in high  # noqa: B023
            return 10 * loss if mine else loss

        with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as text:
            patch.setattr(Engine, "forward", spoilt)
            run_training(plan, ctx, split, start, until=until, evaluate=None)
        said.append(text.getvalue())
    return said


@pytest.mark.parametrize("world", [pytest.param(1, marks=pytest.mark.faults), 2])
def test_loss_spikes(tmp_path: Path, world: int) -> None:
    write_corpus(tmp_path / "data", 11)
    runs: list[tuple[Sequence[str], Sequence[int], int | None]] = []

    def plan(name: str, *more: str, high: Sequence[int] = (6,), until: int | None = None) -> None:
        own = [f"data.path={tmp_path / 'data'}", *SPIKY, f"output={tmp_path / name}", *more]
        runs.append((own, high, until))

    stages = [0, 1, 2, 3]
    for stage in stages:
        plan(f"skip-{stage}", "guards.on_spike=skip", f"zero.stage={stage}")
    plan("report")
    plan("off", "guards.spike_deviations=null")
    plan("halves", "guards.on_spike=skip", until=5)
    plan("halves", "guards.on_spike=skip")
    plan("calm", "guards.on_spike=skip", high=())
    plan("calm-off", "guards.spike_deviations=null", high=())
    said = run_ranks(_train_spiky, world, runs)[0]

    def learnt(name: str, step: int) -> list[bytes]:
        return [path.read_bytes() for path in sorted((tmp_path / name / CHECKPOINTS / f"step-{step:08d}").glob("rank-*"))]

    for stage in stages:
        name = f"skip-{stage}"
        assert "step 6: WARNING: loss " in said[stage]
        assert "is a spike: more than 6 deviations above " in said[stage]
        lines = [line for line in said[stage].splitlines() if "is a spike" in line]
        assert len(lines) == 1, lines
        line = lines[0]
        assert line.endswith("; nothing was updated, on any rank")
        assert learnt(name, 5) == learnt(name, 6) != learnt(name, 7)
        rows = read_metrics(tmp_path / name / METRICS_FILE)
        assert [row["loss_spikes"] for row in rows] == [row["skipped_steps"] for row in rows] == [0] * 5 + [1] * 3
        assert rows[5]["loss"] > 2 * rows[4]["loss"], "the loss is told as it was"
    [line] = [line for line in said[4].splitlines() if "is a spike" in line]
    assert line.endswith("; the update was made all the same (guards.on_spike)")
    rows = read_metrics(tmp_path / "report" / METRICS_FILE)
    assert [row["loss_spikes"] for row in rows] == [0] * 5 + [1] * 3
    assert {row["skipped_steps"] for row in rows} == {0}
    assert learnt("report", 8) == learnt("off", 8) != learnt("skip-1", 8)
    assert "is a spike" not in said[5]
    state = read_state(tmp_path / "halves" / CHECKPOINTS / "step-00000008")
    assert state.model_copy(update={"recipe": ""}) == read_state(tmp_path / "skip-1" / CHECKPOINTS / "step-00000008").model_copy(
        update={"recipe": ""}
    )
    assert (state.spikes, state.skipped, state.loss_count) == (1, 1, 8)
    assert learnt("halves", 8) == learnt("skip-1", 8)
    assert learnt("calm", 8) == learnt("calm-off", 8), "to look costs no bit"
