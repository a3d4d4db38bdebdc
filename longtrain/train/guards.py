"""What keeps one bad batch from spoiling a run, and a spoilt run from going on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from longtrain.errors import TrainingError
from longtrain.train.checkpoint_folder import STEP_FOLDER, complete
from longtrain.train.state import Progress


def poison_if_broken(loss_sum: Tensor, earlier: Sequence[Tensor]) -> Tensor:
    """`loss_sum`, with NaN as its gradient where it, or one of this step's `earlier` micro batches, is not finite.

    For the last micro batch of a step. A loss can be infinite and its gradients finite; this way the engine sees it in the
    gradients, whose overflow it looks for on all ranks anyway: no collective more, and nothing waits for the device.
    """
    total = sum(earlier, start=loss_sum.detach())
    return loss_sum * torch.where(total.isfinite(), 1.0, float("nan")).to(loss_sum.dtype)


def check_skips(progress: Progress, most: int, checkpoints: Path) -> None:
    """Raises TrainingError, the same on every rank, after `most` steps in a row without an update.

    It names the newest checkpoint of which a later step has shown that its weights give finite losses.
    """
    if progress.skipped_in_row < most:
        return
    healthy = progress.step - progress.skipped_in_row
    good = [path for path in complete(checkpoints) if _step(path) < healthy]
    where = f"the last good checkpoint is {good[-1]}" if good else "there is no checkpoint from before that"
    raise TrainingError(
        f"step {progress.step}: the last {progress.skipped_in_row} steps updated nothing, because a loss or gradient was not "
        f"finite (training.max_skipped); {where}. Later ones may be spoilt: to go on from it delete them, or name it with --resume "
        "and another output; a lower optimizer.lr or optimizer.grad_clip may help"
    )


def _step(path: Path) -> int:
    match = STEP_FOLDER.fullmatch(path.name)
    return int(match[1]) if match else 0
