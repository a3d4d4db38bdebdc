"""Training as a user starts it, proved and measured: `python -m benchmarks.training --recipe llama-160m-4k --recipe llama-1b-32k`.

Of each recipe some steps are trained on real text by scripts/train.py, on one GPU unless --ranks says otherwise. The loss must
fall. The run is killed (SIGKILL) behind its first checkpoint and must go on from there; its export must give
transformers the logits of our decoder, and generate. Throughput is the median over the steps behind the first WARM of a process.
benchmarks/results/training-DEVICE.json is written only where all of that held.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.long_text import write
from benchmarks.refusals import need_gpu

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
WARM = 5
"""Steps of a process that are not counted: kernels are compiled, memory is found."""
BETWEEN = 3
"""Steps between the checkpoint that is resumed from and the kill, at least."""
TOLERANCE = 2e-3
"""Largest difference of two implementations' fp32 logits from the same weights, relative to the largest logit."""
PROMPT = "def read_lines(path):\n    "


@dataclass(frozen=True)
class Case:
    """How a built-in recipe is measured on one GPU: what of it is replaced. It is killed and exported unless told not to."""

    overrides: dict[str, str]
    steps: int = 24


# Few sequences a step, and a rate that rises all the time: the recipes' own steps of 0.5M to 1M tokens take minutes on one GPU.
CASES = {
    "llama-160m-4k": Case({"training.batch_size": "32"}, steps=40),
    "llama-1b-32k": Case({"training.batch_size": "2", "schedule.kind": "cosine", "schedule.decay_steps": "null"}),
    # Stage 1 reduces gradients after the backward, when the activations are gone: on one GPU it peaks 11 GiB below stage 2. A
    # checkpoint is 75 GiB: two of them need their place.
    "llama-7b-32k": Case({"training.batch_size": "1", "zero.stage": "1", "optimizer.lr": "1e-4"}, steps=20),
}


def main(words: Sequence[str] | None = None) -> None:
    given = arguments(words)
    if given.device == "cuda":
        need_gpu("--device cpu trains there, which small recipes of your own can bear")
    data = given.data or prepare(given.folder)
    rows = []
    for name in given.recipe:
        rows.append(measure(name, data, given))
        print(f"wrote {record(rows, given)}", flush=True)
    report(rows)


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", action="append", required=True, help=f"{', '.join(CASES)}, or any other; repeatable")
    parser.add_argument("--data", type=Path, help="prepared text; by default the sources of this Python's packages are prepared")
    parser.add_argument("--folder", type=Path, default=Path("runs/training-benchmark"), help="of runs, logs and prepared text")
    parser.add_argument("--steps", type=int, help="of every recipe")
    parser.add_argument("--ranks", type=int, default=1, help="more than one are started with torchrun")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as for scripts/train.py")
    parser.add_argument("--kill", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--export", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--limit", type=float, default=500.0, help="seconds that one training process may take")
    parser.add_argument("--out", type=Path, help="the file of results")
    return parser.parse_args(words)


def record(rows: list[dict[str, Any]], given: argparse.Namespace) -> Path:
    """The file of results with `rows`, and with what it held of other recipes: one card need not measure all in one go."""
    made = rows[-1]["made_by"]
    out = given.out or RESULTS / f"training-{made['device'].lower().replace(' ', '-')}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    earlier = json.loads(out.read_text())["rows"] if out.exists() else []
    kept = [row for row in earlier if row["recipe"] not in [new["recipe"] for new in rows]]
    out.write_text(json.dumps({"command": "python -m benchmarks.training", **made, "rows": kept + rows}, indent=1) + "\n")
    return out


def prepare(folder: Path) -> Path:
    """Real text for every recipe here, prepared once: long documents, 32000 pieces."""
    data = folder.resolve() / "data"
    if not data.exists():
        corpus = write(data.with_name("corpus.jsonl"), megabytes=40.0)
        command = [sys.executable, "scripts/prepare_data.py", "--source", str(corpus), "--out", str(data)]
        subprocess.run([*command, "--vocab-size", "32000", "--sequence-length", "32768"], check=True, cwd=ROOT)
    return data


