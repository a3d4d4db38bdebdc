"""The one normalisation of the loss: sums over tokens in, the mean over all trainable tokens of the step out."""

from __future__ import annotations


def loss_scale(*, world: int, accumulation: int, tokens: int) -> float:
    """What a local sum of token losses is multiplied with before the backward of every micro step.

    DeepSpeed divides by `accumulation` and averages over all `world` ranks, so world * accumulation / tokens makes its
    gradient the exact mean over the trainable tokens of the step, also where some rank has none. With no trainable token
    anywhere the scale is 0: all gradients are zero, and the optimizer decays weights and moments as on any other step.
    """
    return world * accumulation / tokens if tokens else 0.0
