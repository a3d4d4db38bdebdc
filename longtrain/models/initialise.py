"""First values of parameters: a pure function of seed, name and shape."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from math import sqrt

import torch
from torch import Tensor, nn

from longtrain.models.config import ModelConfig
from longtrain.models.decoder import Decoder

RESIDUAL = ("attention.output.weight", "mlp.down.weight")


def initial_value(config: ModelConfig, seed: int, name: str, shape: tuple[int, ...]) -> Tensor:
    """fp32 on the CPU: norms 1, biases 0, everything else normal with init_std; projections that write to the residual stream are
    scaled by 1 / sqrt(2 layers) (Radford et al. 2019). The same on every rank, device and ZeRO stage."""
    if name.endswith("norm.weight"):
        return torch.ones(shape)
    if name.endswith(".bias"):
        return torch.zeros(shape)
    digest = hashlib.blake2b(f"{seed} {name} {shape}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    std = config.init_std / sqrt(2 * config.layers) if name.endswith(RESIDUAL) else config.init_std
    return torch.empty(shape).normal_(0.0, std, generator=generator)


@torch.no_grad()
def initialise(
    model: Decoder,
    seed: int,
    gathered: Callable[[nn.Parameter], AbstractContextManager[object]] = lambda parameter: nullcontext(),
) -> None:
    """Fills every parameter in place, one at a time, tied ones once.

    gathered: gives the context in which a parameter is whole and writable, for those that are sharded over ranks.
    """
    for name, parameter in model.named_parameters():
        with gathered(parameter):
            parameter.copy_(initial_value(model.config, seed, name, tuple(parameter.shape)))
