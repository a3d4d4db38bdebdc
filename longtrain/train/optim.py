"""Which parameters decay, and the learning rate of every step."""

from __future__ import annotations

import math
from typing import Any

from torch import nn


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups for AdamW: weights of two and more dimensions decay; norms and biases do not.

    Every parameter appears once, tied ones too. Empty groups are left out.
    """
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for parameter in model.parameters():
        # A parameter that ZeRO-3 has partitioned looks one-dimensional and empty; ds_shape is its true shape.
        shape = getattr(parameter, "ds_shape", parameter.shape)
        (decayed if len(shape) >= 2 else others).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


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
