"""How far a run has come."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """Optimizer steps done, tokens trained on, and sequences consumed (the data cursor) since the start of the run."""

    step: int = 0
    tokens: int = 0
    sequences: int = 0

    def after_step(self, sequences: int, sequence_length: int) -> Progress:
        return Progress(self.step + 1, self.tokens + sequences * sequence_length, self.sequences + sequences)
