"""Asked to stop on any rank in any phase, a run saves on all ranks and goes on later as if nothing had happened."""

from __future__ import annotations

import io
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from longtrain.cli import app
from longtrain.data.loader import Loader, held_out
from longtrain.evaluate import plot
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
from longtrain.train.signals import SAME, SIGNALS, STOPPED, StopSignals
from tests.distributed import run_ranks
from tests.tiny import TEXT, tiny_recipe, write_corpus
from tests.unread import full_pipe

STEPS, WORLD = 6, 2
# what is interrupted, at which call of it (those of the start-up probe count), and the step after which all ranks stop
PHASES: dict[str, tuple[Any, str, int, int]] = {
    "model build": (assembly, "build_model", 1, 0),
    # the probe, of two micro batches, calls it three times
    "first compile": (Engine, "forward", 4, 1),
    "data wait": (Loader, "step", 3, 2),
    "forward": (Engine, "forward", 10, 3),
    "accumulation": (Engine, "backward", 7, 3),
    "step": (Engine, "step", 4, 3),
    "evaluation": (Engine, "train", 3, 2),
    "copy of a save": (checkpoint.Saver, "begin", 1, 2),
    "writing of a save": (checkpoint, "write_tensors", 1, 2),
}


Sent = tuple[str, signal.Signals, int]
"""In which phase, which signal, to which rank."""


@contextmanager
def _signal(sent: Sent, rank: int) -> Iterator[None]:
    """Sends this process the signal, where it is for this rank, at the n-th call of what the phase is made of."""
    phase, number, whom = sent
    owner, name, at, _ = PHASES[phase]
    inner, calls = getattr(owner, name), 0

    def outer(*arguments: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        if rank == whom and calls == at:
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


def _train(ctx: ParallelContext, overrides: Sequence[str], sent: Sent | None = None) -> int:
    plan = make_plan(tiny_recipe(*overrides), ctx.world, "cpu")
    split, unseen = open_data(plan)
    batches = () if unseen is None else held_out(unseen, 2, micro_batch_size=2, dp=plan.dp, dp_rank=ctx.dp_rank)

    def held_out_losses(run: Run) -> Any:
        return held_out_loss(run.engine, run.plan, run.ctx, batches)

    evaluate = held_out_losses if batches else None
    start = choose(plan.recipe, split, "auto")
    ctx.all_gather_text("chosen")
    sending = nullcontext() if sent is None else _signal(sent, ctx.rank)
    with StopSignals(lambda text: None) as stop, redirect_stdout(io.StringIO()), sending:
        return run_training(plan, ctx, split, start, until=None, evaluate=evaluate, asked_to_stop=stop.asked).step


def _interrupt_all(ctx: ParallelContext, base: str, recipes: dict[str, list[str]]) -> dict[str, list[int]]:
    """For every phase, the steps at which the run was interrupted and at which it ended."""
    seen = {}
    for index, (phase, overrides) in enumerate(recipes.items()):
        stopped = _train(ctx, overrides, (phase, SIGNALS[index % len(SIGNALS)], index % ctx.world))
        ctx.all_gather_text("stopped")
        found = [path.name for path in complete(Path(base, phase, CHECKPOINTS))]
        ctx.all_gather_text("looked")
        seen[phase] = [stopped, found, _train(ctx, overrides)]
    return seen


def _learnt(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / CHECKPOINTS / f"step-{STEPS:08d}").glob("rank-*")}


def _wishes(base: Path, cp: int) -> list[str]:
    """Of a run on the corpus `base`/data, all but its folder."""
    write_corpus(base / "data", 7)
    common = [f"data.path={base / 'data'}", f"training.steps={STEPS}", "checkpoint.every=2", "evaluation.every=2"]
    return [*common, f"parallel.cp={cp}", "training.micro_batch_size=2", "evaluation.sequences=2"]


def _steps(phase: str) -> tuple[int, ...]:
    """At which of them a run may stop: a thread writes a save while the main one may have begun the next step."""
    step = PHASES[phase][3]
    return (step, step + 1) if phase == "writing of a save" else (step,)


@pytest.mark.parametrize(("world", "cp"), [(1, 1), (2, 2)])
def test_every_phase(tmp_path: Path, world: int, cp: int) -> None:
    common = _wishes(tmp_path, cp)
    recipes = {phase: [*common, f"output={tmp_path / phase}"] for phase in PHASES}
    straight = [*common, f"output={tmp_path / 'straight'}"]
    ranks = run_ranks(_interrupt_all, world, str(tmp_path), recipes, cp=cp)
    run_ranks(_train, world, straight, cp=cp)
    wanted = _learnt(tmp_path / "straight")
    assert len(wanted) == world
    for phase in PHASES:
        for seen in ranks:
            stopped, found, ended = seen[phase]
            assert stopped in _steps(phase), phase
            assert stopped == ranks[0][phase][0], phase
            # before the first step there is nothing to lose
            assert (found[-1] if found else "step-00000000") == f"step-{stopped:08d}", phase
            assert ended == STEPS
        verify(tmp_path / phase / CHECKPOINTS)
        assert _learnt(tmp_path / phase) == wanted, phase


