"""docs/performance.md says what the files of benchmarks/results say."""

from __future__ import annotations

from benchmarks.page import PAGE, page


def test_the_page_is_made_from_the_results() -> None:
    text = PAGE.read_text()
    assert page(text) == text, "run: python -m benchmarks.page"
