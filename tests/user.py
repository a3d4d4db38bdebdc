"""A user's desk: prepared text with a real tokenizer, a recipe, a trained run, and the command line in this process."""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.testing import CliRunner

from longtrain.cli import app
from longtrain.data.prepare import prepare

VOCAB, STEPS = 320, 3
REPOSITORY = Path(__file__).parents[1]
SCRIPT = str(REPOSITORY / "scripts" / "train.py")
CHECKPOINT = Path("run", "checkpoints", f"step-{STEPS:08d}")
"""The newest checkpoint of a trained desk."""

RECIPE = """\
name: tiny
device: cpu
model:
  family: llama
  vocab_size: 320
  hidden_size: 16
  layers: 2
  heads: 2
  kv_heads: 1
  intermediate_size: 24
  init_std: 0.3
data:
  path: data
output: run
training:
  sequence_length: 32
  steps: 3
  batch_size: 4
  micro_batch_size: 2
  precision: fp32
  activations: none
optimizer:
  lr: 1e-2
schedule:
  kind: constant
checkpoint:
  every: 1
  keep: 2
evaluation:
  every: 2
  sequences: 2
"""


@dataclass(frozen=True)
class Said:
    """How a command ended. text: all that it wrote, to both streams."""

    code: int
    text: str


def command(*arguments: str) -> Said:
    """`longtrain ARGUMENTS` in this process. An exception that is no exit would be a traceback, and is raised."""
    result = CliRunner().invoke(app, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert "Traceback" not in result.output
    return Said(result.exit_code, result.output)


def train(*arguments: str) -> Said:
    """`longtrain train` from the recipe in the current folder."""
    return command("train", "--recipe", "recipe.yaml", *arguments)


def sit_at_desk(root: Path, monkeypatch: pytest.MonkeyPatch, *, trained: bool = False) -> None:
    """Makes `root` a desk of its own and the current folder: recipe.yaml, data/ and, where it was trained, run/."""
    shutil.copytree(_desk(trained), root, dirs_exist_ok=True)
    monkeypatch.chdir(root)


def snapshot(root: Path = Path()) -> dict[str, str]:
    """Every file and folder below `root`, with a digest of what it holds."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in root.rglob("*")
    }


@functools.cache
def _desk(trained: bool) -> Path:
    root = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    if trained:
        shutil.copytree(_desk(False), root, dirs_exist_ok=True)
        with contextlib.chdir(root):
            said = train()
        assert said.code == 0, said.text
        return root
    for number in range(40):
        text = "".join(f"def line_{line}(x):\n    return x + {number}  # für alle\n" for line in range(3 + number % 7))
        path = root / "text" / f"{number}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    prepare(str(root / "text"), root / "data", vocab_size=VOCAB, held_out=0.2)
    shutil.rmtree(root / "text")
    (root / "recipe.yaml").write_text(RECIPE)
    return root


def process(*words: str) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(words, capture_output=True, text=True, timeout=120, env=environment)
