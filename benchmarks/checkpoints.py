"""Saving and going on, measured: `python -m benchmarks.checkpoints`, repository root, on one GPU; by --recipe on the CPU too.

First a checkpoint that two CPU ranks wrote goes on here in fp32 and in bf16. Then a run of random tokens saves behind its training,
and once more with training standing still (as where host memory is short), and a second run goes on from the first checkpoint.
Prints rates, how long a step waits for a save, and whether 4 steps are 2 steps, a resume and 2 more, bit for bit. A JSON file goes
to benchmarks/results. Needs free disk for two checkpoints, 12 bytes a parameter each, and host memory for one. What is read comes
from the page cache as far as that holds what was just written. Exit code 1 where bits differ.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from benchmarks.refusals import need_gpu, refuse
from longtrain.cores import usable_cores
from longtrain.data.corpus import Skipped
from longtrain.data.manifest import TOKENIZER, TokenizerEntry, token_dtype_name
from longtrain.data.mixture import Split
from longtrain.data.prepare import make_manifest
from longtrain.data.shards import SplitWriter, write_manifest
from longtrain.errors import LongtrainError
from longtrain.parallel import launch
from longtrain.parallel.context import ParallelContext
from longtrain.plan import Plan, make_plan
from longtrain.recipe.load import load_recipe, parse_recipe
from longtrain.train import checkpoint
from longtrain.train.assemble import Run, assemble, open_data
from longtrain.train.checkpoint import Saver, check_together
from longtrain.train.checkpoint_folder import delete, find_latest, read_master
from longtrain.train.checkpoint_format import MANIFEST, read_manifest
from longtrain.train.resume import CHECKPOINTS, Start, restore, state_of
from longtrain.train.step import prepare_step, train_step

RESULTS = Path(__file__).parent / "results"
RECIPE = "llama-1b-32k"
HALF, WHOLE = 2, 4
BESIDE, ALONE = 60, 6
"""Steps that are timed while a checkpoint is written, at most, and while none is."""
SETTINGS = (
    "parallel.cp=1",
    "zero.stage=1",
    "training.sequence_length=4096",
    "training.batch_size=4",
    "training.micro_batch_size=4",
    "evaluation.every=null",
)
TINY = """
name: two-ranks
device: cpu
model: {family: llama, vocab_size: 256, hidden_size: 128, layers: 2, heads: 2, kv_heads: 1, intermediate_size: 256}
training: {sequence_length: 128, steps: 4, batch_size: 2, precision: fp32, activations: none}
optimizer: {lr: 0.001}
zero: {stage: 1}
"""


def write_tokens(folder: Path, sequences: int, length: int, vocabulary: int) -> Path:
    """A prepared folder of random tokens; every sequence is one document."""
    folder.mkdir(parents=True)
    (folder / TOKENIZER).write_bytes(b"none")
    draw, writers = np.random.default_rng(0), {}
    for split, count in (("train", sequences), ("heldout", 1)):
        with SplitWriter(folder, split, np.dtype(token_dtype_name(vocabulary)).newbyteorder("<"), 1 << 28) as writer:
            for _ in range(count):
                writer.add(draw.integers(vocabulary, size=length))
        writers[split] = writer
    entry = TokenizerEntry(sha256=hashlib.sha256(b"none").hexdigest(), vocab_size=vocabulary, bos=1, eos=2)
    write_manifest(folder, make_manifest(writers, entry, Skipped(), 0))
    return folder


class Bench:
    """One process, and what it has measured."""

    def __init__(self, ctx: ParallelContext, folder: Path) -> None:
        self.ctx, self.folder = ctx, folder
        self.seconds: dict[str, float] = {}

    def measured(self, what: str, action: Callable[[], Any]) -> Any:
        """`action`'s answer; takes its time, and says so while the rest still runs."""
        self._wait()
        began = time.perf_counter()
        answer = action()
        self._wait()
        self.seconds[what] = time.perf_counter() - began
        print(f"  {what}: {self.seconds[what]:.3f} s", flush=True)
        return answer

    @contextmanager
    def run(self, plan: Plan, split: Split, start: Path | None, what: str) -> Iterator[Run]:
        """A run that begins with random weights or at a checkpoint."""
        gc.collect()
        if self.ctx.device.type == "cuda":
            torch.cuda.empty_cache()
        run = self.measured(what, lambda: assemble(plan, self.ctx, split, Start(start), verified=True))
        try:
            yield run
        finally:
            run.close()

    def step(self, run: Run) -> float:
        """Trains one step; its seconds."""
        self._wait()
        began, recipe = time.perf_counter(), run.plan.recipe
        batches = run.loader.step(run.progress.sequences // recipe.training.batch_size)
        outcome = train_step(run.engine, run.plan, run.ctx, prepare_step(run.plan, run.ctx, batches), recipe.optimizer.lr)
        if outcome.skipped:
            raise SystemExit("a step was skipped: its loss was not finite")
        run.progress = run.progress.after_step(recipe.training.batch_size, recipe.training.sequence_length)
        self._wait()
        return time.perf_counter() - began

    def save(self, saver: Saver, run: Run, folder: Path) -> str | None:
        """Begins a checkpoint; the reason where training stood still for all of it."""
        return saver.begin(folder, run.engine, state_of(run.plan.recipe, run.split, run.progress, None), keep=9)

    def _wait(self) -> None:
        if self.ctx.device.type == "cuda":
            torch.cuda.synchronize()


def straight(bench: Bench, plan: Plan, split: Split) -> dict[str, Any]:
    """Trains without a stop; saves behind the training after HALF and WHOLE steps, then standing still. Keeps the first."""
    folder, seen = bench.folder / "straight", {}
    with bench.run(plan, split, None, "assemble with random weights") as run:
        for _ in range(HALF):
            bench.step(run)
        bench.measured("first save: training stands still", lambda: bench.save(run.saver, run, folder))
        for _ in range(WHOLE - HALF):
            bench.step(run)
        bench.measured("first save: the rest", run.saver.settle)
        began = time.time()
        bench.measured("save: training stands still", lambda: bench.save(run.saver, run, folder))
        beside = []
        while not run.saver.finished and len(beside) < BESIDE:
            beside.append(bench.step(run))
        bench.measured("save: the rest, after the steps beside it", run.saver.settle)
        last = find_latest(folder)
        assert last is not None
        # written last, while a step is still on its way
        seen["save_seconds_beside_training"] = (last / MANIFEST).stat().st_mtime - began
        manifest = read_manifest(last)
        seen |= {"bytes": manifest.bytes, "files": len(manifest.files), "digests": tensor_files(last)}
        delete(last)
        seen["step_seconds"] = statistics.median(bench.step(run) for _ in range(ALONE))
        seen["step_seconds_beside_save"] = statistics.median(beside) if beside else None
        seen["steps_beside_save"] = len(beside)
        # a host with memory for half of a copy
        with patch.object(checkpoint, "available_memory", lambda: manifest.bytes // 2):
            saver = Saver(bench.ctx)
            reason = bench.measured("save, training standing still for all of it", lambda: bench.save(saver, run, folder))
        saver.settle()
        if reason is None:
            raise SystemExit("the save that should have stood still did not")
        last = find_latest(folder)
        assert last is not None
        delete(last)
    return seen


def resumed(bench: Bench, plan: Plan, split: Split) -> dict[str, Any]:
    """Goes on from the first checkpoint of `straight`, and saves with nothing beside it."""
    half, folder = bench.folder / "straight" / f"step-{HALF:08d}", bench.folder / "resumed"
    bench.measured("verify every byte", lambda: check_together(bench.ctx, half))
    seen: dict[str, Any] = {}
    with bench.run(plan, split, None, "assemble again") as run:
        run.progress = bench.measured("load", lambda: restore(run.engine, half, verified=True))
        for _ in range(WHOLE - HALF):
            bench.step(run)

        def whole() -> None:
            bench.save(run.saver, run, folder)
            run.saver.settle()

        bench.measured("save with nothing beside it", whole)
        seen["digests"] = tensor_files(folder / f"step-{WHOLE:08d}")
    return seen


def tensor_files(step: Path) -> dict[str, str]:
    """SHA-256 of the files that hold weights and moments, by name."""
    return {name: entry.sha256 for name, entry in read_manifest(step).files.items() if name.startswith("rank-")}


def from_two_ranks(bench: Bench, device: str) -> dict[str, bool]:
    """Whether what two CPU ranks saved is here, bit for bit, what the engine holds, by precision; it then trains a step."""
    data = write_tokens(bench.folder / "tiny-data", 32, 128, 256)
    output, recipe = bench.folder / "two-ranks", bench.folder / "two-ranks.yaml"
    recipe.write_text(f"{TINY}data: {{path: {data}}}\noutput: {output}\n")
    script = Path(__file__).parents[1] / "scripts" / "train.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = bench.measured(
        "two CPU ranks train and save",
        lambda: subprocess.run([*command, "--recipe", str(recipe), "--until", "2"], stdout=subprocess.DEVNULL),
    )
    if done.returncode:
        refuse("the two CPU ranks that write the first checkpoint failed, as they say above")
    saved = find_latest(output / CHECKPOINTS)
    assert saved is not None
    master, equal = dict(read_master(saved)), {}
    for precision in ("fp32", "bf16"):
        here = parse_recipe(recipe.read_text(), str(recipe), [f"device={device}", f"training.precision={precision}"])
        plan = make_plan(here, 1, device)
        split, _ = open_data(plan)
        with bench.run(plan, split, saved, f"two CPU ranks' checkpoint, here in {precision}") as run:
            weights = [
                torch.equal(parameter.detach().cpu(), master[name].to(parameter.dtype))
                for name, parameter in run.engine.model.named_parameters()
            ]
            held = [
                torch.equal(piece.tensors["master"].cpu(), master[piece.name].flatten()[piece.start : piece.start + piece.numel])
                for piece in run.engine.held_ranges()
            ]
            equal[precision] = all(weights) and all(held) and run.progress.step == 2
            bench.step(run)
    return equal


def report(bench: Bench, plan: Plan, one: dict[str, Any], two: dict[str, Any], foreign: dict[str, bool]) -> dict[str, Any]:
    """All figures, rates in GB/s of 10^9 bytes."""
    seconds, size = bench.seconds, one["bytes"] / 1e9
    cuda = bench.ctx.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "torch": str(torch.__version__),
        "cores": usable_cores(),
        "recipe": plan.recipe.name,
        "parameters": plan.parameters,
        "tokens_per_step": plan.tokens_per_step,
        "kernel": plan.kernel.kernel.name,
        "checkpoint_gb": size,
        "files": one["files"],
        "write_gb_per_second": size / seconds["save with nothing beside it"],
        "write_gb_per_second_beside_training": size / one["save_seconds_beside_training"],
        "write_gb_per_second_standing_still": size / seconds["save, training standing still for all of it"],
        "verify_gb_per_second": size / seconds["verify every byte"],
        "load_gb_per_second": size / seconds["load"],
        "verify_and_load_gb_per_second": size / (seconds["verify every byte"] + seconds["load"]),
        "blocked_seconds_first_save": seconds["first save: training stands still"],
        "blocked_seconds": seconds["save: training stands still"],
        "step_seconds": one["step_seconds"],
        "step_seconds_beside_save": one["step_seconds_beside_save"],
        "steps_beside_save": one["steps_beside_save"],
        "standing_still_seconds": seconds["save, training standing still for all of it"],
        "bitwise_equal_after_resume": one["digests"] == two["digests"],
        "two_cpu_ranks_equal_here": foreign,
        "seconds": seconds,
    }


