"""A run that goes back past bad data is, bit for bit, one that was stopped there and resumed; it goes back so often and no more."""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import redirect_stdout
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from longtrain.errors import LongtrainError
from longtrain.parallel.context import ParallelContext
from longtrain.parallel.deepspeed import Engine
from longtrain.plan import make_plan
from longtrain.train import checkpoint
from longtrain.train.assemble import Run, open_data
from longtrain.train.checkpoint_format import TrainState, read_state
from longtrain.train.loop import save_due
from longtrain.train.metrics import Metrics
from longtrain.train.resume import CHECKPOINTS, choose, restore
from longtrain.train.run import run_training
from longtrain.train.state import Progress
from longtrain.train.tracking import METRICS_FILE, JsonLines, read_metrics
from longtrain.train.watchdog import Watchdog
from tests.distributed import run_ranks
from tests.tiny import tiny_recipe, write_corpus

STEPS, BATCH, LENGTH = 6, 4, 48


def _train(
    ctx: ParallelContext, overrides: Sequence[str], broken: Sequence[int], stop: str | bool = False, flipped: Sequence[str] = ()
) -> tuple[str, str, list[int]]:
    """What was printed, the refusal, and the data cursor of every forward. broken: positions of the data, in steps from 0, whose
    loss is infinite on the last rank. stop: whether to be stopped right after a roll-back, or "skipping" for after a skipped step.
    flipped: files in which a bit flips when the first loss is infinite."""
    plan = make_plan(tiny_recipe(*overrides), ctx.world, "cpu")
    split, _ = open_data(plan)
    start = choose(plan.recipe, split, "auto")
    ctx.all_gather_text("chosen")
    forward, made, refused, said = Engine.forward, Run.__post_init__, "", io.StringIO()
    runs: list[Run] = []
    cursors: list[int] = []

    def spoilt(engine: Engine, *arguments: Any) -> Any:
        loss = forward(engine, *arguments)
        if len(arguments) == 1:  # the probe at the start
            return loss
        cursors.append(runs[0].progress.sequences if runs else 0)
        if cursors[-1] == BATCH * min(broken, default=-1) not in cursors[:-1]:
            for file in map(Path, flipped):
                data = file.read_bytes()
                file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        return loss + float("inf") if ctx.rank == ctx.world - 1 and cursors[-1] // BATCH in broken else loss

    def asked() -> bool:
        if stop == "skipping":
            return bool(runs) and runs[0].progress.skipped_in_row > 0
        return bool(stop) and bool(runs) and runs[0].progress.roll_backs > 0

    def remembered(run: Run) -> None:
        made(run)
        runs.append(run)

    with pytest.MonkeyPatch.context() as patch, redirect_stdout(said):
        patch.setattr(Engine, "forward", spoilt)
        patch.setattr(Run, "__post_init__", remembered)
        try:
            run_training(plan, ctx, split, start, until=None, evaluate=None, asked_to_stop=asked)
        except LongtrainError as error:
            refused = f"{type(error).__name__}: {error}"
    return said.getvalue(), refused, cursors


def _train_all(ctx: ParallelContext, runs: Sequence[tuple[Any, ...]]) -> list[tuple[str, str, list[int]]]:
    return [_train(ctx, *run) for run in runs]


def _files(folder: Path, step: int) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / CHECKPOINTS / f"step-{step:08d}").glob("rank-*")}


def _learnt(folder: Path) -> dict[str, Any]:
    """What the last checkpoint says of the run, but for where it was written."""
    return read_state(folder / CHECKPOINTS / f"step-{STEPS:08d}").model_dump(exclude={"recipe", "tracker"})


