"""What a preparation wrote, in words."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from longtrain.data.context import context_share, context_warning
from longtrain.data.corpus import Skipped
from longtrain.data.manifest import Manifest

REPORTED_LENGTHS = (1024, 8192, 32768)


@dataclass(frozen=True)
class Prepared:
    """What a preparation wrote. lengths: per split int64 [documents], tokens of every document in the order of the stream.

    unknown: tokens that stand for text without one of its own.
    """

    out: Path
    manifest: Manifest
    lengths: dict[str, npt.NDArray[np.int64]]
    skipped: Skipped
    unknown: int = 0

    def report(self, sequence_length: int | None = None) -> str:
        """Lines for a person: sizes, document lengths, how much real context the tokens see, and the next command."""
        statistics = self.manifest.statistics
        vocab_size = self.manifest.tokenizer.vocab_size
        bos, eos = self.manifest.tokenizer.bos, self.manifest.tokenizer.eos
        around = f"every document is {'' if bos is None else f'token {bos}, '}its text, token {eos}"
        lines = [f"prepared {self.out}: vocabulary {vocab_size}, {self.manifest.dtype}; {around}"]
        for split, lengths in self.lengths.items():
            spread = ", ".join(f"{name} {value:.0f}" for name, value in statistics.document_length[split].items())
            documents = f"{lengths.size:,} document{'' if lengths.size == 1 else 's'}"
            lines.append(f"{split}: {documents}, {lengths.sum():,} tokens; tokens a document: {spread}")
        if text := str(self.skipped):
            lines.append(f"skipped: {text}")
        if self.unknown:
            total = sum(int(lengths.sum()) for lengths in self.lengths.values())
            lines.append(
                f"warning: {self.unknown:,} of {total:,} tokens are unknown, so the text that they stand for is lost: choose "
                "a tokenizer with byte fallback, or train one: leave --tokenizer out"
            )
        for length in [sequence_length] if sequence_length else REPORTED_LENGTHS:
            counts = ", ".join(f"{split} {int(lengths.sum()) // length:,}" for split, lengths in self.lengths.items())
            share = context_share(np.cumsum(self.lengths["train"]), length)
            lines.append(f"sequences of {length}: {counts}; {share:.1%} of the tokens see more than {length // 4} of context")
            for split, documents in self.lengths.items():
                if sequence_length and documents.sum() < length:
                    knob = "--held-out" if split != "train" else "--sequence-length or the text"
                    lines.append(f"warning: {split} has not one sequence of {length}: change {knob}")
            if sequence_length and (warning := context_warning(share, length)):
                lines.append(f"warning: {warning}")
        lines.append(f"next: a recipe with data.path {self.out} and model.vocab_size {vocab_size}, then")
        lines.append("  torchrun --nproc-per-node 1 scripts/train.py --recipe RECIPE")
        return "\n".join(lines)
