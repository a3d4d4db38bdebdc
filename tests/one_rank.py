"""Checkpoints without processes, a model or DeepSpeed: the part of Engine that they use, over plain tensors."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch

from longtrain.parallel.context import ParallelContext
from longtrain.parallel.deepspeed import MOMENTS, ParameterInfo, Range
from longtrain.train.checkpoint_format import TrainState


def make_state(step: int, **more: Any) -> TrainState:
    return TrainState(step=step, tokens=1000 * step, cursor=4 * step, recipe="name: toy\n", tracker="run-1", **more)


class OneRank:
    """The part of Engine that checkpoints use, over two plain tensors."""

    stage = 1

    def __init__(self, names: tuple[str, ...] = ("a", "b")) -> None:
        self.ctx = ParallelContext(0, 1, 0, 1, 1, 0, 0, None, torch.device("cpu"), timedelta(seconds=9))
        kinds = ("master", *MOMENTS)
        self.values = {name: {kind: torch.randn(6) for kind in kinds} for name in names}
        self.steps = dict.fromkeys(names, 5)
        self.scaler: dict[str, int | float] | None = {"cur_scale": 65536.0, "cur_iter": 7}
        self.refreshed = False

    def owned_ranges(self) -> Iterator[Range]:
        for name, tensors in self.values.items():
            for start, end in ((0, 4), (4, 6)):
                yield Range(name, start, end - start, {kind: value[start:end] for kind, value in tensors.items()})

    held_ranges = owned_ranges

    def parameters(self) -> dict[str, ParameterInfo]:
        return dict.fromkeys(self.values, ParameterInfo((2, 3), 6, "bfloat16"))

    def create_moments(self) -> None: ...

    def adam_steps(self) -> dict[str, int]:
        return self.steps

    def set_adam_steps(self, steps: dict[str, int]) -> None:
        self.steps = steps

    def scaler_state(self) -> dict[str, int | float] | None:
        return self.scaler

    def set_scaler_state(self, state: dict[str, int | float] | None) -> None:
        self.scaler = state

    def refresh_weights(self) -> None:
        self.refreshed = True
