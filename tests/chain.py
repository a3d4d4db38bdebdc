"""A run with three checkpoints and no training, and what can be done to one of them that stays rightly signed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from longtrain.data.mixture import Split
from longtrain.plan import make_plan
from longtrain.train import checkpoint
from longtrain.train.assemble import open_data
from longtrain.train.checkpoint_format import MANIFEST, UNSIGNED
from longtrain.train.resume import CHECKPOINTS, choose, confirm, state_of
from longtrain.train.state import Progress
from tests.one_rank import OneRank
from tests.tiny import tiny_recipe

TENSORS = "rank-00000.safetensors"


class Chain:
    """The folder of a run with checkpoints 1, 2 and 3, the last of which may be of another recipe."""

    def __init__(self, folder: Path, data: Path, *last: str) -> None:
        self.overrides = (f"data.path={data}", f"output={folder}")
        self.engine: Any = OneRank()
        self.recipe = tiny_recipe(*self.overrides)
        self.split: Split = open_data(make_plan(self.recipe, 1, "cpu"))[0]
        self.steps = []
        for step in (1, 2, 3):
            recipe = tiny_recipe(*self.overrides, *(last if step == 3 else ()))
            state = state_of(recipe, self.split, Progress(step), None)
            self.steps.append(checkpoint.save(folder / CHECKPOINTS, self.engine, state, keep=3))

    def start(self, wanted: str = "auto", *, force: bool = False) -> Any:
        return confirm(self.engine.ctx, choose(self.recipe, self.split, wanted, force=force))


def sign(step: Path, **fields: Any) -> None:
    """The manifest with other fields, whatever they are."""
    unsigned = json.dumps(json.loads((step / MANIFEST).read_text()) | fields | {"sha256": UNSIGNED})
    digest = hashlib.sha256(unsigned.encode()).hexdigest()
    (step / MANIFEST).write_text(unsigned.replace(UNSIGNED, digest, 1))


def rewrite(content: bytes, name: str = TENSORS) -> Callable[[Path], None]:
    """A file that is something else, rightly signed."""

    def change(step: Path) -> None:
        (step / name).write_bytes(content)
        files = json.loads((step / MANIFEST).read_text())["files"]
        sign(step, files=files | {name: {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}})

    return change
