"""The long proofs, with processes as people start them: kill -9 of all ranks at random moments, and signals through torchrun."""

from __future__ import annotations

import contextlib
import io
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import pytest

from longtrain.parallel.context import ParallelContext
from longtrain.plan import make_plan
from longtrain.train.assemble import open_data
from longtrain.train.checkpoint_folder import complete, damage
from longtrain.train.resume import CHECKPOINTS, choose
from longtrain.train.run import run_training
from tests.distributed import RankError, run_ranks
from tests.tiny import tiny_recipe, write_corpus
from tests.user import SCRIPT

pytest_plugins = ("tests.desks",)
pytestmark = pytest.mark.faults

KILLS = 60


def _train(ctx: ParallelContext, overrides: Sequence[str]) -> int:
    plan = make_plan(tiny_recipe(*overrides), ctx.world, "cpu")
    split, _ = open_data(plan)
    start = choose(plan.recipe, split, "auto")
    ctx.all_gather_text("chosen")
    with redirect_stdout(io.StringIO()):
        return run_training(plan, ctx, split, start, until=None, evaluate=None).step


@pytest.mark.timeout(1800)
def test_kills_at_random_moments(tmp_path: Path) -> None:
    """A checkpoint after every step, so that most kills hit a save; every start finds what the last one finished."""
    write_corpus(tmp_path / "data", 12)
    overrides = [f"data.path={tmp_path / 'data'}", f"output={tmp_path / 'run'}", "training.steps=1000000", "schedule.kind=constant"]
    overrides += ["checkpoint.every=1", "checkpoint.keep=2", "parallel.cp=2"]
    folder, draw, last = tmp_path / "run" / CHECKPOINTS, random.Random(0), 0
    for kill in range(KILLS):
        with contextlib.suppress(RankError):
            run_ranks(_train, 2, overrides, cp=2, timeout=draw.uniform(2.0, 5.0))
        found = complete(folder)
        for path in found:
            assert damage(path) == [], f"after kill {kill}"
        newest = int(found[-1].name.split("-")[1]) if found else 0
        assert newest >= last, f"kill {kill} cost a finished checkpoint"
        last = newest
    assert last > KILLS, "it trained in between"


@contextmanager
def _torchrun(*more: str) -> Iterator[subprocess.Popen[str]]:
    """A run on two ranks, none of which outlives the block."""
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "3"]
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
