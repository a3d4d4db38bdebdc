"""What happens after which step, and where it is told."""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import fields, replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from longtrain.models.flops import Flops
from longtrain.parallel.context import Grid, ParallelContext, create_context
from longtrain.plan import make_plan
from longtrain.recipe.load import load_recipe
from longtrain.train import loop
from longtrain.train.assemble import Run, open_data
from longtrain.train.metrics import Metrics
from longtrain.train.optim import learning_rate
from longtrain.train.resume import choose
from longtrain.train.run import run_training
from longtrain.train.run_folder import RECIPE_FILE
from longtrain.train.state import Progress, RecentLosses
from longtrain.train.step import StepOutcome
from longtrain.train.tracking import METRICS_FILE, JsonLines, Trackers, read_metrics
from tests.distributed import run_ranks
from tests.tiny import tiny_recipe, write_corpus

KEYS = ["step", "loss", "eval_loss", "lr", "grad_norm", "tokens", "tokens_per_second", "tokens_per_second_per_rank"]
KEYS += ["step_seconds", "mfu_causal", "mfu_full", "memory_gib", "eval_by_position", "skipped_steps", "save_seconds"]
KEYS += ["loss_spikes", "roll_backs"]
CADENCE = ["checkpoint.every=4", "evaluation.every=3", "tracking.every=5"]
METRICS = Metrics(7, 2.5, None, 1e-3, 0.5, 1344, 3000.0, 1500.0, 0.064, None, None, 1.25)


class Recorder:
    def __init__(self) -> None:
        self.rows: list[Metrics] = []
        self.said: list[str] = []

    def log(self, metrics: Metrics) -> None:
        self.rows.append(metrics)

    def say(self, text: str) -> None:
        self.said.append(text)

    def close(self) -> None:
        pass


class Stage:
    """A run whose steps, evaluations and checkpoints are only written down."""

    def __init__(self, patch: pytest.MonkeyPatch, *overrides: str, done: int = 0, skips: Sequence[int] = ()) -> None:
        self.trained: list[tuple[int, float]] = []
        self.saved: list[int] = []
        self.evaluated: list[int] = []
        self.seen = Recorder()
        plan = make_plan(tiny_recipe(*overrides), 1, "cpu")
        place = {"rank": 0, "local_rank": 0, "device": torch.device("cpu"), "timeout": timedelta(minutes=1)}
        ctx = create_context(Grid(1, 1), **cast(Any, place))
        loader = SimpleNamespace(step=lambda step: step)

        def train_step(engine: Any, plan: Any, ctx: Any, step: Any, lr: float) -> StepOutcome:
            self.trained.append((step, lr))
            return StepOutcome(4.0 - step / 10, 0.5, Flops(1000, 2000), step in skips)

        def save(run: Run, **_: bool) -> None:
            self.saved.append(run.progress.step)
            run._saved = run.progress.step

        patch.setattr(loop, "prepare_step", lambda plan, ctx, step, signs: SimpleNamespace(step=step, signs=signs))
        patch.setattr(
            loop, "train_step", lambda engine, plan, ctx, prepared, lr, **_: train_step(engine, plan, ctx, prepared.step, lr)
        )
        patch.setattr(Run, "save", save)
        nothing = cast(Any, None)
        self.run = Run(plan, ctx, nothing, nothing, cast(Any, loader), Path("nowhere"), Trackers([self.seen]))
        self.run.progress = Progress(done, done * 192, done * 4)
        self.run._saved = done

    def train(self, until: int) -> Progress:
        def evaluate(run: Run) -> Any:
            self.evaluated.append(run.progress.step)
            return SimpleNamespace(loss=3.5, by_position=[(0, 15, 3.5, 7)])

        return loop.train(self.run, until=until, evaluate=evaluate)

    @property
    def reported(self) -> list[int]:
        return [row.step for row in self.seen.rows]


