"""How far a run has come."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """Since the start of the run: optimizer steps done, tokens trained on, sequences consumed (the data cursor), steps that
    updated nothing because a loss or gradient was not finite, and how many of these were the last ones."""

    step: int = 0
    tokens: int = 0
    sequences: int = 0
    skipped: int = 0
    skipped_in_row: int = 0

    def after_step(self, sequences: int, sequence_length: int, *, skipped: bool = False) -> Progress:
        return Progress(
            self.step + 1,
            self.tokens + sequences * sequence_length,
            self.sequences + sequences,
            self.skipped + skipped,
            self.skipped_in_row + 1 if skipped else 0,
        )
