"""The plot and the summary of a run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from longtrain.evaluate.plot import loss_figure, plot_loss
from longtrain.evaluate.report import summary


def row(step: int, loss: float | None, eval_loss: float | None = None, **more: Any) -> dict[str, Any]:
    usual = {"tokens": 1_000_000 * step, "tokens_per_second": 10.0 * step, "mfu_causal": None, "mfu_full": None, "memory_gib": 0.5}
    return {"step": step, "loss": loss, "eval_loss": eval_loss, **usual, **more}


ROWS = [row(1, 4.0), row(2, 3.0, 3.5), row(3, None), row(4, 2.0, 2.5)]


def curves(rows: list[dict[str, Any]]) -> dict[str, tuple[list[float], list[float]]]:
    axes = loss_figure(rows, "a-run").axes[0]
    assert axes.get_title() == "a-run"
    assert axes.get_legend() is not None
    return {str(line.get_label()): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}  # type: ignore[arg-type]


def test_curves_hold_the_reports() -> None:
    shown = curves(ROWS)
    assert shown["training, as reported"] == ([1.0, 2.0, 4.0], [4.0, 3.0, 2.0])
    assert shown["held-out text"] == ([2.0, 4.0], [3.5, 2.5])
    x, smooth = shown["training, smoothed"]
    assert x == [1.0, 2.0, 4.0]
    weights = [0.81, 0.9, 1.0]
    assert smooth[0] == pytest.approx(4.0)
    assert smooth[2] == pytest.approx(sum(w * y for w, y in zip(weights, (4.0, 3.0, 2.0), strict=True)) / sum(weights))


def test_smoothing_keeps_a_constant() -> None:
    assert curves([row(step, 3.0) for step in range(1, 40)])["training, smoothed"][1] == pytest.approx([3.0] * 39)


def test_no_held_out_curve_without_evaluation() -> None:
    assert "held-out text" not in curves([row(1, 4.0), row(2, 3.0)])


def test_one_report_is_visible() -> None:
    assert loss_figure([row(1, 4.0)], "one").axes[0].lines[0].get_marker() == "o"


@pytest.mark.parametrize("rows", [ROWS, ROWS[:1], [row(1, None)]], ids=["many", "one", "none"])
def test_file_is_a_png(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    plot_loss(rows, "a-run", tmp_path / "loss.png")
    plot_loss(rows, "a-run", tmp_path / "loss.png")
    content = (tmp_path / "loss.png").read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert b"IEND" in content[-12:]
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]


def test_summary() -> None:
    lines = dict(summary(ROWS))
    assert lines == {
        "steps": "4, 4,000,000 tokens",
        "training loss": "4.000 at step 1 -> 2.000 at step 4 (-50%)",
        "held-out loss": "3.500 at step 2 -> 2.500 at step 4 (-29%)",
        "tokens/s": "25 over all ranks (median step)",
        "memory": "0.50 GiB on the main rank",
    }


def test_summary_tells_mfu_where_it_was_measured() -> None:
    rows = [row(1, 4.0), row(2, 3.0, mfu_causal=0.4, mfu_full=0.5), row(3, 3.0, mfu_causal=0.42, mfu_full=0.54)]
    assert dict(summary(rows))["MFU"] == "41.0% causal, 52.0% full square (median step)"


def test_summary_of_little() -> None:
    assert dict(summary([row(1, 4.0)]))["training loss"] == "4.000 at step 1"
    assert "training loss" not in dict(summary([row(1, None)]))
    assert dict(summary([row(1, 0.0), row(2, 1.0)]))["training loss"] == "0.000 at step 1 -> 1.000 at step 2"
    assert not any("nan" in value for _, value in summary([row(1, None), row(2, math.e)]))