@pytest.mark.parametrize(
    ("done", "until", "saved", "evaluated", "reported"),
    [
        (0, 10, [4, 8, 10], [1, 3, 6, 9, 10], [1, 3, 5, 6, 9, 10]),
        (0, 8, [4, 8], [1, 3, 6], [1, 3, 5, 6]),
        (0, 1, [1], [1], [1]),
        (5, 10, [8, 10], [6, 9, 10], [6, 9, 10]),
        (4, 5, [5], [], [5]),
        (6, 7, [7], [], []),
        (10, 10, [], [], []),
    ],
)
def test_cadence(
    monkeypatch: pytest.MonkeyPatch, done: int, until: int, saved: list[int], evaluated: list[int], reported: list[int]
) -> None:
    stage = Stage(monkeypatch, *CADENCE, done=done)
    assert replace(stage.train(until), sound=0, losses=RecentLosses(), loss=None) == Progress(until, until * 192, until * 4)
    assert (stage.saved, stage.evaluated, stage.reported) == (saved, evaluated, reported)
    assert [step for step, _ in stage.trained] == list(range(done, until))


def test_without_checkpoints_not_even_the_last_step_is_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(monkeypatch, "checkpoint.every=null")
    assert stage.train(10).step == 10
    assert (stage.saved, stage.reported) == ([], list(range(1, 11)))


def test_without_evaluation_none_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(monkeypatch)
    stage.train(3)
    assert stage.evaluated == []
    assert stage.reported == [1, 2, 3]
    assert {row.eval_loss for row in stage.seen.rows} == {None}
    assert loop.train(Stage(monkeypatch, *CADENCE).run, until=2).step == 2


