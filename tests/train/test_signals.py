"""Asked to stop on any rank in any phase, a run saves on all ranks and goes on later as if nothing had happened."""

from __future__ import annotations

import io
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from longtrain.data.loader import Loader, held_out
from longtrain.evaluate.held_out import held_out_loss
from longtrain.parallel.context import ParallelContext
from longtrain.parallel.deepspeed import Engine
from longtrain.plan import make_plan
from longtrain.train import assemble as assembly
from longtrain.train import checkpoint
from longtrain.train.assemble import Run, open_data
from longtrain.train.checkpoint_folder import complete, verify
from longtrain.train.resume import CHECKPOINTS, choose
from longtrain.train.run import run_training
from longtrain.train.signals import SAME, SIGNALS, StopSignals
from tests.distributed import run_ranks
from tests.tiny import tiny_recipe, write_corpus

STEPS = 6
# what is interrupted, at which call of it (those of the start-up probe count), and the step after which all ranks stop
PHASES: dict[str, tuple[Any, str, int, int]] = {
    "model build": (assembly, "build_model", 1, 0),
    # the probe, of two micro batches, calls it three times
    "first compile": (Engine, "forward", 4, 1),
    "data wait": (Loader, "step", 3, 2),
    "forward": (Engine, "forward", 12, 3),
    "accumulation": (Engine, "backward", 7, 3),
    "step": (Engine, "step", 4, 3),
    "evaluation": (Engine, "train", 3, 2),
    "copy of a save": (checkpoint.Saver, "begin", 1, 2),
    "writing of a save": (checkpoint, "write_tensors", 1, 2),
}


@contextmanager
def _signal_in(phase: str, number: signal.Signals, mine: bool) -> Iterator[None]:
    """Sends this process a signal at the n-th call of what the phase is made of."""
    owner, name, at, _ = PHASES[phase]
    inner, calls = getattr(owner, name), 0

    def outer(*arguments: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        if mine and calls == at:
            if phase == "first compile":
                # it comes while this process waits for another one, as for a compiler; test_while_the_compiler_works has a real one
                subprocess.run(["sh", "-c", f"kill -{number:d} {os.getpid()}; sleep 0.1"], check=True)
            else:
                os.kill(os.getpid(), number)
                time.sleep(0.1)  # the thread that listens is as fast as the machine is idle
        return inner(*arguments, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, outer)
        yield


def _train(ctx: ParallelContext, overrides: Sequence[str], phase: str | None, number: signal.Signals) -> int:
    plan = make_plan(tiny_recipe(*overrides), ctx.world, "cpu")
    split, unseen = open_data(plan)
    batches = () if unseen is None else held_out(unseen, 2, micro_batch_size=1, dp=plan.dp, dp_rank=ctx.dp_rank)

    def held_out_losses(run: Run) -> Any:
        return held_out_loss(run.engine, run.plan, run.ctx, batches)

    evaluate = held_out_losses if batches else None
    start = choose(plan.recipe, split, "auto")
    ctx.all_gather_text("chosen")
    with StopSignals(lambda text: None) as stop, redirect_stdout(io.StringIO()):
        asked = stop.asked
        if phase is None:
            return run_training(plan, ctx, split, start, until=None, evaluate=evaluate, asked_to_stop=asked).step
        with _signal_in(phase, number, mine=ctx.rank == ctx.world - 1):
            return run_training(plan, ctx, split, start, until=None, evaluate=evaluate, asked_to_stop=asked).step


def _interrupt_all(ctx: ParallelContext, base: str, recipes: dict[str, list[str]]) -> dict[str, list[int]]:
    """For every phase, the steps at which the run was interrupted and at which it ended."""
    seen = {}
    for index, (phase, overrides) in enumerate(recipes.items()):
        number = SIGNALS[index % len(SIGNALS)]
        stopped = _train(ctx, overrides, phase, number)
        ctx.all_gather_text("stopped")
        found = [path.name for path in complete(Path(base, phase, CHECKPOINTS))]
        ctx.all_gather_text("looked")
        seen[phase] = [stopped, found, _train(ctx, overrides, None, number)]
    return seen


def _learnt(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / CHECKPOINTS / f"step-{STEPS:08d}").glob("rank-*")}


