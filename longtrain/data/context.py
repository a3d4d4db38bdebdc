"""How much real context the tokens of packed documents see."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def context_share(document_ends: npt.NDArray[np.int64], sequence_length: int) -> float:
    """Share of the packed tokens that see more than T / 4 earlier ones: their position in sequence and document exceeds T / 4.

    document_ends: int64, increasing, the last is the number of tokens. 0 where not one sequence is full.
    """
    stop = int(document_ends[-1]) // sequence_length * sequence_length
    if not stop:
        return 0.0
    cuts = np.union1d(document_ends[document_ends < stop], np.arange(0, stop + 1, sequence_length))
    beyond = np.diff(cuts) - (sequence_length // 4 + 1)
    return float(np.maximum(beyond, 0).sum() / stop)


def context_warning(share: float, sequence_length: int) -> str | None:
    """What to tell the user where most tokens see less than T / 4 of real context, else None."""
    if share > 0.5:
        return None
    return (
        f"only {share:.0%} of the tokens see more than {sequence_length // 4} tokens of their own document at sequence length "
        f"{sequence_length}: most of the attention is cut at document borders; use longer documents or shorter sequences"
    )