def test_rates_follow_the_whole_run_and_not_until(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(monkeypatch, "schedule.kind=wsd", "schedule.warmup_steps=2", "schedule.decay_steps=4", done=1)
    stage.train(5)
    expected = [learning_rate(s, kind="wsd", lr=0.01, steps=10, warmup_steps=2, decay_steps=4) for s in range(1, 5)]
    assert [lr for _, lr in stage.trained] == expected
    assert [row.lr for row in stage.seen.rows] == expected


def test_a_batch_size_that_does_not_divide_what_was_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rest of a batch is left out, loudly, and nothing is read twice."""
    stage = Stage(monkeypatch, done=3)
    stage.run.progress = replace(stage.run.progress, sequences=18)
    assert stage.train(5).sequences == 28
    assert [batch for batch, _ in stage.trained] == [5, 6]
    assert stage.seen.said == [
        "WARNING: training.batch_size 4 does not divide the 18 sequences read before: sequences 18 to 19 of the data are left out, "
        "so that none is read twice"
    ]


def test_a_skipped_update_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(monkeypatch, skips=[1])
    stage.train(3)
    assert stage.seen.said == ["step 2: a loss or gradient was not finite; nothing was updated, on any rank"]


def test_every_phase_is_told_when_it_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(monkeypatch, "checkpoint.every=2", skips=[1])
    beats: list[tuple[int, str]] = []
    loop.train(stage.run, until=3, beat=lambda step, phase: beats.append((step, phase)))
    begins = {step: [(step, "data"), (step, "agreement on the step")] for step in (1, 2, 3)}
    assert beats == [*begins[1], *begins[2], (2, "save"), *begins[3], (3, "save")], "a step that is skipped is no roll-back"


def test_a_report_holds_these_keys_and_they_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [field.name for field in fields(Metrics)] == KEYS
    stage = Stage(monkeypatch, *CADENCE)
    stage.run.ctx = replace(stage.run.ctx, world=2)
    stage.train(3)
    first, row = stage.seen.rows
    assert first.step == 1
    assert (row.step, row.loss, row.eval_loss, row.grad_norm, row.tokens) == (3, 3.8, 3.5, 0.5, 3 * 4 * 48)
    assert row.tokens_per_second * row.step_seconds == pytest.approx(4 * 48)
    assert row.tokens_per_second_per_rank == row.tokens_per_second / 2
    assert (row.mfu_causal, row.mfu_full) == (None, None)
    assert row.memory_gib > 0.01


def _rows(path: Path, steps: Sequence[int]) -> None:
    tracker = JsonLines(path, 0)
    for step in steps:
        tracker.log(replace(METRICS, step=step, loss=step / 3))
    tracker.close()


def test_json_lines_go_on_after_the_resumed_step(tmp_path: Path) -> None:
    path = tmp_path / METRICS_FILE
    _rows(path, range(1, 8))
    kept = path.read_text().splitlines()[:5]
    tracker = JsonLines(path, 5)
    assert path.read_text().splitlines() == kept
    tracker.log(replace(METRICS, step=6, loss=9.0))
    assert read_metrics(path)[-1]["loss"] == 9.0, "a row is on its way as soon as it is logged"
    tracker.close()
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3, 4, 5, 6]
    assert [list(row) for row in read_metrics(path)] == [KEYS] * 6
    assert read_metrics(path)[2]["loss"] == 1.0
    assert [path.name for path in tmp_path.iterdir()] == [METRICS_FILE]


def _train(ctx: ParallelContext, overrides: Sequence[str], untils: Sequence[int | None]) -> list[tuple[str, int]]:
    """What this rank printed, and how far it came, for runs one after the other."""
    plan = make_plan(tiny_recipe(*overrides), ctx.world, "cpu")
    split, _ = open_data(plan)
    seen = []
    for until in untils:
        printed = io.StringIO()
        with redirect_stdout(printed), redirect_stderr(printed):
            # as the command does: the choice is made before anyone has written
            start = choose(plan.recipe, split, "auto")
            ctx.all_gather_text("all have chosen")
            progress = run_training(plan, ctx, split, start, until=until, evaluate=None)
        seen.append((printed.getvalue(), progress.step))
    return seen


def test_a_run_of_two_ranks(tmp_path: Path) -> None:
    """The last step is saved, the newest are kept, --until stops short of the end, and only the main rank speaks."""
    write_corpus(tmp_path / "data", 12)
    folder = tmp_path / "run"
    overrides = [f"data.path={tmp_path / 'data'}", f"output={folder}", "checkpoint.every=2", "checkpoint.keep=2"]
    main, other = run_ranks(_train, 2, [*overrides, "parallel.cp=2"], [3, 7, None, 99], cp=2)
    assert [step for _, step in main] == [step for _, step in other] == [3, 7, 10, 10]
    assert [text for text, _ in other] == ["", "", "", ""]
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-00000008", "step-00000010"]
    assert [row["step"] for row in read_metrics(folder / METRICS_FILE)] == list(range(1, 11))
    assert load_recipe(folder / RECIPE_FILE) == tiny_recipe(*overrides, "parallel.cp=2")

    first, second, third, idle = (text for text, _ in main)
    assert "tiny: " in first.splitlines()[0]
    assert "dp 1 x cp 2" in first.splitlines()[0]
    assert [line.split("  ")[0] for line in first.splitlines() if line.startswith("step ")] == [f"step {n}/10" for n in (1, 2, 3)]
    assert [line for line in first.splitlines() if line.startswith("saved ")] == [
        f"saved {folder}/checkpoints/step-0000000{n}" for n in (2, 3)
    ]
    assert f"resuming {folder}/checkpoints/step-00000003 (step 3)" in second
    assert f"resuming {folder}/checkpoints/step-00000007 (step 7)" in third
    assert f"nothing to do: {folder} is at step 10 already; to train on, raise training.steps, now 10" in idle
    assert "saved" not in idle


def _again(ctx: ParallelContext, overrides: Sequence[str], drawn: str) -> None:
    """A run, to its end."""
    plan = make_plan(tiny_recipe(*overrides), ctx.world, "cpu")
    split, _ = open_data(plan)
    with redirect_stdout(io.StringIO()):
        start = choose(plan.recipe, split, "auto")
        run_training(plan, ctx, split, start, until=None, evaluate=None, draw=lambda: Path(drawn).write_text("plot") and [])


def test_a_finished_run_that_is_started_again_touches_no_file(tmp_path: Path) -> None:
    write_corpus(tmp_path / "data", 12)
    folder = tmp_path / "run"
    overrides = [f"data.path={tmp_path / 'data'}", f"output={folder}", "training.steps=2"]
    run_ranks(_again, 1, overrides, str(folder / "loss.png"))

    def seen() -> dict[Path, tuple[int, int]]:
        return {path: ((stat := path.stat()).st_mtime_ns, stat.st_ino) for path in (folder, *folder.rglob("*"))}

    before = seen()
    assert folder / "loss.png" in before
    run_ranks(_again, 1, overrides, str(folder / "loss.png"))
    assert seen() == before
