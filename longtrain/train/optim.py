"""Which parameters decay, and the learning rate of every step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

# Elements of a parameter group. ZeRO-1 and -2 copy the gradient of a whole group at each step, 6 bytes an element: with all of a 7B
# model in one, 38 GiB. Just under a power of two, because pinned host memory is handed out in those.
GROUP = 1 << 28


def decay_groups(model: nn.Module, weight_decay: float, largest: int = GROUP) -> list[dict[str, Any]]:
    """Parameter groups for AdamW: weights of two and more dimensions decay; norms and biases do not.

    Every parameter appears once, tied ones too, in the order of the model. A group has up to `largest` elements, or one parameter.
    """
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for parameter in model.parameters():
        (decayed if len(_shape(parameter)) >= 2 else others).append(parameter)
    halves = ((decayed, weight_decay), (others, 0.0))
    return [{"params": group, "weight_decay": decay} for half, decay in halves for group in _bounded(half, largest)]


def _bounded(parameters: Iterable[nn.Parameter], largest: int) -> Iterator[list[nn.Parameter]]:
    group: list[nn.Parameter] = []
    size = 0
    for parameter in parameters:
        numel = _shape(parameter).numel()
        if group and size + numel > largest:
            yield group
            group, size = [], 0
        group.append(parameter)
        size += numel
    if group:
        yield group


def _shape(parameter: nn.Parameter) -> torch.Size:
    # A parameter that ZeRO-3 has partitioned looks one-dimensional and empty; ds_shape is its true shape.
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def learning_rate(
    step: int,
    *,
    kind: str,
    lr: float,
    steps: int,
    warmup_steps: int = 0,
    decay_steps: int | None = None,
    final_ratio: float = 0.1,
) -> float:
    """Learning rate of optimizer step `step`, counted from 0, of a run of `steps`.

    Warm-up rises linearly from lr / warmup_steps at step 0 to lr at step warmup_steps - 1. After it: `cosine` and `linear`
    fall from lr to lr * final_ratio at the last step; `wsd` (warm-up, stable, decay: arXiv:2404.06395) stays at lr and falls
    linearly to lr * final_ratio over the last `decay_steps` steps; `constant` stays at lr. Past the end it keeps the last value.
    """
    if kind not in ("cosine", "linear", "wsd", "constant"):
        raise ValueError(f"learning rate schedule {kind!r} is not known: use cosine, linear, wsd or constant")
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    if kind == "constant":
        return lr
    falling = steps - warmup_steps
    if kind == "wsd":
        if decay_steps is None:
            raise ValueError("the wsd schedule needs decay_steps")
        falling = min(decay_steps, falling)
    if falling <= 0:
        return lr
    # Like warm-up, decay counts the step itself: the first falling step is already below lr, the last is at the end value.
    progress = min(max((step + 1 - (steps - falling)) / falling, 0.0), 1.0)
    remaining = (1 + math.cos(math.pi * progress)) / 2 if kind == "cosine" else 1 - progress
    return lr * (final_ratio + (1 - final_ratio) * remaining)
