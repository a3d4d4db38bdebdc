"""A stuck rank ends the job, with the stacks of all ranks on disk; a slow one does not."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from longtrain.data.loader import Loader, held_out
from longtrain.evaluate.held_out import held_out_loss
from longtrain.parallel.context import ParallelContext
from longtrain.parallel.deepspeed import Engine
from longtrain.plan import make_plan
from longtrain.train import checkpoint
from longtrain.train import watchdog as watchdog_module
from longtrain.train.assemble import open_data
from longtrain.train.resume import choose
from longtrain.train.run import run_training
from longtrain.train.watchdog import GRACE, LOOKS, SLOW, STACKS, STUCK, Watchdog, longest_patience
from tests.distributed import run_ranks, start_ranks
from tests.one_rank import OneRank
from tests.tiny import tiny_recipe, write_corpus
from tests.unread import full_pipe

SECONDS = 2.0
WITHIN = SECONDS * (1 + 3 / LOOKS) + GRACE
# where the last rank hangs: what it is in then, the phase that it says, and at which call of it (those of the start-up probe count)
PLACES: dict[str, tuple[Any, str, str, int]] = {
    "data": (Loader, "step", "data", 3),
    "collective": (Engine, "step", "update", 4),
    "start": (Engine, "__init__", "start", 1),
}


def _train(ctx: ParallelContext, overrides: Sequence[str], place: str | None, mark: str, slow: float = 0.0) -> int:
    """place: where the last rank hangs for ever. slow: seconds that each of these takes it instead."""
    plan = make_plan(tiny_recipe(*overrides), ctx.world, "cpu")
    split, unseen = open_data(plan)
    assert unseen is not None
    batches = held_out(unseen, 3, micro_batch_size=1, dp=plan.dp, dp_rank=ctx.dp_rank)
    last = ctx.rank == ctx.world - 1

    def at(owner: Any, name: str, call: int | None, seconds: float) -> None:
        inner, calls = getattr(owner, name), 0

        def outer(*arguments: Any, **more: Any) -> Any:
            nonlocal calls
            calls += 1
            if call is None or calls == call:
                if call is not None:
                    Path(mark).write_text(str(time.time()))
                time.sleep(seconds)
            return inner(*arguments, **more)

        patch.setattr(owner, name, outer)

    said = Path(f"{mark}-{ctx.rank}").open("w")  # noqa: SIM115 (the process may end here)
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()), redirect_stderr(said):
        patch.setattr(watchdog_module, "START", 0.0)
        if last and place is not None:
            owner, name, _, call = PLACES[place]
            at(owner, name, call, 3600.0)
        if last and slow:
            for owner, name in [(Loader, "step"), (Engine, "forward"), (Engine, "step"), (checkpoint, "write_tensors")]:
                at(owner, name, None, slow)
        return run_training(
            plan,
            ctx,
            split,
            choose(plan.recipe, split, "never"),
            until=None,
            evaluate=lambda run: held_out_loss(run.engine, run.plan, run.ctx, batches),
        ).step


def _recipe(folder: Path, run: str, seconds: float | None, *more: str) -> list[str]:
    write_corpus(folder / "data", 7)
    given = "null" if seconds is None else seconds
    own = [f"data.path={folder / 'data'}", f"output={folder / run}", f"guards.watchdog_seconds={given}"]
    return [*own, "training.steps=3", "evaluation.sequences=3", *more]


@pytest.mark.parametrize("place", PLACES)
def test_a_stuck_rank_ends_both(tmp_path: Path, place: str) -> None:
    overrides, mark = _recipe(tmp_path, "run", SECONDS, "evaluation.every=9"), tmp_path / "mark"
    with start_ranks(_train, 2, overrides, place, str(mark)) as ranks:
        ready = wait([process.sentinel for process in ranks.processes], 90)
        assert ready
        for process in ranks.processes:
            process.join(GRACE)
        assert time.time() - float(mark.read_text()) < (SLOW if place == "start" else 1) * SECONDS * (1 + 3 / LOOKS) + GRACE
        assert [process.exitcode for process in ranks.processes] == [STUCK, STUCK]
    _, _, phase, _ = PLACES[place]
    said = [Path(f"{mark}-{rank}").read_text() for rank in range(2)]
    step = 0 if place == "start" else 3
    files = sorted((tmp_path / "run" / STACKS).iterdir())
    assert [path.name for path in files] == [f"step-{step:08d}-rank-{rank:05d}.txt" for rank in range(2)]
    waiting, stuck = (path.read_text() for path in files)
    assert stuck.startswith(f"rank 1: stuck at step {step}, {phase}: ")
    assert "in outer" in stuck, "the main thread sleeps there"
    assert "_gather" in waiting or "distributed_c10d.py" in waiting, "the main thread is in a collective"
    assert place == "start" or "loader" in stuck or "_worker" in stuck, "all threads are there"
    for rank, path in enumerate(files):
        assert said[rank].startswith(f"rank {rank}: stuck at step {step}, ")
        assert f"stacks of its threads: {path}; ending with exit code {STUCK}" in said[rank]
    assert "no sign of life from any rank for " in said[0] + said[1]


def test_slow_is_not_stuck(tmp_path: Path) -> None:
    """One rank takes most of the time that all have, again and again, and for longer than that in all, also in one phase."""
    more = ["evaluation.every=1", "training.batch_size=2"]
    assert run_ranks(_train, 2, _recipe(tmp_path, "run", 1.0, *more), None, str(tmp_path / "mark"), 0.6) == [3, 3]
    assert not (tmp_path / "run" / STACKS).exists()


def test_the_stacks_come_before_a_collective_gives_up() -> None:
    ctx = OneRank().ctx
    assert longest_patience(ctx) == float("inf"), "one rank alone is in no collective"
    # as `launch.start` makes it by default
    default = replace(ctx, world=2, timeout=ParallelContext.timeout)
    longest = longest_patience(default)
    assert 1800 < longest < 4 * 1800, "what a recipe has by default is not touched but in the first step"
    assert longest * (1 + 3 / LOOKS) + GRACE <= default.timeout.total_seconds() == 3600


def _first_step(ctx: ParallelContext, folder: str, mark: str) -> None:
    """The first step hangs on all ranks; collectives would wait for `CAP` seconds."""
    short = replace(ctx, timeout=timedelta(seconds=CAP))
    with Path(f"{mark}-{ctx.rank}").open("w") as said, redirect_stderr(said), Watchdog(short, Path(folder), 3600.0) as watchdog:
        watchdog.beat(1, "forward and backward")
        time.sleep(3600)


CAP = GRACE + 2.6


def test_the_first_step_has_no_longer_than_a_collective(tmp_path: Path) -> None:
    with start_ranks(_first_step, 2, str(tmp_path / "run"), str(tmp_path / "mark")) as ranks:
        begin = time.monotonic()
        for process in ranks.processes:
            process.join(60)
        assert [process.exitcode for process in ranks.processes] == [STUCK, STUCK]
        assert time.monotonic() - begin < 30
    assert len(list((tmp_path / "run" / STACKS).iterdir())) == 2


def _long_patience(ctx: ParallelContext, folder: str) -> None:
    """All are stuck. Rank 0 notices at once; the other one has as much time as by default, and counts every three minutes."""
    mine: Any = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if ctx.is_main else None
    port = int(ctx.all_gather_text(str(mine.port if mine else ""))[0])
    store = mine or dist.TCPStore("127.0.0.1", port)
    default = replace(ctx, timeout=ParallelContext.timeout)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
        with Watchdog(default, Path(folder), 0.5 if ctx.is_main else 1800.0) as watchdog:
            for step in (1, 2):
                watchdog.beat(step, "data")
            time.sleep(3600)


def test_the_stacks_of_all_are_there_when_the_first_rank_leaves(tmp_path: Path) -> None:
    """torchrun then kills the others."""
    with start_ranks(_long_patience, 2, str(tmp_path / "run")) as ranks:
        ready = wait([process.sentinel for process in ranks.processes], 60)
        ranks.kill(range(2))
        assert ready
    first, second = sorted((tmp_path / "run" / STACKS).iterdir())
    assert first.read_text().startswith("rank 0: stuck at step 2, data: no sign of life from any rank for ")
    assert second.read_text().startswith("rank 1: stuck at step 2, data: another rank found all stuck\n")
    assert "in _long_patience" in second.read_text()


def _stuck(ctx: ParallelContext, folder: str, what: str) -> None:
    """At the first step, on one rank. what: of the machine does not go on either."""
    if what == "the disk":
        stacks = Path(folder, STACKS)
        stacks.mkdir(parents=True)
        os.mkfifo(stacks / "step-00000001-rank-00000.txt")  # opening it waits for a reader
        watchdog_module.GRACE, watchdog_module.LAST_WORDS = 60.5, 60.0
    with (
        full_pipe() as pipe,
        open(pipe if what == "stderr" else f"{folder}-said", "w") as stderr,
        redirect_stderr(stderr),
        Watchdog(ctx, Path(folder), 0.1) as watchdog,
        pytest.MonkeyPatch.context() as patch,
    ):
        if what == "the system":
            patch.setattr(threading.Thread, "start", _refuse)
        watchdog.beat(1, "data")
        print("a report", file=sys.stderr, flush=True)  # where nobody reads, this is what the rank is stuck in
        threading.Event().wait()


def _refuse(thread: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


@pytest.mark.parametrize("what", ["stderr", "the disk", "the system"])
def test_it_ends_whatever_else_is_stuck(tmp_path: Path, what: str) -> None:
    folder = tmp_path / "run"
    with start_ranks(_stuck, 1, str(folder), what) as ranks:
        ranks.processes[0].join(60)
        assert ranks.processes[0].exitcode == STUCK
    if what == "the system":
        return
    told = folder / STACKS / "step-00000001-rank-00000.txt" if what == "stderr" else Path(f"{folder}-said")
    assert "rank 0: stuck at step 1, data: no sign of life from any rank for " in told.read_text()
    assert "Thread MainThread:\n" in told.read_text()
    assert " in _stuck\n" in told.read_text()


def test_a_checkpoint_that_is_renamed_while_it_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = threading.Semaphore(0)

    def renamed(path: Path, pattern: str) -> Any:
        looks.release()
        raise FileNotFoundError(path / pattern)

    monkeypatch.setattr(Path, "glob", renamed)
    monkeypatch.setattr(os, "_exit", lambda code: None)
    with Watchdog(OneRank().ctx, tmp_path, 2.0) as watchdog:
        watchdog.beat(1, "save")
        for _ in range(2):  # the thread that looks lives on
            assert looks.acquire(timeout=30)
            watchdog.alive()


def test_alone_and_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.setattr(watchdog_module, "GRACE", 0.3)
    monkeypatch.setattr(watchdog_module, "LAST_WORDS", 0.1)
    with Watchdog(OneRank().ctx, tmp_path, None):
        time.sleep(0.3)
    with Watchdog(OneRank().ctx, tmp_path, 0.5) as watchdog:
        watchdog.beat(1, "data")
        time.sleep(1)  # the first step may take longer
        watchdog.beat(2, "evaluation")
        for _ in range(4):
            time.sleep(0.25)
            watchdog.alive()
        part = tmp_path / "checkpoints/step-00000002.tmp/rank-00000-00003.safetensors"
        part.parent.mkdir(parents=True)
        watchdog.beat(2, "save")
        for size in range(1, 5):  # written while training waits
            time.sleep(0.25)
            part.write_bytes(b"x" * size)
        assert ended == []
        assert not (tmp_path / STACKS).exists()
        time.sleep(1)
    assert set(ended) == {STUCK}
    [path] = (tmp_path / STACKS).iterdir()
    assert path.name == "step-00000002-rank-00000.txt"
    assert "test_alone_and_without" in path.read_text()


STOPPED = """
import sys, time
from pathlib import Path
from longtrain.train import watchdog
from tests.one_rank import OneRank

