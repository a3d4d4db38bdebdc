"""The long proofs, with processes as people start them: kill -9 of all ranks at random moments, and signals through torchrun."""

from __future__ import annotations

import contextlib
import io
import os
import random
import select
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longtrain.parallel.context import ParallelContext
from longtrain.plan import make_plan
from longtrain.train import assemble as assembly
from longtrain.train import checkpoint, loop, run
from longtrain.train.assemble import open_data
from longtrain.train.checkpoint import Saver
from longtrain.train.checkpoint_folder import complete, damage
from longtrain.train.checkpoint_format import TrainState
from longtrain.train.resume import CHECKPOINTS, choose
from longtrain.train.state import Progress
from tests.distributed import Ranks, run_ranks, start_ranks
from tests.tiny import tiny_recipe, write_corpus
from tests.user import SCRIPT

pytest_plugins = ("tests.desks",)

WORLD = 2
PHASES = ("start", "train", "step", "wait", "copy", "write", "publish", "prune")
"""What a rank is at; training and the thread that saves go on at once, and the later one here counts."""
WIDTHS = {"step": 0.02, "copy": 0.003, "write": 0.004, "publish": 0.003, "prune": 0.001}
"""Seconds within which a kill comes after the phase that it is aimed at has begun."""
FIELDS = ("main", "thread", "done", "begun", "published", "resumed")
NEVER = -1


class Diary:
    """What one rank says of itself, in a file that it and the test have mapped: the phases of its two threads, and steps."""

    def __init__(self, path: Path, rank: int) -> None:
        self._values = np.memmap(path, np.int64, "r+", shape=(WORLD, len(FIELDS)))[rank]

    def __getitem__(self, field: str) -> int:
        return int(self._values[FIELDS.index(field)])

    def __setitem__(self, field: str, value: int) -> None:
        self._values[FIELDS.index(field)] = value

    def keep(self, patch: pytest.MonkeyPatch) -> None:
        """From now on this process writes it."""

        def resumed(progress: Progress, *_: Any) -> None:
            self["resumed"] = self["done"] = progress.step

        def stepped(*_: Any) -> None:
            self["done"] += 1

        def begun(_: Any, saver: Any, folder: Path, engine: Any, state: TrainState, *more: Any) -> None:
            self["begun"] = state.step

        def published(_: Any, temporary: Path, final: Path) -> None:
            self["published"] = _step_of(final)

        self._during(patch, "main", "start", assembly, "restore", resumed)
        self._during(patch, "main", "train", run, "train")
        self._during(patch, "main", "step", loop, "train_step", stepped)
        self._during(patch, "main", "wait", Saver, "settle")
        self._during(patch, "main", "copy", Saver, "begin", begun)
        for name in ("write_tensors", "write_json", "write_manifest"):
            self._during(patch, "thread", "write", checkpoint, name)
        self._during(patch, "thread", "publish", checkpoint, "publish", published)
        self._during(patch, "thread", "prune", checkpoint, "delete")

    def _during(
        self, patch: pytest.MonkeyPatch, field: str, phase: str, owner: Any, name: str, note: Callable[..., None] | None = None
    ) -> None:
        """Calls of owner.name are this phase; `note(result, *arguments)` before they return."""
        inner = getattr(owner, name)

        def outer(*arguments: Any, **more: Any) -> Any:
            # several threads save at once, none of them inside another phase
            before = self[field] if field == "main" else 0
            self[field] = PHASES.index(phase)
            result = inner(*arguments, **more)
            if note is not None:
                note(result, *arguments)
            self[field] = before
            return result

        patch.setattr(owner, name, outer)


def _step_of(step: Path) -> int:
    return int(step.name.removesuffix(".replaced").split("-")[1])


def _train(ctx: ParallelContext, overrides: Sequence[str], until: int | None = None, diary: Path | None = None) -> int:
    plan = make_plan(tiny_recipe(*overrides), ctx.world, "cpu")
    split, _ = open_data(plan)
    start = choose(plan.recipe, split, "auto")
    ctx.all_gather_text("chosen")
    with redirect_stdout(io.StringIO()), pytest.MonkeyPatch.context() as patch:
        if diary is not None:
            Diary(diary, ctx.rank).keep(patch)
        return run.run_training(plan, ctx, split, start, until=until, evaluate=None).step


