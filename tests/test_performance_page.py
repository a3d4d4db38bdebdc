"""docs/performance.md says what the files of benchmarks/results say."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from benchmarks.page import DEVICE, PAGE, RESULTS, page
from benchmarks.plots import attention_plot, layers_plot, loss_plot

PLOTS = {"attention": attention_plot, "layers": layers_plot, "loss": loss_plot}


def test_the_page_is_made_from_the_results() -> None:
    text = PAGE.read_text()
    assert page(text) == text, "run: python -m benchmarks.page"


@pytest.mark.parametrize("name", PLOTS)
def test_what_is_measured_has_a_picture(name: str, tmp_path: Path) -> None:
    made = shutil.copy(RESULTS / f"{name}-{DEVICE}.json", tmp_path)
    drawn = PLOTS[name](Path(made))
    assert "<svg" in drawn.read_text()
    assert f"benchmarks/results/{drawn.name}" in PAGE.read_text()
    assert (RESULTS / drawn.name).is_file()