@pytest.mark.parametrize("world", [1, 2])
def test_going_back(tmp_path: Path, world: int) -> None:
    """Steps 4 and 5 are bad: checkpoint 3 may be spoilt, so the run goes back to step 2 and reads on behind sequence 20."""
    write_corpus(tmp_path / "data", 31)
    common = [f"data.path={tmp_path / 'data'}", f"training.steps={STEPS}", "checkpoint.every=1", "checkpoint.keep=2"]
    common += ["training.max_skipped=2", "guards.on_max_skipped=roll_back", "guards.spike_window=3", "optimizer.grad_clip=0.5"]
    stages = [0, 3] if world == 1 else [1, 2, 3]
    runs: list[tuple[Any, ...]] = []
    for stage in stages:
        for name in ("straight", "stopped"):
            own = [*common, f"zero.stage={stage}", f"output={tmp_path / f'{name}-{stage}'}"]
            runs.append((own, [3, 4], name == "stopped"))
    runs += [(overrides, [3, 4], False) for overrides, _, stop in runs if stop]
    results = run_ranks(_train_all, world, runs)[0]
    assert [refused for _, refused, _ in results] == [""] * len(runs)
    for index, stage in enumerate(stages):
        said, _, cursors = results[2 * index]
        straight, stopped = (tmp_path / f"{name}-{stage}" for name in ("straight", "stopped"))
        micro = BATCH // world
        assert cursors[::micro] == [BATCH * step for step in (0, 1, 2, 3, 4, 5, 6, 7, 8)], "nothing is read twice"
        assert "WARNING: step 5: the last 2 steps updated nothing: rolled back to step-00000002, 1 of 3 times" in said
        assert "sequences 8 to 19 of the data are left out" in said
        assert "step-00000003 is now step-00000003.damaged" in said
        assert [row["step"] for row in read_metrics(straight / METRICS_FILE)] == list(range(1, STEPS + 1))
        state = read_state(straight / CHECKPOINTS / f"step-{STEPS:08d}")
        assert (state.step, state.tokens, state.cursor) == (STEPS, STEPS * BATCH * LENGTH, (STEPS + 3) * BATCH)
        assert (state.skipped, state.skipped_in_row, state.roll_backs, state.loss_count) == (2, 0, 1, STEPS)
        # stopped at step 2, the cursor behind the bad data, and gone on in another process
        assert "resuming" in results[2 * len(stages) + index][0]
        assert _files(stopped, STEPS) == _files(straight, STEPS)
        assert len(_files(straight, STEPS)) == world
        assert _learnt(stopped) == _learnt(straight)
        names = {path.name for path in (straight / CHECKPOINTS).iterdir()}
        assert names == {f"step-{STEPS - 1:08d}", f"step-{STEPS:08d}", "step-00000003.damaged"}
        rows = [[{**row, **dict.fromkeys(TIMES)} for row in read_metrics(run / METRICS_FILE)] for run in (straight, stopped)]
        assert rows[0] == rows[1]


def metrics_of(step: int) -> Metrics:
    return Metrics(step, 2.5, None, 1e-3, 0.5, 1344, 3000.0, 1500.0, 0.064, None, None, 1.25)


TIMES = ("tokens_per_second", "tokens_per_second_per_rank", "step_seconds", "memory_gib", "save_seconds")


def test_going_back_ends(tmp_path: Path) -> None:
    write_corpus(tmp_path / "data", 31)
    common = [f"data.path={tmp_path / 'data'}", "training.steps=9", "checkpoint.every=1", "checkpoint.keep=2"]
    common += ["training.max_skipped=2", "guards.on_max_skipped=roll_back", "guards.max_roll_backs=2"]
    for_ever = ([*common, f"output={tmp_path / 'for-ever'}"], range(3, 99))
    never_good = ([*common, f"output={tmp_path / 'never'}"], range(1, 99))
    flipped = ([*common, f"output={tmp_path / 'flipped'}"], [3, 4, 6, 7])
    results = run_ranks(_train_all, 1, [for_ever, never_good, flipped])[0]
    said, refused, _ = results[0]
    assert said.count("rolled back to step-00000002") == 2
    assert refused.startswith("TrainingError: step 4: the last 2 steps updated nothing after 2 roll-backs (guards.max_roll_backs)")
    assert f"the last good checkpoint is {tmp_path}/for-ever/checkpoints/step-00000002" in refused
    said, refused, _ = results[1]
    assert said.count("rolled back to step-00000001") == 2, "nobody knows about it, and there is no other"
    assert refused.startswith("TrainingError: step 3: the last 2 steps updated nothing after 2 roll-backs (guards.max_roll_backs)")
    assert f"the newest checkpoint from before that is {tmp_path}/never/checkpoints/step-00000001" in refused
    said, refused, _ = results[2]
    assert refused == ""
    assert said.count("rolled back to step-00000002") == 2, "nobody knows about the new step 3"


def test_what_may_be_spoilt_does_not_push_out_what_is_not(tmp_path: Path) -> None:
    """Checkpoint 3 may be spoilt, and so may those that are saved while 4 and later are skipped: 2 stays."""
    write_corpus(tmp_path / "data", 31)
    common = [f"data.path={tmp_path / 'data'}", "training.steps=9", "checkpoint.every=1", "checkpoint.keep=2"]
    ending = [*common, "training.max_skipped=4", f"output={tmp_path / 'ending'}"]
    back = [*common, "training.max_skipped=3", "guards.on_max_skipped=roll_back", f"output={tmp_path / 'back'}"]
    results = run_ranks(_train_all, 1, [(ending, range(3, 99)), (back, [3, 4, 5], "skipping"), (back, [3, 4, 5])])[0]
    assert f"the last good checkpoint is {tmp_path}/ending/checkpoints/step-00000002" in results[0][1]
    assert [path.name[-1] for path in sorted((tmp_path / "ending" / CHECKPOINTS).iterdir())] == ["2", "5", "6"]
    assert "saved" in results[1][0]
    assert "rolled back to step-00000002" in results[2][0]
    assert [path.name[-1] for path in sorted((tmp_path / "back" / CHECKPOINTS).glob("step-????????"))] == ["8", "9"], (
        "it goes in the end"
    )


