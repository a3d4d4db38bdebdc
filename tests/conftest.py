"""One thread, fixed seeds, memory that is NaN until written, and Triton's interpreter where there is no GPU."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is first imported
# fills torch.empty with NaN under deterministic algorithms, so that reading what nobody wrote fails a comparison
torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]

# the same examples every time, however slow the machine; a search with other ones is `--hypothesis-profile explore`
settings.register_profile("steady", deadline=None, derandomize=True, database=None)
settings.register_profile("explore", deadline=None, max_examples=2000)
settings.load_profile("steady")


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
