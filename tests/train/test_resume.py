"""Resuming is invisible: 10 steps are, bit for bit, 5 steps, a new process, and 5 more. Through the code that users run."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from longtrain.data.loader import Loader, held_out
from longtrain.errors import CheckpointError
from longtrain.evaluate.held_out import held_out_loss
from longtrain.parallel.context import ParallelContext
from longtrain.parallel.deepspeed import MOMENTS
from longtrain.plan import make_plan
from longtrain.recipe.model import FIXED
from longtrain.train import assemble as assembly
from longtrain.train.assemble import open_data
from longtrain.train.checkpoint import save as save_checkpoint
from longtrain.train.checkpoint_folder import digest_of
from longtrain.train.checkpoint_format import Origin, read_state
from longtrain.train.resume import Start, choose
from longtrain.train.run import run_training
from longtrain.train.state import Progress
from longtrain.train.tracking import METRICS_FILE, read_metrics
from tests.distributed import run_ranks
from tests.one_rank import OneRank
from tests.tiny import tiny_recipe, write_corpus

STEPS, HALF, BATCH = 10, 5, 4
TIMES = {"tokens_per_second", "tokens_per_second_per_rank", "step_seconds", "memory_gib", "save_seconds"}
DROPS = ("moments", "adam_steps", "data")
LONG = (pytest.mark.faults, pytest.mark.timeout(1200))


def overrides(folder: Path, run: str, *more: str, data: Path | None = None) -> list[str]:
    """One recipe for every run of a folder but for where it is written."""
    own = [f"data.path={data or folder / 'data'}", f"output={folder / run}", "checkpoint.every=3", "evaluation.every=4"]
    return [*own, "schedule.warmup_steps=3", "optimizer.grad_clip=0.5", *more]


@contextmanager
def dropped(what: str | None) -> Iterator[None]:
    """A restore that forgets something."""
    with pytest.MonkeyPatch.context() as patch:
        restore, step = assembly.restore, Loader.step

        def forgetful(engine: Any, start: Path, **more: Any) -> Progress:
            progress = restore(engine, start, **more)
            for piece in engine.owned_ranges():
                if what == "moments":
                    for moment in MOMENTS:
                        piece.tensors[moment].zero_()
            if what == "adam_steps":
                engine.set_adam_steps(dict.fromkeys(engine.parameters(), 0))
            return progress

        patch.setattr(assembly, "restore", forgetful)
        if what == "data":
            patch.setattr(Loader, "step", lambda self, number: step(self, number - HALF))
        yield


def _train(ctx: ParallelContext, arguments: Sequence[str], until: int | None, resume: str, drop: str | None) -> dict[str, Any]:
    recipe = tiny_recipe(*arguments)
    plan = make_plan(recipe, ctx.world, "cpu")
    split, unseen = open_data(plan)
    start = choose(recipe, split, resume)
    assert unseen is not None
    batches = held_out(unseen, 3, micro_batch_size=1, dp=plan.dp, dp_rank=ctx.dp_rank)
    read, order = split.sequence, []

    def recorded(index: int) -> Any:
        order.append(index)
        return read(index)

    split.sequence = recorded  # type: ignore[method-assign]
    said = io.StringIO()
    with redirect_stdout(said), dropped(drop):
        progress = run_training(
            plan, ctx, split, start, until=until, evaluate=lambda run: held_out_loss(run.engine, run.plan, run.ctx, batches)
        )
    return {"order": order, "said": said.getvalue(), "progress": progress}


def _train_all(ctx: ParallelContext, runs: Sequence[tuple[Any, ...]]) -> list[dict[str, Any]]:
    return [_train(ctx, *run) for run in runs]


def checkpoint(folder: Path, run: str, step: int = STEPS) -> dict[str, bytes]:
    """The files with what was learnt: master weights and moments of every rank."""
    return {path.name: path.read_bytes() for path in (folder / run / f"checkpoints/step-{step:08d}").glob("rank-*")}


def reports(folder: Path, run: str) -> list[dict[str, Any]]:
    """All rows of a run, without what a clock or the machine decides."""
    rows = read_metrics(folder / run / METRICS_FILE)
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


@dataclass(frozen=True)
class Way:
    """How a run trains. sequences: of its corpus; with 10 the fifth step ends an epoch, and the third spans two."""

    stage: int
    accumulation: int = 1
    sequences: int = 10
    more: tuple[str, ...] = ()

    def overrides(self, folder: Path, run: str, dp: int, cp: int) -> list[str]:
        own = [f"zero.stage={self.stage}", f"parallel.cp={cp}", f"training.micro_batch_size={BATCH // (dp * self.accumulation)}"]
        return overrides(folder, f"{self}/{run}", *own, *self.more, data=folder / f"data-{self.sequences}")

    def __str__(self) -> str:
        return "-".join(str(part) for part in (self.stage, self.accumulation, self.sequences, *self.more))


BF16, OFFLOAD = ("training.precision=bf16",), ("zero.offload=cpu",)
EVERY = [Way(stage, a, sequences) for stage in range(4) for a in (1, 2) for sequences in (10, 7)]
LOW = [Way(stage, 2, 10, more) for stage in (1, 2, 3) for more in (BF16, BF16 + OFFLOAD)]
DROPOUT = ("model.dropout=0.2", "model.attention_dropout=0.2")
NOISY = [Way(stage, 2, 7, DROPOUT) for stage in range(4)]
FULL = Way(0, 1, 7, ("training.activations=full", *DROPOUT))
SHORT = {(1, 1): [FULL], (2, 1): [Way(3, 2, 10)], (1, 2): [Way(1, 1, 10, DROPOUT)]}


@pytest.mark.parametrize(
    ("dp", "cp", "ways"),
    [
        *(pytest.param(*grid, ways, id="{}x{}".format(*grid)) for grid, ways in SHORT.items()),
        *(pytest.param(*grid, EVERY + LOW + NOISY, marks=LONG, id="{}x{} in every way".format(*grid)) for grid in SHORT),
    ],
)
def test_resuming_is_invisible(tmp_path: Path, dp: int, cp: int, ways: Sequence[Way]) -> None:
    for sequences in {way.sequences for way in ways}:
        write_corpus(tmp_path / f"data-{sequences}", sequences)
    run_processes: Callable[[list[tuple[Any, ...]]], list[Any]] = lambda runs: run_ranks(  # noqa: E731
        _train_all, dp * cp, runs, dp=dp, cp=cp, timeout=1000
    )
    owns = [partial(way.overrides, tmp_path, dp=dp, cp=cp) for way in ways]
    halves = [tmp_path / f"{way}/halves/checkpoints/step-{HALF:08d}" for way in ways]
    first: list[tuple[Any, ...]] = []
    second: list[tuple[Any, ...]] = []
    for own, half in zip(owns, halves, strict=True):
        first += [(own("straight"), None, "never", None), (own("halves"), HALF, "auto", None)]
        second += [(own(f"without-{what}"), None, str(half), what) for what in DROPS]
        second += [(own("elsewhere"), None, str(half), None), (own("halves"), None, "auto", None)]
    begun, ended = run_processes(first), run_processes(second)
    for number, (way, half) in enumerate(zip(ways, halves, strict=True)):
        ranks = [
            [*one[2 * number : 2 * number + 2], *other[(len(DROPS) + 2) * number :]]
            for one, other in zip(begun, ended, strict=True)
        ]
        _check_order(way, [rank[: len(DROPS) + 4] for rank in ranks], BATCH // dp)
        _check_files(tmp_path, way, dp * cp)
        elsewhere, resumed = ranks[0][len(DROPS) + 2 : len(DROPS) + 4]
        assert f"resuming {half}" in resumed["said"]
        assert f"resuming {half}" in elsewhere["said"]


def _check_order(way: Way, ranks: list[list[dict[str, Any]]], share: int) -> None:
    """What was read, on every rank; share: sequences of a step that a rank reads. The loader reads one step ahead."""
    seen = set()
    for straight, begun, *controls, _, resumed in ranks:
        whole = Progress(
            STEPS,
            STEPS * BATCH * 48,
            STEPS * BATCH,
            sound=STEPS - 1,
            losses=straight["progress"].losses,
            loss=straight["progress"].loss,
        )
        assert straight["progress"] == resumed["progress"] == whole, way
        whole, half = STEPS * share, HALF * share
        assert straight["order"][:whole] == begun["order"][:half] + resumed["order"][: whole - half], way
        assert controls[DROPS.index("data")]["order"][:share] == straight["order"][:share]
        seen |= set(straight["order"])
    assert len(seen) == way.sequences


def _check_files(folder: Path, way: Way, world: int) -> None:
    """Every bit of weights and moments, and every number that was reported."""
    true, rows = checkpoint(folder, f"{way}/straight"), reports(folder, f"{way}/straight")
    assert len(true) == world
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    for run in ("halves", "elsewhere"):
        assert checkpoint(folder, f"{way}/{run}") == true, (way, run)
        assert reports(folder, f"{way}/{run}") == rows[HALF if run == "elsewhere" else 0 :], (way, run)
    assert read_state(folder / f"{way}/halves/checkpoints/step-{STEPS:08d}").cursor == STEPS * BATCH
    for what in DROPS:
        assert checkpoint(folder, f"{way}/without-{what}") != true, f"{way}: the comparison must see that {what} was dropped"
        assert reports(folder, f"{way}/without-{what}") != rows[HALF:], (way, what)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, and a run of two steps in "run"."""
    folder = tmp_path_factory.mktemp("trained")
    write_corpus(folder / "data", 7)
    run_ranks(_train_all, 1, [(overrides(folder, "run"), 2, "auto", None)])
    return folder