def show(figures: dict[str, Any]) -> None:
    """The figures that matter, for people."""
    beside, foreign = figures["step_seconds_beside_save"], figures["two_cpu_ranks_equal_here"]
    slower = "no step ended before the save did" if beside is None else f"{beside:.3f} s ({figures['steps_beside_save']} steps)"
    load, both = figures["load_gb_per_second"], figures["verify_and_load_gb_per_second"]
    blocked, first = figures["blocked_seconds"], figures["blocked_seconds_first_save"]
    rows = [
        ("checkpoint", f"{figures['checkpoint_gb']:.2f} GB in {figures['files']} files"),
        ("written", f"{figures['write_gb_per_second']:.2f} GB/s hashed and synced, nothing beside it"),
        ("written beside training", f"{figures['write_gb_per_second_beside_training']:.2f} GB/s"),
        ("read + verified", f"{figures['verify_gb_per_second']:.2f} GB/s"),
        ("loaded", f"{load:.2f} GB/s; verified and loaded {both:.2f} GB/s"),
        ("a step", f"{figures['step_seconds']:.3f} s; while a checkpoint is written {slower}"),
        ("a step waits for a save", f"{blocked:.3f} s; for the first one {first:.3f} s"),
        ("a save standing still", f"{figures['standing_still_seconds']:.3f} s"),
        (f"{WHOLE} = {HALF} + resume + {WHOLE - HALF}", _same(figures["bitwise_equal_after_resume"])),
        ("from two CPU ranks", ", ".join(f"{precision} {_same(equal)}" for precision, equal in foreign.items())),
    ]
    print("\n" + "\n".join(f"{what:26} {value}" for what, value in rows))


