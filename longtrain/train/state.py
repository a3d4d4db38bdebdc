"""How far a run has come."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class RecentLosses:
    """Mean and variance of `count` losses, by which a spike is told from noise.

    The first `window` weigh the same (Welford 1962), later ones 1 / window each, so that older ones fade (West 1979). What is above
    the limit counts as if it were just at it: one spike hardly moves the mean, and a new level is accepted after a few.
    """

    count: int = 0
    mean: float = 0.0
    variance: float = 0.0

    def limit(self, deviations: float | None, window: int) -> float:
        """The loss above which a step is a spike; infinite before `window` losses, and where `deviations` is None."""
        if deviations is None or self.count < window:
            return math.inf
        return self.mean + deviations * math.sqrt(self.variance)

    def after(self, loss: float, window: int, limit: float) -> RecentLosses:
        """With one loss more; one that is not finite says nothing."""
        if not math.isfinite(loss):
            return self
        weight = 1 / min(self.count + 1, window)
        difference = min(loss, limit) - self.mean
        variance = (1 - weight) * (self.variance + weight * difference**2)
        return RecentLosses(self.count + 1, self.mean + weight * difference, variance)


@dataclass(frozen=True)
class Progress:
    """Of a run: optimizer steps done, tokens trained on, and sequences consumed (the data cursor, which a roll-back leaves where it
    is while the other two go back). Since its start: steps that updated nothing because a loss or gradient was not finite or a
    spike, how many of these were the last ones, loss spikes, and roll-backs. sound: the newest step from whose weights an update
    was made. losses: what the spike guard remembers. loss: of the newest step that had a finite one."""

    step: int = 0
    tokens: int = 0
    sequences: int = 0
    skipped: int = 0
    skipped_in_row: int = 0
    spikes: int = 0
    roll_backs: int = 0
    sound: int = 0
    losses: RecentLosses = RecentLosses()
    loss: float | None = None

    def after_step(
        self,
        sequences: int,
        sequence_length: int,
        *,
        skipped: bool = False,
        spike: bool = False,
        losses: RecentLosses | None = None,
        loss: float = math.nan,
    ) -> Progress:
        return Progress(
            self.step + 1,
            self.tokens + sequences * sequence_length,
            self.sequences + sequences,
            self.skipped + skipped,
            self.skipped_in_row + 1 if skipped else 0,
            self.spikes + spike,
            self.roll_backs,
            self.sound if skipped else self.step,
            losses or self.losses,
            loss if math.isfinite(loss) else self.loss,
        )