def measure(name: str, data: Path, given: argparse.Namespace) -> dict[str, Any]:
    """One recipe trained, killed, resumed and exported as asked; its row of the results."""
    case = CASES.get(name, Case({}))
    kills, exports = given.kill, given.export
    steps = given.steps or case.steps
    given.folder.mkdir(parents=True, exist_ok=True)
    run = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=given.folder.resolve()))
    overrides = common(data, run, steps, given.device) | case.overrides
    # one sequence over all ranks
    overrides["parallel.cp"] = str(given.ranks)
    if kills or not exports:
        overrides["checkpoint.every"] = "10" if kills else "null"
    overrides |= dict(text.split("=", 1) for text in given.set)
    command = start_command(name, overrides, given.ranks)
    told = {key: value for key, value in overrides.items() if key not in ("output", "data.path")}
    row: dict[str, Any] = {"recipe": name, "ranks": given.ranks, "steps": steps, "overrides": told}
    first = 0
    if kills:
        row["kill"] = kill_behind_checkpoint(command, run, given.limit)
        first = row["kill"]["checkpoint"]
    began = time.perf_counter()
    train(command, run, given.limit)
    row["process_seconds"] = time.perf_counter() - began
    metrics = read(run)
    if kills:
        row["kill"]["replayed"] = check_resumed(row["kill"], metrics)
    row |= figures(metrics, steps, first)
    row |= {"tokens_per_step": round(metrics[0]["tokens"]), "made_by": made_by(run)}
    row["trackers"] = sorted(path.name for path in run.iterdir() if path.name in ("wandb", "tensorboard", "metrics.jsonl"))
    row["warnings"] = [line for line in log_of(run).read_text(errors="replace").splitlines() if line.startswith("WARNING")]
    if exports:
        row["export"] = check_export(run)
    print(f"{name}: {json.dumps({key: value for key, value in row.items() if key not in ('overrides', 'losses')})}", flush=True)
    return row


def common(data: Path, run: Path, steps: int, device: str) -> dict[str, str]:
    """What every measured recipe gets."""
    trackers = {"wandb": ("tracking.wandb", "offline"), "tensorboard": ("tracking.tensorboard", "true")}
    chosen = next((package for package in trackers if installed(package)), None)
    if chosen != "wandb":
        print(f"wandb is not installed: {chosen or 'metrics.jsonl'} takes its place", flush=True)
    return {
        "device": device,
        "output": str(run),
        "data.path": str(data.resolve()),
        # pieces of long documents fill whole sequences, as in a run at long context
        "data.long_documents": "split",
        "training.steps": str(steps),
        "schedule.warmup_steps": str(steps),
        "evaluation.every": "null",
        "checkpoint.keep": "1",
        **(dict([trackers[chosen]]) if chosen else {}),
    }


def installed(package: str) -> bool:
    """Not by its folder: wandb leaves one of its name in the current directory."""
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False


def start_command(recipe: str, overrides: dict[str, str], ranks: int) -> list[str]:
    """As a user starts it."""
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    sets = [word for key, value in overrides.items() for word in ("--set", f"{key}={value}")]
    return [sys.executable, *torchrun, "scripts/train.py", "--recipe", recipe, *sets]


def train(command: list[str], run: Path, limit: float) -> None:
    """Trains to the end. Raises SystemExit with the end of the log where that fails."""
    process = launch(command, run)
    try:
        code = process.wait(limit)
    except subprocess.TimeoutExpired:
        stop(process)
        code = f"no end after {limit:.0f} s"
    if code != 0:
        fail(run, f"training failed ({code})")


def launch(command: list[str], run: Path) -> subprocess.Popen[bytes]:
    with log_of(run).open("ab") as log:
        # a session of its own, so that a kill takes all ranks
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)


def stop(process: subprocess.Popen[bytes]) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def kill_behind_checkpoint(command: list[str], run: Path, limit: float) -> dict[str, Any]:
    """Kills the run some steps after its first checkpoint is there; what it left. Raises SystemExit where it ends before."""
    process, deadline = launch(command, run), time.monotonic() + limit
    while process.poll() is None and time.monotonic() < deadline:
        done, saved = len(read(run)), [int(path.name[5:]) for path in (run / "checkpoints").glob("step-????????")]
        if saved and done >= min(saved) + BETWEEN:
            stop(process)
            saved = [int(path.name[5:]) for path in (run / "checkpoints").glob("step-????????")]
            losses = [row["loss"] for row in read(run)]
            return {"checkpoint": max(saved), "killed_after": len(losses), "losses": losses}
        time.sleep(0.02)
    if process.poll() is None:
        stop(process)
    return fail(run, "training was over before it could be killed behind a checkpoint: more --steps are needed")


def check_resumed(kill: dict[str, Any], metrics: list[dict[str, Any]]) -> float:
    """Largest difference of the losses of steps that were trained twice. SystemExit where the run did not go on from there."""
    losses, resumed = kill.pop("losses"), kill["checkpoint"]
    if [row["step"] for row in metrics] != list(range(1, len(metrics) + 1)):
        raise SystemExit(f"steps are missing or twice there: {[row['step'] for row in metrics]}")
    twice = range(resumed, min(len(losses), len(metrics)))
    worst = max((abs(metrics[step]["loss"] - losses[step]) for step in twice), default=0.0)
    if [row["loss"] for row in metrics[:resumed]] != losses[:resumed] or worst > 0.05:
        raise SystemExit(f"after the kill, steps from {resumed + 1} on have other losses, by up to {worst}")
    return worst