def pick(folder: Path, run: str, resume: str, *more: str, data: Path | None = None) -> Start:
    recipe = tiny_recipe(*overrides(folder, run, *more, data=data))
    return choose(recipe, open_data(make_plan(recipe, 1, "cpu"))[0], resume)


def test_never_refuses_to_write_over_a_run(trained: Path) -> None:
    with pytest.raises(CheckpointError, match=r"run/checkpoints: holds checkpoints .* --resume never would write over"):
        pick(trained, "run", "never")
    assert pick(trained, "new", "never").checkpoint is None
    assert pick(trained, "new", "auto").checkpoint is None


def test_auto_takes_the_newest_and_a_path_takes_that(trained: Path) -> None:
    newest = trained / "run/checkpoints/step-00000002"
    assert pick(trained, "run", "auto").checkpoint == newest
    for path in (trained / "run", trained / "run/checkpoints", newest):
        assert pick(trained, "new", str(path)).checkpoint == newest
        assert pick(trained, "run", str(path)).checkpoint == newest
    with pytest.raises(CheckpointError, match="no whole checkpoint here"):
        pick(trained, "new", str(trained))


def test_a_path_is_refused_where_another_run_lies(trained: Path, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere/checkpoints/step-00000002"
    other.parent.mkdir(parents=True)
    for path in (trained / "run/checkpoints/step-00000002").iterdir():
        (other / path.name).parent.mkdir(exist_ok=True)
        (other / path.name).write_bytes(path.read_bytes())
    with pytest.raises(CheckpointError, match="run/checkpoints: holds checkpoints up to step-00000002; to go on from"):
        pick(trained, "run", str(other))


def test_an_older_step_beside_newer_ones_is_refused(trained: Path, tmp_path: Path) -> None:
    """Else auto would later go on from the future that was left."""
    source = trained / "run/checkpoints/step-00000002"
    for step in (2, 9):
        shutil.copytree(source, tmp_path / f"run/checkpoints/step-{step:08d}")
    older = tmp_path / "run/checkpoints/step-00000002"
    with pytest.raises(CheckpointError, match=r"holds checkpoints up to step-00000009; .*delete the newer ones"):
        pick(tmp_path, "run", str(older), data=trained / "data")
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000009")
    assert pick(tmp_path, "run", str(older), data=trained / "data").checkpoint == older


def copy_newest(source: Path, run: Path, *, step: int, origin: Origin | None) -> Path:
    """Makes a run of one checkpoint, for that step, of which the run began at `origin`."""
    engine: Any = OneRank()
    state = read_state(source / "run/checkpoints/step-00000002").model_copy(update={"step": step, "origin": origin})
    return save_checkpoint(run / "checkpoints", engine, state, keep=3)


def test_the_checkpoint_that_a_run_began_at_names_its_newest(trained: Path, tmp_path: Path) -> None:
    """The same command goes on: a restart by torchrun or Slurm gives the --resume PATH of the first start."""
    shutil.copytree(trained / "run", tmp_path / "run")
    named, data = tmp_path / "run/checkpoints/step-00000002", trained / "data"
    origin = pick(tmp_path, "new", str(named), data=data).origin
    assert origin == Origin(path=str(named), manifest=digest_of(named))
    newest = copy_newest(trained, tmp_path / "new", step=5, origin=origin)

    def goes_on(path: Path) -> bool:
        start = pick(tmp_path, "new", str(path), data=data)
        assert start.origin == origin
        assert start.earlier is not None
        assert start.notes == (f"this run began at {path}: it goes on from its newest checkpoint, as with --resume auto",)
        return start.checkpoint == newest

    moved = shutil.copytree(named, tmp_path / "moved")
    for path in (named, tmp_path / "run", tmp_path / "run/checkpoints", moved):
        assert goes_on(path), path
    assert pick(tmp_path, "new", "auto", data=data).origin == origin
    later = copy_newest(trained, tmp_path / "run", step=3, origin=None)
    assert goes_on(tmp_path / "run"), "the run that was named has newer ones by now"
    refused = f"new/checkpoints: holds checkpoints up to {newest.name}; to go on from that one, give --resume auto"
    with pytest.raises(CheckpointError, match=refused):
        pick(tmp_path, "new", str(later), data=data)
    shutil.rmtree(named)
    for path in (named, tmp_path / "run", moved):
        assert goes_on(path), path
    copy_newest(trained, tmp_path / "run", step=2, origin=None)
    with pytest.raises(CheckpointError, match=refused):
        pick(tmp_path, "new", str(named), data=data)


def test_a_run_that_goes_on_from_its_own_by_name(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "run", tmp_path / "run")
    named, data = tmp_path / "run/checkpoints/step-00000002", trained / "data"
    origin = pick(tmp_path, "run", str(named), data=data).origin
    newest = copy_newest(trained, tmp_path / "run", step=5, origin=origin)
    assert pick(tmp_path, "run", str(named), data=data).checkpoint == newest


def test_another_recipe_is_refused_by_its_differences(trained: Path) -> None:
    with pytest.raises(CheckpointError) as refusal:
        pick(trained, "run", "auto", "optimizer.lr=0.5", "seed=3", "training.batch_size=8", "tracking.every=2")
    message = str(refusal.value)
    assert "step-00000002: is a checkpoint of another recipe:" in message
    assert "optimizer.lr: 0.01 in the checkpoint, 0.5 in this recipe" in message
    assert "seed: 0 in the checkpoint, 3 in this recipe" in message
    assert "training.batch_size: 4 in the checkpoint, 8 in this recipe" in message
    assert "tracking" not in message
    assert "`longtrain export " in message


@pytest.mark.parametrize(
    "change",
    [
        "model.rope_theta=500.0",
        "model.window=9",
        "model.hidden_act=gelu",
        "training.sequence_length=24",
        "training.precision=bf16",
        "optimizer.weight_decay=0.0",
        "optimizer.eps=1e-6",
        "schedule.kind=linear",
    ],
)
def test_whatever_decides_what_is_learnt_is_fixed(trained: Path, change: str) -> None:
    with pytest.raises(CheckpointError, match=change.split("=")[0].replace(".", r"\.")):
        pick(trained, "run", "auto", change)


def test_what_may_change_is_told(trained: Path) -> None:
    start = pick(trained, "run", "auto", "training.steps=20", "zero.stage=2", "parallel.layout=striped", "checkpoint.keep=1")
    assert start.remarks[0] == f"resuming {trained}/run/checkpoints/step-00000002 (step 2)"
    changed = "changed since that checkpoint: "
    assert start.remarks[1:] == (
        f"{changed}checkpoint.keep: 3 -> 1",
        f"{changed}parallel.layout: zigzag -> striped",
        f"{changed}training.steps: 10 -> 20",
        f"{changed}zero.stage: 1 -> 2",
        "the cosine schedule now ends at step 20: the learning rate jumps here",
    )
    assert not pick(trained, "run", "auto").remarks[1:]


def test_other_data_is_refused_and_moved_data_is_not(trained: Path, tmp_path: Path) -> None:
    write_corpus(tmp_path / "other", 7, seed=1)
    write_corpus(tmp_path / "same", 7)
    with pytest.raises(CheckpointError, match=r"was trained on other data than .*other"):
        pick(trained, "run", "auto", data=tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"another data\.long_documents"):
        pick(trained, "run", "auto", "data.long_documents=split")
    remarks = pick(trained, "run", "auto", data=tmp_path / "same").remarks
    assert [remark.split(":")[1].strip() for remark in remarks[1:]] == ["data.path"]


def test_where_the_first_weights_came_from_no_longer_matters(trained: Path) -> None:
    # model.init puts the shape below it away
    shape = tiny_recipe().model.model_dump(mode="json", include=set(FIXED), exclude_none=True)
    shaped = [f"model.{name}={json.dumps(value)}" for name, value in shape.items()]
    start = pick(trained, "run", "auto", "model.init=nowhere", "data.corpus=stdlib", *shaped)
    changes = [remark.split(": ", 1)[1] for remark in start.remarks[1:]]
    assert changes == ["data.corpus: null -> stdlib", "model.init: null -> nowhere"]


def test_a_checkpoint_without_its_manifest_is_passed_over(trained: Path, tmp_path: Path) -> None:
    source = trained / "run/checkpoints/step-00000002"
    for step in (2, 9):
        target = tmp_path / f"run/checkpoints/step-{step:08d}"
        target.mkdir(parents=True)
        for path in source.iterdir():
            if step == 2 or path.name != "manifest.json":
                (target / path.name).write_bytes(path.read_bytes())
    assert pick(trained, str(tmp_path / "run"), "auto").checkpoint == tmp_path / "run/checkpoints/step-00000002"