def _same(equal: bool) -> str:
    return "bit for bit" if equal else "DIFFERENT"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--recipe", help=f"its model is saved; its data is not needed. On a GPU {RECIPE} by default")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="overrides one key of the recipe")
    parser.add_argument("--folder", type=Path, default=Path(), help="where there is room; everything written is deleted again")
    return parser.parse_args(arguments)


def overrides(folder: Path, wanted: Sequence[str]) -> list[str]:
    """What the benchmark sets in a recipe, and what was asked for, which goes before."""
    settings = (*SETTINGS, f"data.path={folder / 'data'}", f"output={folder / 'run'}")
    return list({setting.split("=")[0]: setting for setting in (*settings, *wanted)}.values())


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.recipe is None:
        need_gpu("a small model, named with --recipe, is saved by the CPU too")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="checkpoints-", dir=options.folder) as name:
        folder = Path(name).absolute()
        plan = make_plan(load_recipe(options.recipe or RECIPE, overrides(folder, options.set)), 1, device)
        training = plan.recipe.training
        write_tokens(folder / "data", 96 * training.batch_size, training.sequence_length, plan.model.vocab_size)
        split, _ = open_data(plan)
        bench = Bench(launch.start(launch.Launch(), device=device), folder)
        try:
            print(f"{plan.recipe.name}: {plan.parameters:,} parameters on {device}, kernel {plan.kernel.kernel.name}", flush=True)
            foreign = from_two_ranks(bench, device)
            figures = report(bench, plan, straight(bench, plan, split), resumed(bench, plan, split), foreign)
        finally:
            launch.stop()
    figures["benchmark_seconds"] = time.perf_counter() - began
    out = RESULTS / f"checkpoints-{figures['device'].lower().replace(' ', '-')}.json"
    out.write_text(json.dumps(figures, indent=1) + "\n")
    show(figures)
    print(f"\n{out.relative_to(Path.cwd()) if out.is_relative_to(Path.cwd()) else out}")
    return 0 if figures["bitwise_equal_after_resume"] and all(figures["two_cpu_ranks_equal_here"].values()) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except LongtrainError as error:
        refuse(str(error))
