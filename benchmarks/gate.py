"""The tests' attention problems, which a benchmark checks before it measures; `pip install -e '.[dev]'` brings what they need."""

from __future__ import annotations

from benchmarks.refusals import refuse

try:
    from tests.attention_cases import Case, check_kernel
except ModuleNotFoundError as missing:
    if missing.name != "hypothesis":
        raise
    refuse("benchmarks of attention check its results first, as the tests do: pip install -e '.[dev]'")

__all__ = ["Case", "check_kernel"]