@pytest.mark.parametrize(("world", "cp"), [(1, 1), (2, 2)])
def test_every_phase(tmp_path: Path, world: int, cp: int) -> None:
    write_corpus(tmp_path / "data", 7)
    common = [f"data.path={tmp_path / 'data'}", f"training.steps={STEPS}", "checkpoint.every=2", "evaluation.every=2"]
    common += [f"parallel.cp={cp}", "training.micro_batch_size=2", "evaluation.sequences=2"]
    recipes = {phase: [*common, f"output={tmp_path / phase}"] for phase in PHASES}
    straight = [*common, f"output={tmp_path / 'straight'}"]
    ranks = run_ranks(_interrupt_all, world, str(tmp_path), recipes, cp=cp)
    run_ranks(_train, world, straight, None, signal.SIGTERM, cp=cp)
    wanted = _learnt(tmp_path / "straight")
    assert len(wanted) == world
    for phase, (*_, step) in PHASES.items():
        for seen in ranks:
            stopped, found, ended = seen[phase]
            # a thread writes while the main one may have begun the next step
            assert stopped in ((step, step + 1) if phase == "writing of a save" else (step,)), phase
            assert stopped == ranks[0][phase][0], phase
            # before the first step there is nothing to lose
            assert (found[-1] if found else "step-00000000") == f"step-{stopped:08d}", phase
            assert ended == STEPS
        verify(tmp_path / phase / CHECKPOINTS)
        assert _learnt(tmp_path / phase) == wanted, phase


COMPILER = """#!/bin/sh
case "$*" in *.cpp*) mkdir {mark} 2> /dev/null && kill -{number:d} {rank} && sleep 0.2 ;; esac
exec {compiler} "$@"
"""


def _train_compiled(ctx: ParallelContext, overrides: Sequence[str], folder: str) -> int:
    """The step at which a run ends whose model is compiled by torch.compile, with a cache in `folder`. The first time that
    torch's compiler runs the one for C++, that one sends SIGTERM to this process, which waits for it."""
    from torch._inductor import config

    build, compiler, tools = assembly.build_model, shutil.which("g++"), Path(folder)
    place = {"mark": tools / "asked", "rank": os.getpid(), "compiler": compiler, "number": signal.SIGTERM}
    (tools / "g++").write_text(COMPILER.format(**place))
    (tools / "g++").chmod(0o755)

    def compiled(*arguments: Any) -> Any:
        model = build(*arguments)
        model.compile(dynamic=False)
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assembly, "build_model", compiled)
        patch.setattr(config.cpp, "cxx", (str(tools / "g++"),))
        patch.setattr(config, "compile_threads", 1)
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tools / "cache"))
        return _train(ctx, overrides, None, signal.SIGTERM)


@pytest.mark.faults
@pytest.mark.timeout(600)
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a compiler for C++")
def test_while_the_compiler_works(tmp_path: Path) -> None:
    """No recipe compiles its model, so that on a CPU nothing is compiled in the first step (on a GPU it is Triton that is); here
    all of it is, by torch.compile, and the compiler for C++ itself sends the signal."""
    write_corpus(tmp_path / "data", 7)
    (tools := tmp_path / "tools").mkdir()
    common = [f"data.path={tmp_path / 'data'}", f"training.steps={STEPS}", "checkpoint.every=2", "model.layers=1"]
    ends = []
    for name in ("stopped", "stopped", "straight"):
        ends += run_ranks(_train_compiled, 1, [*common, f"output={tmp_path / name}"], str(tools), timeout=500)
        assert (tools / "asked").exists()
    assert ends == [1, STEPS, STEPS]
    assert list((tools / "cache").rglob("*.so")), "it was compiled"
    wanted = _learnt(tmp_path / "straight")
    assert len(wanted) == 1
    assert _learnt(tmp_path / "stopped") == wanted


BLOCKED = """
import ctypes, sys
from longtrain.train.signals import StopSignals
with StopSignals(lambda text: print(text, flush=True), lambda: print("last words", flush=True)) as stop:
    print("ready", flush=True)
    mutex = ctypes.create_string_buffer(256)
    for _ in range(2):  # the second waits for ever, and no Python runs, as inside a collective
        ctypes.CDLL(None).pthread_mutex_lock(mutex)
print("end", stop.asked(), flush=True)
"""


@pytest.mark.parametrize("number", SIGNALS)
def test_the_second_one_ends_a_blocked_process(number: signal.Signals) -> None:
    with subprocess.Popen([sys.executable, "-c", BLOCKED], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        for _ in range(2):  # a batch system and torchrun, both at once, are one request
            process.send_signal(number)
        assert process.stdout.readline().startswith(f"{number.name}: stopping after this step, with a checkpoint")
        time.sleep(SAME + 0.1)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.communicate(timeout=10)[0] == "last words\n"
        assert process.returncode == 128 + signal.SIGTERM


def test_outside_everything_is_as_before() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with StopSignals(lambda text: None) as stop:
        assert not stop.asked()
        assert [signal.getsignal(number) for number in SIGNALS] != before
    assert [signal.getsignal(number) for number in SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1