def _come(ranks: Ranks, diaries: Sequence[Diary], aim: str | None, draw: random.Random) -> None:
    """Returns at a random moment: of the life of the ranks, or soon after one of them has begun what is aimed at."""
    if aim is None:
        time.sleep(draw.uniform(0, 1.5))
        return
    field = "main" if aim in ("step", "copy") else "thread"
    diary, times = diaries[0 if aim in ("publish", "prune") else draw.randrange(WORLD)], draw.randrange(1, 5)
    deadline, inside = time.monotonic() + 60, False
    while times:
        if time.monotonic() > deadline:
            assert ranks.running()
            raise AssertionError(f"no {aim} within a minute")
        before, inside = inside, diary[field] == PHASES.index(aim)
        times -= inside and not before
    moment = time.monotonic() + draw.uniform(0, WIDTHS[aim])
    while time.monotonic() < moment:
        pass  # a sleep would be longer


def _kill(overrides: Sequence[str], path: Path, aim: str | None, draw: random.Random) -> tuple[str, list[Diary]]:
    """A start that ends with kill -9 of all ranks: in which phase, and what they had to say."""
    np.full((WORLD, len(FIELDS)), 0, np.int64).tofile(path)
    diaries = [Diary(path, rank) for rank in range(WORLD)]
    for diary in diaries:
        diary["resumed"] = NEVER
    with start_ranks(_train, WORLD, overrides, None, path, cp=WORLD) as ranks:
        _come(ranks, diaries, aim, draw)
        assert ranks.kill(draw.sample(range(WORLD), WORLD)) == [-signal.SIGKILL] * WORLD
    return PHASES[max(diary[field] for diary in diaries for field in ("main", "thread"))], diaries


@pytest.mark.parametrize(
    "kills", [3, pytest.param(500, marks=[pytest.mark.faults, pytest.mark.timeout(3600)])], ids=["short", "long"]
)
def test_kills_at_random_moments(tmp_path: Path, kills: int) -> None:
    """Every start goes on from the newest checkpoint that was published, and what is learnt in the end is what is without kills."""
    write_corpus(tmp_path / "data", 12)
    common = [f"data.path={tmp_path / 'data'}", "training.steps=1000000", "schedule.kind=constant", "parallel.cp=2"]
    overrides, folder = [*common, f"output={tmp_path / 'run'}"], tmp_path / "run" / CHECKPOINTS
    split, _ = open_data(make_plan(tiny_recipe(*overrides), WORLD, "cpu"))
    draw, newest = random.Random(0), 0
    hits, repeats, resumed = Counter[str](), Counter[tuple[int, bool, int]](), 0
    aims = [None, *WIDTHS]
    for number in range(kills):
        every = draw.choice((1, 2))
        own = [*overrides, f"checkpoint.every={every}", "checkpoint.keep=2"]
        phase, diaries = _kill(own, tmp_path / "diary", aims[number % len(aims)], draw)
        hits[phase] += 1
        main, last = diaries[0], newest
        if newest and main["resumed"] != NEVER:
            assert main["resumed"] == newest, f"kill {number}: a start went on from another checkpoint than the newest"
            resumed += 1
        found = complete(folder)
        for step in found:
            assert damage(step) == [], f"kill {number} in {phase}"
        newest = _step_of(found[-1]) if found else 0
        assert newest >= max(last, main["published"]), f"kill {number} in {phase} cost a finished checkpoint"
        assert choose(tiny_recipe(*own), split, "auto").checkpoint == (found[-1] if found else None)
        repeated = max(diary["done"] for diary in diaries) - newest if main["resumed"] != NEVER or not last else 0
        on_its_way = main["begun"] > newest
        # training goes on while a checkpoint is written, but not beyond the next one
        assert repeated <= (2 if on_its_way else 1) * every, f"kill {number} in {phase}"
        repeats[every, on_its_way, max(0, repeated)] += 1
    print(f"{kills} kills: {dict(hits)}; {resumed} starts went on, at step {newest} now; (interval, saving, repeated): {repeats}")
    assert newest > 0
    if kills >= 100:
        assert set(hits) >= set(WIDTHS), hits
    for name in ("run", "straight"):
        goal = [*common, f"output={tmp_path / name}", "checkpoint.every=1000000"]
        assert run_ranks(_train, WORLD, goal, newest + 2, cp=WORLD, timeout=600) == [newest + 2] * WORLD
    assert _learnt(tmp_path / "run") == _learnt(tmp_path / "straight")


def _learnt(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in complete(folder / CHECKPOINTS)[-1].glob("rank-*")}


