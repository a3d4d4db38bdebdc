"""The plot and the summary of a run."""

from __future__ import annotations

import math
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from longtrain.evaluate.plot import curve_figure, draw_plots, loss_figure, position_figure
from longtrain.evaluate.report import summary


def row(step: int, loss: float | None, eval_loss: float | None = None, **more: Any) -> dict[str, Any]:
    usual = {"tokens": 1_000_000 * step, "tokens_per_second": 10.0 * step, "mfu_causal": None, "mfu_full": None, "memory_gib": 0.5}
    usual["grad_norm"] = None if loss is None else 0.5
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


SPANS = [[0, 15, 4.0, 10], [16, 31, 3.5, 10], [32, 63, None, 3]]


def evaluated(count: int) -> list[dict[str, Any]]:
    return [
        row(step, 4.0, 4.0, eval_by_position=[[a, b, x and x - step / 100, n] for a, b, x, n in SPANS]) for step in range(count)
    ]


@pytest.mark.parametrize(
    ("count", "steps"), [(1, [0]), (2, [0, 1]), (3, [0, 1, 2]), (9, [0, 2, 4, 6, 8]), (100, [0, 25, 50, 74, 99])]
)
def test_loss_by_position_of_some_evaluations(count: int, steps: list[int]) -> None:
    lines = position_figure([*evaluated(count), row(count, 4.0)], "a-run").axes[0].lines
    assert [line.get_label() for line in lines] == [f"step {step}" for step in steps]
    x, y = (list(values) for values in lines[-1].get_data())  # type: ignore[arg-type]
    assert x == pytest.approx([math.sqrt(16), math.sqrt(17 * 32)])
    assert y == pytest.approx([4.0 - steps[-1] / 100, 3.5 - steps[-1] / 100])


def test_a_curve_leaves_out_what_was_not_finite() -> None:
    (line,) = curve_figure(ROWS, "grad_norm", "norm", "a-run").axes[0].lines
    assert list(line.get_xdata()) == [1.0, 2.0, 4.0]  # type: ignore[arg-type]


CURVES = ["grad_norm.png", "loss.png", "memory.png", "throughput.png"]


@pytest.mark.parametrize(
    ("rows", "files"),
    [
        (ROWS, CURVES),
        (ROWS[:1], CURVES),
        ([row(1, None)], CURVES),
        ([], []),
        (evaluated(2), sorted([*CURVES, "loss_by_position.png"])),
    ],
    ids=["many", "one", "no loss", "none", "by position"],
)
def test_files_are_png(tmp_path: Path, rows: list[dict[str, Any]], files: list[str]) -> None:
    draw_plots(rows, "a-run", tmp_path)
    assert sorted(path.name for path in draw_plots(rows, "a-run", tmp_path)) == files
    assert sorted(path.name for path in tmp_path.iterdir()) == files
    for name in files:
        content = (tmp_path / name).read_bytes()
        assert content[:8] == b"\x89PNG\r\n\x1a\n"
        assert b"IEND" in content[-12:]


def test_several_threads_may_draw_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one does while training goes on, and the main one at its end."""

    def slowly(figure: Figure, path: Path, **_: Any) -> None:
        with path.open("wb", buffering=0) as file:
            file.write(b"half")
            time.sleep(0.02)
            file.write(b"half")

    monkeypatch.setattr(Figure, "savefig", slowly)
    with ThreadPoolExecutor(4) as threads:
        drawn = [threads.submit(draw_plots, ROWS, "a-run", tmp_path) for _ in range(4)]
        assert all(sorted(path.name for path in plots.result()) == CURVES for plots in drawn)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == dict.fromkeys(CURVES, b"halfhalf")


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


def test_summary_tells_the_loss_by_position_of_the_last_evaluation() -> None:
    lines = dict(summary([*evaluated(3), row(4, 2.0)]))
    assert lines["  by position"] == "3.980 at positions 0 to 15 -> no number at positions 32 to 63"
    assert "  by position" not in dict(summary([row(1, 4.0, 4.0, eval_by_position=[[0, 15, 4.0, 9]])]))


def test_summary_of_little() -> None:
    assert dict(summary([row(1, 4.0)]))["training loss"] == "4.000 at step 1"
    assert "training loss" not in dict(summary([row(1, None)]))
    assert dict(summary([row(1, 0.0), row(2, 1.0)]))["training loss"] == "0.000 at step 1 -> 1.000 at step 2"
    assert not any("nan" in value for _, value in summary([row(1, None), row(2, math.e)]))