def _command(rank: int, port: int, base: str, overrides: Sequence[str], sent: Sent) -> None:
    """What torchrun would start as this rank of two: `longtrain train`, to its end; what it says goes to `base`/said-RANK."""
    place = {"RANK": rank, "WORLD_SIZE": WORLD, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": WORLD, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1", OMP_NUM_THREADS="1")
    words = ["train", "--recipe", str(Path(base, "recipe.yaml")), *(word for wish in overrides for word in ("--set", wish))]
    with pytest.MonkeyPatch.context() as patch, Path(base, f"said-{rank}").open("w") as said:
        patch.setattr(plot, "draw_plots", lambda *_: [])  # they take longer than the run
        with redirect_stdout(said), redirect_stderr(said), _signal(sent, rank):
            app(words)


def _exit_codes(base: Path, overrides: Sequence[str], sent: Sent) -> list[int | None]:
    """Of both ranks of the command, each a process."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["tests.warm"])
    ranks = [server.Process(target=_command, args=(rank, port, str(base), overrides, sent), daemon=True) for rank in range(WORLD)]
    try:
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(60)
        return [rank.exitcode for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()


def _go_on_with_all(ctx: ParallelContext, recipes: dict[str, list[str]]) -> list[int]:
    return [_train(ctx, overrides) for overrides in recipes.values()]


@pytest.mark.faults
@pytest.mark.timeout(3600)
def test_every_signal_to_every_rank_in_every_phase(tmp_path: Path) -> None:
    """By the command: with the exit codes of its processes, and what the main rank says in the end."""
    common, recipes = _wishes(tmp_path, WORLD), {}
    (tmp_path / "recipe.yaml").write_text(TEXT)
    cases = [(phase, number, whom) for phase in PHASES for number in SIGNALS for whom in range(WORLD)]
    saved, begin = Counter[str](), time.monotonic()
    for sent in cases:
        phase, number, whom = sent
        name = f"{phase} {number.name} {whom}"
        recipes[name] = [*common, f"output={tmp_path / name}"]
        codes = _exit_codes(tmp_path, recipes[name], sent)
        said = [(tmp_path / f"said-{rank}").read_text() for rank in range(WORLD)]
        assert codes == [STOPPED] * WORLD, (name, said)
        assert f"{number.name}: stopping after this step" in said[whom], (name, said)
        step = int(said[0].split("stopped at step ")[1].split(",")[0])
        assert step in _steps(phase), (name, said)
        found = [path.name for path in complete(tmp_path / name / CHECKPOINTS)]
        # before the first step there is nothing to lose
        assert found[-1:] == ([f"step-{step:08d}"] if step else []), name
        if found:
            verify(tmp_path / name / CHECKPOINTS)
        saved["saved" if found else "nothing to save yet"] += 1
    recipes["straight"] = [*common, f"output={tmp_path / 'straight'}"]
    for ends in run_ranks(_go_on_with_all, WORLD, recipes, cp=WORLD, timeout=1800):
        assert ends == [STEPS] * len(recipes)
    wanted = _learnt(tmp_path / "straight")
    assert len(wanted) == WORLD
    for name in recipes:
        assert _learnt(tmp_path / name) == wanted, name
    seconds = time.monotonic() - begin
    print(f"{sum(saved.values())} of {len(cases)}: both ranks left with {STOPPED}, {dict(saved)}, same bits; {seconds:.0f} s")
    assert saved["saved"] == len(cases) - len(SIGNALS) * WORLD


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
        return _train(ctx, overrides)


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


UNREAD = """
import sys, threading
from longtrain.train.signals import StopSignals

def say(text):
    print(text, file=sys.stderr, flush=True)

def refuse(thread):
    raise RuntimeError("can't start new thread")

with StopSignals(say, lambda: say("last words")) as stop:
    if sys.argv[1] == "no more threads":
        threading.Thread.start = refuse
    print("ready", flush=True)
    while not stop.asked():
        threading.Event().wait(0.01)
    print("asked", flush=True)
    print("held back")
    say("what training says")
"""


@pytest.mark.parametrize(("also", "rest"), [("", "held back\n"), ("no more threads", "")])
def test_the_second_one_ends_a_process_whose_words_nobody_reads(also: str, rest: str) -> None:
    command = [sys.executable, "-c", UNREAD, also]
    buffered = {**os.environ, "PYTHONUNBUFFERED": ""}
    with (
        full_pipe() as stderr,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=buffered) as process,
    ):
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "asked\n"
        time.sleep(SAME + 0.1)
        process.send_signal(signal.SIGTERM)
        try:
            assert process.communicate(timeout=30)[0] == rest
            assert process.returncode == 128 + signal.SIGTERM
        finally:
            process.kill()


def test_outside_everything_is_as_before() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with StopSignals(lambda text: None) as stop:
        assert not stop.asked()
        assert [signal.getsignal(number) for number in SIGNALS] != before
    assert [signal.getsignal(number) for number in SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1