watchdog.GRACE = 0.1
with watchdog.Watchdog(OneRank().ctx, Path(sys.argv[1]), 1.0) as watch:
    for step in range(8):
        watch.beat(step, "data")
        print(step, flush=True)
        time.sleep(0.4)
"""


def test_a_stopped_process_has_its_time_again(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", STOPPED, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        while process.stdout.readline() != "2\n":
            pass
        process.send_signal(signal.SIGSTOP)
        time.sleep(SLOW * 1.0 + 0.5)
        process.send_signal(signal.SIGCONT)
        assert process.wait(30) == 0


HOLDING = """
import ctypes, sys
from pathlib import Path
from longtrain.train import watchdog
from tests.one_rank import OneRank

watchdog.GRACE = 0.5
with watchdog.Watchdog(OneRank().ctx, Path(sys.argv[1]), 0.5) as watch:
    watch.beat(1, "data")
    ctypes.PyDLL(None).sleep(4)
"""


def test_of_a_process_whose_interpreter_is_held_the_stack_is_told(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", HOLDING, str(tmp_path)], capture_output=True, text=True, timeout=60, check=False)
    assert 'File "<string>", line 10 in <module>' in done.stderr
    assert done.returncode == 0, "it might have been stopped"


def test_nothing_waits_longer_than_a_lock_can(tmp_path: Path) -> None:
    with Watchdog(OneRank().ctx, tmp_path, 1e300) as watch:
        time.sleep(2.0)
        assert sum(thread.name == "watchdog" for thread in threading.enumerate()) == 2, "the third has nobody to listen to"
    watch.done()