def figures(metrics: list[dict[str, Any]], steps: int, first: int) -> dict[str, Any]:
    """What is reported of a run; first: steps done when its last process began. SystemExit where the loss did not fall."""
    losses = [row["loss"] for row in metrics]
    # the very first, before any update: the steps after it may be higher, and would flatter the fall
    begin, end = losses[0], statistics.mean(losses[-3:])
    if len(metrics) != steps or metrics[-1]["skipped_steps"] or not end < begin:
        raise SystemExit(f"{len(metrics)} of {steps} steps, loss {begin:.3f} -> {end:.3f}: {losses}")
    counted = metrics[first + WARM :] or metrics[-1:]

    def middle(key: str) -> float | None:
        values = [row[key] for row in counted]
        return None if None in values else statistics.median(values)

    keys = ("tokens_per_second", "tokens_per_second_per_rank", "step_seconds", "mfu_causal", "mfu_full")
    return {key: middle(key) for key in keys} | {
        "counted_steps": len(counted),
        "peak_memory_gib": max(row["memory_gib"] for row in metrics),
        "loss_first": begin,
        "loss_last": end,
        "losses": losses,
    }


@torch.no_grad()
def check_export(run: Path) -> dict[str, Any]:
    """The export in transformers, on the CPU: its logits are ours, and it generates. Raises SystemExit where they are not."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from longtrain.attention import AttentionMask, Band
    from longtrain.models.huggingface import APART
    from longtrain.parallel.zero_config import DTYPES
    from longtrain.train.export import load_trained

    folder = run / "huggingface"
    tokenizer = AutoTokenizer.from_pretrained(folder / APART if (folder / APART).exists() else folder)
    theirs: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = tokenizer(PROMPT, return_tensors="pt").input_ids
    found = theirs(tokens).logits
    trained = load_trained(run)
    for parameter in trained.model.parameters():  # as exported
        parameter.copy_(parameter.to(DTYPES[trained.recipe.training.precision]))
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    expected = trained.model(tokens, positions, AttentionMask(Band.causal(trained.recipe.model.window)))
    difference = float((found - expected).abs().max() / expected.abs().max())
    text = tokenizer.decode(theirs.generate(tokens, max_new_tokens=24, do_sample=False)[0])
    if not difference <= TOLERANCE:
        raise SystemExit(f"{folder}: transformers computes other logits: {difference} of the largest")
    return {"logits_difference": difference, "generated": text, "step": trained.step}


def made_by(run: Path) -> dict[str, Any]:
    """The device and the versions of a run, as it says itself."""
    last = json.loads((run / "environment.jsonl").read_text().splitlines()[-1])
    devices = {device for host in last["ranks"].values() for device in host}
    names = ("torch", "triton", "deepspeed", "transformers")
    return {
        "device": ", ".join(sorted(devices)),
        "versions": {name: last["versions"][name] for name in names if name in last["versions"]},
    }


def read(run: Path) -> list[dict[str, Any]]:
    """The reports so far; a line that is being written is left out."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def log_of(run: Path) -> Path:
    return run.with_name(f"{run.name}.log")


def fail(run: Path, reason: str) -> Any:
    text = log_of(run).read_text(errors="replace")
    raise SystemExit(f"{reason}; the end of {log_of(run)}:\n{text[-6000:]}")


def report(rows: list[dict[str, Any]]) -> None:
    """A table for people."""
    print(f"{'recipe':<16} {'tokens/s':>9} {'MFU causal':>10} {'full':>7} {'GiB':>6} {'loss':>16}  resumed, export")
    for row in rows:
        causal, full = (f"{row[key]:.1%}" if row[key] is not None else "-" for key in ("mfu_causal", "mfu_full"))
        kill, export = row.get("kill"), row.get("export")
        proofs = [f"killed after {kill['killed_after']}, on from {kill['checkpoint']}" if kill else ""]
        proofs += ["export equal" if export else ""]
        loss = f"{row['loss_first']:.3f} -> {row['loss_last']:.3f}"
        proved = ", ".join(proof for proof in proofs if proof)
        memory = f"{row['peak_memory_gib']:.1f}"
        print(f"{row['recipe']:<16} {row['tokens_per_second']:>9,.0f} {causal:>10} {full:>7} {memory:>6} {loss:>16}  {proved}")


if __name__ == "__main__":
    main()