@contextmanager
def _torchrun(*more: str, where: Sequence[str] = ("--standalone", "--nproc-per-node", "2")) -> Iterator[subprocess.Popen[str]]:
    """A run on two ranks, or this host's part of one, none of which outlives the block. where: torchrun's words for that."""
    words = [sys.executable, "-m", "torch.distributed.run", *where, "--max-restarts", "3"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*words, SCRIPT, "--recipe", "recipe.yaml", *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )
    try:
        yield process
    finally:
        for number in (*_workers(process.pid), process.pid):
            with contextlib.suppress(OSError):
                os.kill(number, signal.SIGKILL)
        process.communicate()


def _read_until(process: subprocess.Popen[str], words: str) -> str:
    assert process.stdout is not None
    seen = ""
    while words not in seen:
        line = process.stdout.readline()
        assert line, seen
        seen += line
    return seen


def _workers(parent: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            if int(fields[1]) == parent:
                found.append(int(entry.name))
    return sorted(found)


@pytest.mark.faults
@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("whom", ["torchrun", "one worker"])
def test_signals_through_torchrun(whom: str) -> None:
    """torchrun exits with 1 where it is asked itself; workers that stop are started again while there are restarts, and go on."""
    endless = ("--set", "training.steps=1000000", "--set", "checkpoint.every=1000000")
    with _torchrun(*endless) as process:
        said = _read_until(process, "step 2/")
        if whom == "one worker":
            os.kill(_workers(process.pid)[-1], signal.SIGUSR1)
            said = _read_until(process, "resuming run/checkpoints/step-")
            assert "stopped at step " in said
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=60)[0]
        assert process.returncode == 1
    assert "stopped at step " in said, said
    step = int(said.split("stopped at step ")[1].split(",")[0])
    newest = complete(Path("run", CHECKPOINTS))[-1]
    assert newest.name == f"step-{step:08d}"
    assert damage(newest) == []


@pytest.mark.faults
@pytest.mark.usefixtures("fresh")
def test_an_elastic_restart_goes_on() -> None:
    """A worker that dies is started again by torchrun, and goes on from the last checkpoint."""
    with _torchrun("--set", "training.steps=60") as process:
        _read_until(process, "saved run/checkpoints/step-00000003")
        os.kill(_workers(process.pid)[-1], signal.SIGKILL)
        said = process.communicate(timeout=120)[0]
        assert process.returncode == 0, said
    assert "resuming run/checkpoints/step-" in said
    assert complete(Path("run", CHECKPOINTS))[-1].name == "step-00000060"


@pytest.mark.faults
@pytest.mark.usefixtures("fresh")
def test_an_elastic_restart_on_two_hosts_goes_on() -> None:
    """The torchrun of each host counts its restarts on its own: that whose worker died says 1, the other one 0."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{free.getsockname()[1]}"
    where = ("--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "x", "--rdzv-endpoint", place)
    goal = ("--set", "training.steps=60")
    with _torchrun(*goal, where=where) as first, _torchrun(*goal, where=where) as second:
        # who comes first is rank 0's host, and the other one says nothing
        hosts = {process.stdout: process for process in (first, second)}
        talker = hosts[select.select(list(hosts), [], [])[0][0]]
        _read_until(talker, "saved run/checkpoints/step-00000003")
        silent = second if talker is first else first
        os.kill(_workers(silent.pid)[-1], signal.SIGKILL)
        said = [process.communicate(timeout=120)[0] for process in (talker, silent)]
        assert [talker.returncode, silent.returncode] == [0, 0], said
    assert "resuming run/checkpoints/step-" in "".join(said)
    assert complete(Path("run", CHECKPOINTS))[-1].name == "step-00000060"


@pytest.mark.faults
@pytest.mark.usefixtures("fresh")
def test_ranks_whose_torchrun_was_killed_save_and_end() -> None:
    with _torchrun("--set", "training.steps=1000000", "--set", "checkpoint.every=1000000") as process:
        _read_until(process, "step 2/")
        process.kill()
        said = process.communicate(timeout=60)[0]  # until the last rank has closed it
    assert "torchrun is gone: stopping after this step, with a checkpoint" in said
    assert "WARNING: torchrun is gone, or its host" in said
    step = int(said.split("stopped at step ")[1].split(",")[0])
    assert damage(Path("run", CHECKPOINTS, f"step-{step:08d}")) == []
