"""What one report of a run holds."""

from __future__ import annotations

import math
import resource
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

import torch

from longtrain.models.flops import Flops

Span = tuple[int, int, float, int]
"""(first, last, loss, tokens): the mean loss of the predictions made at positions first .. last of their documents."""


class Evaluation(Protocol):
    """What an evaluation finds: the mean loss on held-out text, nan where there was none, and the same by position."""

    @property
    def loss(self) -> float: ...

    @property
    def by_position(self) -> Sequence[Span]: ...


@dataclass(frozen=True)
class Metrics:
    """One line of metrics.jsonl, where a number that is not finite is null.

    step: optimizer steps done. loss: mean over the trainable tokens of the step, natural logarithm. eval_loss: the same over
    held-out text, and eval_by_position its `Span`s; both are null in steps without evaluation. grad_norm: before clipping.
    tokens: trained on since the start of the run. tokens_per_second: over all ranks; tokens_per_second_per_rank is what to compare
    between machines. mfu_causal counts the work that documents, band and padding leave, mfu_full the whole square of pairs;
    recomputation never; null where the device's peak is not known. memory_gib: the most that any tensor allocation reached on this
    device, or of the process on a CPU. skipped_steps: of the whole run, without an update because a loss or gradient was not
    finite or a spike; loss_spikes and roll_backs: of the whole run too. save_seconds: how long training stood still for checkpoints
    since the report before, null where there was none.
    """

    step: int
    loss: float
    eval_loss: float | None
    lr: float
    grad_norm: float
    tokens: int
    tokens_per_second: float
    tokens_per_second_per_rank: float
    step_seconds: float
    mfu_causal: float | None
    mfu_full: float | None
    memory_gib: float
    eval_by_position: Sequence[Span] | None = None
    skipped_steps: int = 0
    save_seconds: float | None = None
    loss_spikes: int = 0
    roll_backs: int = 0


def scalars(metrics: Metrics) -> dict[str, float]:
    """The finite numbers of a report by name, for trackers that draw curves; `step` is among them."""
    named = {key: value for key, value in asdict(metrics).items() if isinstance(value, int | float)}
    for first, last, loss, _ in metrics.eval_by_position or ():
        # padded, because dashboards sort by name
        named[f"eval_by_position/{first:07d}-{last:07d}"] = loss
    return {key: value for key, value in named.items() if math.isfinite(value)}


def utilisation(flops: Flops, seconds: float, world: int, peak: float | None) -> tuple[float | None, float | None]:
    """(mfu_causal, mfu_full) of `flops` over all ranks; peak in FLOP/s of one device."""
    if peak is None:
        return None, None
    return flops.causal / (seconds * world * peak), flops.full / (seconds * world * peak)


def peak_memory_gib(device: torch.device) -> float:
    """The high-water mark of this process: allocated by torch on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
