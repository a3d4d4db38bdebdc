"""A run's folder that explains itself: the resolved recipe, the plan in words, and what every start ran on."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import secrets
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

import torch

import longtrain
from longtrain.errors import CheckpointError, LaunchError
from longtrain.files import replace_durably
from longtrain.parallel.context import ParallelContext
from longtrain.plan import Plan
from longtrain.plan.describe import describe
from longtrain.recipe.load import dump_recipe
from longtrain.recipe.schema import Recipe
from longtrain.recipe.secret import hidden
from longtrain.recipe.section import system_folder
from longtrain.train.resume import CHECKPOINTS
from longtrain.train.tracking import METRICS_FILE

RECIPE_FILE = "recipe.yaml"
PLAN_FILE = "plan.txt"
ENVIRONMENT_FILE = "environment.jsonl"
EXPORT_FOLDER = "huggingface"
PACKAGES = ("torch", "triton", "deepspeed", "numpy", "safetensors", "transformers", "wandb", "tensorboard")
PATIENCE = 30.0
"""Seconds until every host has to see a file: a network file system may remember for a while that it was not there."""


def occupy(folder: Path) -> IO[str]:
    """A file that no other process may have from here, also on another host, until it is closed or this process ends; for the main
    rank. Where the file system has no locks, nobody is kept out. Raises CheckpointError where another process trains into `folder`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / ENVIRONMENT_FILE).open("a", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise CheckpointError(
            f"{folder}: another process trains into it (the last line of {ENVIRONMENT_FILE} says since when and where); let it "
            "end, or set another output"
        ) from None
    except OSError:
        pass
    return file


def explain(folder: Path, plan: Plan, environment: Mapping[str, Any]) -> None:
    """Adds a line to environment.jsonl, and writes recipe.yaml and plan.txt anew. For the main rank, at every start."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ENVIRONMENT_FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(environment) + "\n")
    replace_durably(folder / RECIPE_FILE, dump_recipe(plan.recipe).encode())
    text = "".join(f"{what:{max(16, len(what))}} {value}\n" for what, value in describe(plan))
    replace_durably(folder / PLAN_FILE, text.encode())


def worth_keeping(folder: Path) -> list[Path]:
    """What explains a run, for trackers to keep: files, and where its checkpoints and the export of its model are."""
    files = [folder / name for name in (RECIPE_FILE, PLAN_FILE, ENVIRONMENT_FILE)]
    return [*files, folder / CHECKPOINTS, folder / EXPORT_FOLDER]


def environment(ctx: ParallelContext, done: int) -> dict[str, Any]:
    """What this start runs on, after `done` steps; no environment variables. A collective of all ranks."""
    device = torch.cuda.get_device_name(ctx.device) if ctx.device.type == "cuda" else "cpu"
    machines: dict[str, Counter[str]] = {}
    for text in ctx.all_gather_text(json.dumps([socket.gethostname(), device])):
        host, name = json.loads(text)
        machines.setdefault(host, Counter())[name] += 1
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "after_step": done,
        "command": hidden(shlex.join(sys.argv)),
        "directory": str(Path.cwd()),
        "ranks": {host: dict(devices) for host, devices in machines.items()},
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "versions": {"longtrain": longtrain.__version__} | {name: found for name in PACKAGES if (found := installed(name))},
        "commit": commit(Path(longtrain.__file__).parent) if ctx.is_main else None,
    }


def tracker_config(plan: Plan, environment: Mapping[str, Any]) -> dict[str, Any]:
    """What an experiment tracker shows beside the curves."""
    numbers = {
        "world": plan.world,
        "dp": plan.dp,
        "cp": plan.cp,
        "accumulation": plan.accumulation,
        "device": plan.device,
        "parameters": plan.parameters,
        "tokens_per_step": plan.tokens_per_step,
        "local_length": plan.local_length,
        "kernel": plan.kernel.kernel.name,
        "fused": list(plan.fused),
    }
    return {"recipe": plan.recipe.model_dump(mode="json"), "plan": numbers, "environment": dict(environment)}


def installed(package: str) -> str | None:
    """The version of an installed package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def commit(package: Path) -> str | None:
    """The commit that a package's files are of, with "+changes" where they were changed; None where git does not know them."""
    # a package installed below somebody else's repository is not part of it
    if _git(package, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    head, changes = _git(package, "rev-parse", "HEAD"), _git(package, "status", "--porcelain", "--untracked-files=no", ".")
    return head if not changes else f"{head}+changes"


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def check_place(recipe: Recipe) -> None:
    """Raises LaunchError where the run's folder is one that holds other things: what is there would be written over, or lost among
    the files of the run."""
    folder, here = Path(recipe.run_folder), Path(os.path.realpath("."))
    real = Path(os.path.realpath(folder))
    if here.is_relative_to(real):
        raise LaunchError(f"output: {folder} is the current folder or one above it; set output to a folder for this run alone")
    system = system_folder(str(real))
    if system is not None:
        raise LaunchError(f"output: {folder} is in {system}, which is of the operating system; set another output")
    inputs = {"data": list(recipe.data.folders), "model.init": [recipe.model.init] if recipe.model.init else []}
    for field, paths in inputs.items():
        for path in paths:
            if real.is_relative_to(os.path.realpath(path)):
                raise LaunchError(f"output: {folder} is in {path}, which is {field}; set output to a folder for this run alone")
    ours = (ENVIRONMENT_FILE, METRICS_FILE, CHECKPOINTS)
    foreign = [name for name in (RECIPE_FILE, PLAN_FILE) if (folder / name).exists()]
    if foreign and not any((folder / name).exists() for name in ours):
        raise LaunchError(f"output: {folder} holds a {foreign[0]} that no run wrote and this one would replace; set another output")


def check_writable(folder: Path) -> None:
    """Raises LaunchError where the run's folder can be neither used nor made. Leaves no trace."""
    existing = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not existing.is_dir():
        raise LaunchError(f"output: the run's folder {folder} cannot be made: {existing} is not a folder; set another output")
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        reason = f"{existing}: {error.strerror}"
        raise LaunchError(f"output: the run's folder {folder} cannot be written: {reason}; set another output") from None


def check_shared(ctx: ParallelContext, folder: Path, *, host: str | None = None, patience: float = PATIENCE) -> None:
    """Raises LaunchError on every rank where `folder`, where all ranks write checkpoints, is not the same one on every host.

    A collective of all ranks. The main rank leaves a file there for a moment, and one rank of every other host looks for it, up to
    `patience` seconds. Where all ranks are of one host nothing is written. host: the name of this one, by default its own.
    """
    host = socket.gethostname() if host is None else host
    first = ctx.local_rank == 0
    if sum(json.loads(text) for text in ctx.all_gather_text(json.dumps(first))) <= 1:
        return
    token = folder / f".shared-{secrets.token_hex(6)}.tmp"
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    problem = _leave(token) if ctx.is_main else None
    said = json.dumps({"token": token.name, "problem": problem, "folder": f"{folder.absolute()} of {host}"})
    main = json.loads(ctx.all_gather_text(said)[0])
    sees = main["problem"] is not None or not first or _appears(folder / main["token"], patience)
    blind = sorted({text for text in ctx.all_gather_text("" if sees else host) if text})
    if ctx.is_main:
        with suppress(OSError):
            token.unlink()
            for path in made:
                path.rmdir()
    if main["problem"] is not None:
        raise LaunchError(main["problem"])
    if blind:
        raise LaunchError(
            f"output: the run's folder {main['folder']} is another one on {', '.join(blind)}: every rank writes its part of a "
            "checkpoint there; set output to a folder on a file system that all hosts share"
        )


def _leave(token: Path) -> str | None:
    """Writes the file; what was wrong, in words."""
    try:
        token.parent.mkdir(parents=True, exist_ok=True)
        token.touch()
    except OSError as error:
        return f"output: the run's folder {token.parent} cannot be written: {error.strerror}; set another output"
    return None


def _appears(path: Path, patience: float) -> bool:
    end = time.monotonic() + patience
    while not path.exists():
        if time.monotonic() > end:
            return False
        # a listing makes a network file system look again
        next((list(folder.iterdir()) for folder in path.parents if folder.is_dir()), None)
        time.sleep(min(0.5, patience))
    return True