def test_a_damaged_checkpoint_is_no_place_to_go_back_to(tmp_path: Path) -> None:
    """5 may be spoilt; 4 would be good, but for its bytes."""
    write_corpus(tmp_path / "data", 31)
    common = [f"data.path={tmp_path / 'data'}", "checkpoint.every=1", "checkpoint.keep=9", "training.steps=8"]
    common += ["training.max_skipped=2", "guards.on_max_skipped=roll_back"]
    runs = []
    for name, steps in (("newest", [4]), ("all", [1, 2, 3, 4])):
        files = [str(tmp_path / name / CHECKPOINTS / f"step-{step:08d}/rank-00000.safetensors") for step in steps]
        runs.append(([*common, f"output={tmp_path / name}"], [5, 6], False, files))
    newest, every = run_ranks(_train_all, 1, runs)[0]
    said, refused, _ = newest
    assert refused == ""
    file = tmp_path / "newest" / CHECKPOINTS / "step-00000004/rank-00000.safetensors"
    assert f"WARNING: passed over step-00000004: {file}: SHA-256 differs from the manifest" in said
    assert "rolled back to step-00000003" in said
    assert "step-00000004 is now step-00000004.damaged" in said
    said, refused, _ = every
    assert said.count("WARNING: passed over step-") == 4
    assert "rolled back" not in said
    assert "the last 2 steps updated nothing" in refused
    assert "there is no checkpoint from before that" in refused


def _broken_reports(ctx: ParallelContext, overrides: Sequence[str]) -> str:
    """The refusal of this rank. The main rank cannot cut its reports."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JsonLines, "go_back", full)
        return _train(ctx, overrides, [3, 4])[1]


def test_an_error_of_the_main_rank_ends_all(tmp_path: Path) -> None:
    write_corpus(tmp_path / "data", 31)
    common = [f"data.path={tmp_path / 'data'}", "checkpoint.every=1", "checkpoint.keep=9", f"output={tmp_path / 'run'}"]
    common += ["training.max_skipped=2", "guards.on_max_skipped=roll_back"]
    refused = run_ranks(_broken_reports, 2, common, timeout=60)
    assert refused == ["RankFailedError: rank 0: OSError: [Errno 28] No space left on device"] * 2


def _phases(ctx: ParallelContext, overrides: Sequence[str]) -> list[tuple[int, str]]:
    beats: list[tuple[int, str]] = []
    beat = Watchdog.beat

    def recorded(watchdog: Watchdog, step: int, phase: str) -> None:
        beats.append((step, phase))
        beat(watchdog, step, phase)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Watchdog, "beat", recorded)
        _train(ctx, overrides, [3, 4])
    return [beat for beat, _ in groupby(beats)]


def test_only_going_back_is_called_that(tmp_path: Path) -> None:
    """The watchdog has more patience with it: a step that was skipped is none."""
    write_corpus(tmp_path / "data", 31)
    common = [f"data.path={tmp_path / 'data'}", "checkpoint.every=1", "checkpoint.keep=9", f"output={tmp_path / 'run'}"]
    common += ["training.max_skipped=2", "guards.on_max_skipped=roll_back", "training.steps=5"]
    beats = run_ranks(_phases, 1, common)[0]
    assert beats.count((5, "roll-back")) == 1 == [phase for _, phase in beats].count("roll-back")
    place = beats.index((5, "roll-back"))
    assert beats[place - 2 : place + 3] == [(5, "update"), (5, "save"), (5, "roll-back"), (2, "save"), (3, "data")]


def test_reports_are_cut(tmp_path: Path) -> None:
    path = tmp_path / METRICS_FILE
    tracker = JsonLines(path, 0)
    for step in (2, 4, 6):
        tracker.log(metrics_of(step))
    whole = path.read_text().splitlines()
    tracker.go_back(6)
    assert path.read_text().splitlines() == whole
    tracker.go_back(5)
    tracker.log(metrics_of(5))
    tracker.close()
    assert path.read_text().splitlines()[:-1] == whole[:2]
    assert [row["step"] for row in read_metrics(path)] == [2, 4, 5]


def test_states_of_older_checkpoints_load(monkeypatch: pytest.MonkeyPatch) -> None:
    old = '{"step": 9, "tokens": 900, "cursor": 36, "skipped": 3, "skipped_in_row": 2, "recipe": ""}'
    monkeypatch.setattr(checkpoint, "load", lambda *_, **__: TrainState.model_validate_json(old))
    nothing: Any = None
    assert restore(nothing, Path()) == Progress(9, 900, 36, 3, 2, sound=6)


def test_no_checkpoint_is_made_of_a_bad_stretch() -> None:
    skipped = [False, True, True, False, False, True, False, False]
    for action, saved in [("stop", [2, 4, 6, 8]), ("roll_back", [4, 7, 8])]:
        recipe = tiny_recipe("checkpoint.every=2", f"guards.on_max_skipped={action}")
        progress, found = Progress(), []
        for bad in skipped:
            after = progress.after_step(BATCH, LENGTH, skipped=bad)
            if save_due(recipe, progress, after):
                found.append(after.step)
            progress = after
        assert found == saved
        assert progress.sound == 7
