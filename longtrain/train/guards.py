"""What keeps one bad batch from spoiling a run, and a spoilt run from going on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from longtrain.errors import TrainingError
from longtrain.parallel.deepspeed import Engine, StepResult
from longtrain.train.checkpoint_folder import complete
from longtrain.train.checkpoint_format import step_of
from longtrain.train.state import Progress


def poison_if_broken(loss_sum: Tensor, earlier: Sequence[Tensor]) -> Tensor:
    """`loss_sum`, with NaN as its gradient where it, or one of this step's `earlier` micro batches, is not finite.

    For the last micro batch of a step. A loss can be infinite and its gradients finite; this way the engine sees it in the
    gradients, whose overflow it looks for on all ranks anyway: no collective more, and nothing waits for the device.
    """
    total = sum(earlier, start=loss_sum.detach())
    return loss_sum * torch.where(total.isfinite(), 1.0, float("nan")).to(loss_sum.dtype)


def poison(loss_sum: Tensor) -> Tensor:
    """`loss_sum`, with NaN as its gradient: the engine then updates nothing, on any rank."""
    return loss_sum * float("nan")


def step_poisoned(engine: Engine) -> StepResult:
    """The step after `poison`: an overflow to the engine, but the fp16 loss scale, which was not at fault, stays as it is."""
    scaler = engine.scaler_state()
    if scaler is not None and scaler["cur_scale"] <= 1:
        # DeepSpeed ends the run where it would have to lower a scale of 1
        engine.set_scaler_state(scaler | {"cur_scale": 2.0})
    result = engine.step()
    engine.set_scaler_state(scaler)
    return result


def check_skips(progress: Progress, most: int, checkpoints: Path, *, damaged: Sequence[Path] = ()) -> None:
    """Raises TrainingError, the same on every rank, after `most` steps in a row without an update.

    It names the newest of `good_checkpoints`. damaged: known not to be it.
    """
    if progress.skipped_in_row < most:
        return
    good = [path for path in good_checkpoints(progress, checkpoints) if path not in damaged]
    kind = "last good checkpoint" if good and step_of(good[-1]) <= progress.sound else "newest checkpoint from before that"
    where = f"the {kind} is {good[-1]}" if good else "there is no checkpoint from before that"
    times = f" after {progress.roll_backs} roll-backs (guards.max_roll_backs)" if progress.roll_backs else ""
    raise TrainingError(
        f"step {progress.step}: the last {progress.skipped_in_row} steps updated nothing{times}, because a loss or gradient was "
        f"not finite, or the loss a spike (training.max_skipped); {where}. Later ones may be spoilt: to go on from it delete them, "
        "or name it with --resume and another output; a lower optimizer.lr or optimizer.grad_clip may help"
    )


def good_checkpoints(progress: Progress, checkpoints: Path) -> list[Path]:
    """Those from whose weights an update was made later, so that they give finite losses, in order. Where there is none, those from
    before the steps without an update, which may be spoilt or not."""
    found = complete(checkpoints)
    proven = [path for path in found if step_of(path) <= progress.sound]
    return proven or [path for path in found if step_of(path) <= progress.step - progress.skipped_in_row]
