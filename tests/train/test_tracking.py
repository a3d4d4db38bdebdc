from __future__ import annotations

import io
import json
import math
import resource
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from longtrain.errors import CheckpointError
from longtrain.evaluate.report import summary as run_summary
from longtrain.models.flops import Flops
from longtrain.train.metrics import Metrics, peak_memory_gib, scalars, utilisation
from longtrain.train.tracking import (
    METRICS_FILE,
    Background,
    JsonLines,
    Redrawn,
    Terminal,
    Tracker,
    Trackers,
    read_metrics,
    short_summary,
    summary,
)

REPORT = Metrics(
    step=1,
    loss=2.5,
    eval_loss=None,
    lr=1e-3,
    grad_norm=0.5,
    tokens=100,
    tokens_per_second=2000.0,
    tokens_per_second_per_rank=1000.0,
    step_seconds=0.05,
    mfu_causal=None,
    mfu_full=None,
    memory_gib=0.25,
)


def reports(count: int) -> list[Metrics]:
    return [replace(REPORT, step=step, tokens=100 * step) for step in range(1, count + 1)]


def test_json_lines_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = JsonLines(path, 0)
    for metrics in reports(3):
        lines.log(metrics)
        assert read_metrics(path)[-1] == asdict(metrics), "on disk as soon as it is reported"
    lines.say("a remark is no report")
    lines.close()
    assert read_metrics(path) == [asdict(metrics) for metrics in reports(3)]


def test_numbers_that_json_lacks_become_null(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = JsonLines(path, 0)
    lines.log(replace(REPORT, loss=math.nan, grad_norm=math.inf))
    lines.close()

    def refuse(name: str) -> None:
        raise AssertionError(name)

    row = json.loads(path.read_text(), parse_constant=refuse)
    assert (row["loss"], row["grad_norm"], row["lr"]) == (None, None, 1e-3)


@pytest.mark.parametrize("torn", [b"", b'{"step": 4, "lo', b'{"step": 4}\xff\xfe'])
def test_resume_drops_what_will_be_done_again_and_a_torn_line(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    first = JsonLines(path, 0)
    for metrics in reports(3):
        first.log(metrics)
    first.close()
    with path.open("ab") as file:
        file.write(torn)
    resumed = JsonLines(path, 2)
    resumed.log(replace(REPORT, step=3, loss=9.0))
    resumed.close()
    assert [(row["step"], row["loss"]) for row in read_metrics(path)] == [(1, 2.5), (2, 2.5), (3, 9.0)]
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


def written(**changes: object) -> str:
    """The line of a report with other values."""
    return json.dumps(asdict(REPORT) | changes) + "\n"


FOREIGN = {
    "text": "no report\n{}\n",
    "nothing": "{}\n",
    "too little": '{"step": 1}\n',
    "a list": "[1]\n",
    "a number": "3\n",
    "nested too deep": 100_000 * "[" + "\n",
    "no step": written(step=None),
    "part of a step": written(step=1.5),
    "a loss in words": written(loss="2.5"),
    "spans in words": written(eval_by_position="none"),
    "a span of five": written(eval_by_position=[[0, 15, 3, 5, 4]]),
    "a span without an end": written(eval_by_position=[[0, None, 3.5, 4]]),
}


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN)
def test_foreign_metrics_are_refused_and_a_run_sets_them_aside(tmp_path: Path, content: str) -> None:
    path, said = tmp_path / METRICS_FILE, list[str]()
    path.write_text(content)
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl:1: is no report of a run") as refused:
        read_metrics(path)
    lines = JsonLines(path, 1, said.append)
    lines.log(replace(REPORT, step=2))
    lines.close()
    assert said == [f"WARNING: {refused.value}. It is now metrics.jsonl.damaged, and reports go on in a new file"]
    assert [row["step"] for row in read_metrics(path)] == [2]
    assert (tmp_path / "metrics.jsonl.damaged").read_text() == content


def test_one_flipped_bit_never_ends_a_run(tmp_path: Path) -> None:
    path, said = tmp_path / METRICS_FILE, list[str]()
    spans = ((0, 15, 3.5, 4), (16, 31, 2.5, 4))
    whole = "".join(json.dumps(asdict(replace(REPORT, step=step, eval_by_position=spans))) + "\n" for step in (1, 2)).encode()
    # every eleventh: with all of them none fails either
    for bit in range(0, 8 * len(whole), 11):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        JsonLines(path, 2, said.append).close()
        rows = read_metrics(path)
        aside = list(tmp_path.glob("*.damaged"))
        assert (len(aside), bool(rows)) in ((0, True), (1, False)), "what it had is there, or it was set aside"
        if rows:
            run_summary(rows)
        for file in aside:
            assert file.read_bytes() == flipped
            file.unlink()


def test_steps_out_of_order_are_refused(tmp_path: Path) -> None:
    path = tmp_path / METRICS_FILE
    path.write_text(written(step=1) + written(step=7) + written(step=3))
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl:3: .* not of a later step than the line before"):
        read_metrics(path)


def test_going_back_sets_a_damaged_file_aside(tmp_path: Path) -> None:
    path, said = tmp_path / METRICS_FILE, list[str]()
    lines = JsonLines(path, 0, said.append)
    for report in reports(3):
        lines.log(report)
    damaged = path.read_bytes().replace(b"loss", b"lozs", 1)
    path.write_bytes(damaged)
    lines.go_back(2)
    lines.log(replace(REPORT, step=3, loss=9.0))
    lines.close()
    assert [text.split(":")[:3] for text in said] == [["WARNING", f" {path}", "1"]]
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == damaged
    assert [(row["step"], row["loss"]) for row in read_metrics(path)] == [(3, 9.0)]


def test_no_file_is_no_report(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def said(*, terminal: bool, width: int = 80) -> str:
    stream = io.StringIO()
    tracker = Terminal(Console(file=stream, force_terminal=terminal, width=width), steps=3, done=0)
    for metrics in reports(2):
        tracker.log(metrics)
    tracker.log(replace(REPORT, step=3, eval_loss=2.25, loss=2.125))
    tracker.say("saved [bold]somewhere[/bold] " + "far/" * 30)
    tracker.close()
    return stream.getvalue()


def test_log_has_one_plain_line_a_report() -> None:
    lines = said(terminal=False).splitlines()
    assert [line.split("  ")[0] for line in lines[:3]] == ["step 1/3", "step 2/3", "step 3/3"]
    assert "loss 2.1250  held-out 2.2500  lr 1.00e-03  grad 0.50  2,000 tokens/s  (1,000 a rank)  0.2 GiB" in lines[2]
    assert lines[3] == "saved [bold]somewhere[/bold] " + "far/" * 30, "no markup, no line breaks"
    assert "\x1b" not in "".join(lines)


def test_terminal_has_a_bar_of_one_line() -> None:
    text = said(terminal=True)
    assert "3/3" in text
    assert "loss 2.1250  2,000 tokens/s" in text
    assert "…" not in text, "cut off on 80 columns"
    assert "held-out 2.2500" in text
    assert text.rstrip().endswith("\x1b[?25h"), "the cursor is back"


def test_the_bar_of_a_long_run_fits_a_terminal() -> None:
    stream = io.StringIO()
    tracker = Terminal(Console(file=stream, force_terminal=True, width=80), steps=20_000, done=0)
    tracker.log(replace(REPORT, step=12_345, loss=12.5, tokens_per_second=1_234_567.0, mfu_causal=0.421, mfu_full=0.587))
    tracker.close()
    assert "12345/20000" in stream.getvalue()
    assert "loss 12.5000  1,234,567 tokens/s  MFU 42.1%" in stream.getvalue()
    assert "…" not in stream.getvalue()


def test_summaries() -> None:
    measured = replace(REPORT, mfu_causal=0.421, mfu_full=0.587)
    assert summary(measured).endswith("MFU 42.1% causal 58.7% full  0.2 GiB")
    assert short_summary(measured) == "loss 2.5000  2,000 tokens/s  MFU 42.1%"
    for norm in (math.inf, math.nan):
        assert "lr 1.00e-03  grad -  2,000 tokens/s" in summary(replace(REPORT, grad_norm=norm)), (
            "of a skipped step it is not known"
        )
    assert "a rank" not in summary(replace(REPORT, tokens_per_second_per_rank=2000.0))


def test_trackers_reach_all_of_them() -> None:
    heard: list[str] = []

    class Recorder:
        def log(self, metrics: Metrics) -> None:
            heard.append(f"log {metrics.step}")

        def say(self, text: str) -> None:
            heard.append(f"say {text}")

        def close(self) -> None:
            heard.append("close")

    trackers = Trackers([Recorder(), Recorder()])
    trackers.log(REPORT)
    trackers.say("x")
    trackers.close()
    assert heard == ["log 1", "log 1", "say x", "say x", "close", "close"]
    Trackers().log(REPORT)


def test_utilisation() -> None:
    assert utilisation(Flops(causal=100, full=200), 2.0, 5, 10.0) == (1.0, 2.0)
    assert utilisation(Flops(causal=100, full=200), 2.0, 5, None) == (None, None)


def test_peak_memory_of_a_process() -> None:
    held = torch.zeros(2**28, dtype=torch.uint8)  # 0.25 GiB
    assert 0.25 < peak_memory_gib(held.device) < 64


class Heard(Tracker):
    """Writes down what it is told; `gate` holds it up."""

    def __init__(self, gate: threading.Event) -> None:
        self.gate, self.steps = gate, list[int]()
        self.closed = False

    def log(self, metrics: Metrics) -> None:
        self.gate.wait(20)
        self.steps.append(metrics.step)

    def close(self) -> None:
        self.closed = True


def test_background_tells_everything_in_order() -> None:
    gate, said = threading.Event(), list[str]()
    heard = Heard(gate)
    tracker = Background("it", lambda: heard, said.append)
    for metrics in reports(5):
        tracker.log(metrics)
    tracker.say("a remark")
    tracker.keep([])
    assert heard.steps == []
    gate.set()
    tracker.close()
    assert (heard.steps, heard.closed, said) == ([1, 2, 3, 4, 5], True, [])


def test_background_does_not_wait_for_what_hangs() -> None:
    gate, said = threading.Event(), list[str]()
    tracker = Background("it", lambda: Heard(gate), said.append, patience=0.05)
    tracker.log(REPORT)
    begin = time.monotonic()
    tracker.close()
    assert time.monotonic() - begin < 5
    assert said == [f"WARNING: it did not finish within 0 s; training is not affected, and {METRICS_FILE} holds every report"]
    gate.set()


def test_background_holds_no_more_than_it_was_given_room_for() -> None:
    gate, said = threading.Event(), list[str]()
    heard = Heard(gate)
    tracker = Background("it", lambda: heard, said.append, waiting=3)
    for metrics in reports(50):
        tracker.log(metrics)
    assert [text.split(";")[0] for text in said] == ["WARNING: it does not keep up, and misses reports from here on"]
    gate.set()


def test_background_that_cannot_begin_is_one_line() -> None:
    said: list[str] = []

    def fail() -> Tracker:
        raise ImportError("no such module\nmore")

    tracker = Background("it", fail, said.append)
    tracker.close()
    tracker.log(REPORT)
    assert [text.split(";")[0] for text in said] == ["WARNING: it failed (ImportError: no such module) and gets nothing more"]


def test_plots_take_a_hundredth_of_the_time() -> None:
    now, drawn = [0.0], list[float]()

    def draw() -> None:
        drawn.append(now[0])
        now[0] += 2.0

    tracker = Redrawn(draw, lambda: now[0])
    for step in range(100):
        now[0] = max(now[0], 10.0 * step)
        tracker.log(REPORT)
    assert drawn == [60.0, 270.0, 480.0, 690.0, 900.0]


def test_scalars_are_finite_numbers() -> None:
    spans = [(0, 15, 3.0, 4), (16, 31, math.nan, 4)]
    found = scalars(replace(REPORT, loss=math.nan, eval_loss=2.0, eval_by_position=spans))
    assert found["eval_by_position/0000000-0000015"] == 3.0
    assert found["eval_loss"] == 2.0
    assert not {"loss", "mfu_full", "eval_by_position/0000016-0000031"} & found.keys()


def test_spans_in_metrics(tmp_path: Path) -> None:
    path = tmp_path / METRICS_FILE
    lines = JsonLines(path, 0)
    lines.log(replace(REPORT, eval_loss=2.0, eval_by_position=((0, 15, 3.0, 4), (16, 31, math.nan, 4))))
    lines.close()
    assert read_metrics(path)[0]["eval_by_position"] == [[0, 15, 3.0, 4], [16, 31, None, 4]]


def test_metrics_of_an_older_version_are_read(tmp_path: Path) -> None:
    row = asdict(REPORT)
    del row["eval_by_position"]
    path = tmp_path / METRICS_FILE
    path.write_text(json.dumps(row) + "\n")
    assert read_metrics(path) == [row]


@pytest.fixture
def room() -> Iterator[Callable[[int | None], None]]:
    """Sets how many bytes a file of this process may have, None for any number: more is refused, in the middle of a line."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size: int | None) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before[0] if size is None else size, before[1]))

    yield limit
    limit(None)


def test_reports_wait_for_a_disk_that_is_full(tmp_path: Path, room: Callable[[int | None], None]) -> None:
    path, said = tmp_path / METRICS_FILE, list[str]()
    lines = JsonLines(path, 0, said.append)
    many = reports(9)
    for _ in range(2):
        lines.log(many.pop(0))
    room(path.stat().st_size + 50)
    for _ in range(3):
        lines.log(many.pop(0))
    assert [row["step"] for row in read_metrics(path)] == [1, 2]
    assert path.read_bytes().endswith(b"}\n"), "nothing torn"
    room(None)
    lines.say("a checkpoint is saved")
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3, 4, 5]
    reason = "training goes on, and its reports from step 3 on wait in memory until they can be written"
    assert said == [
        f"WARNING: {path}: File too large: {reason}",
        f"{path} can be written again: it has the reports of steps 3 to 5",
    ]
    for report in many:
        lines.log(report)
    lines.close()
    assert read_metrics(path) == [asdict(report) for report in reports(9)]
    assert len(said) == 2


def test_reports_that_are_lost_are_told(tmp_path: Path, room: Callable[[int | None], None]) -> None:
    path, said = tmp_path / METRICS_FILE, list[str]()
    lines = JsonLines(path, 0, said.append, waiting=3)
    first, *rest = reports(6)
    lines.log(first)
    room(path.stat().st_size)
    for report in rest:
        lines.log(report)
    lines.close()
    assert said[1:] == [f"ERROR: {path}: File too large: the reports of steps 2 to 6 are lost"]
    lines = JsonLines(path, 1, said.append, waiting=3)
    for report in rest:
        lines.log(report)
    room(None)
    lines.close()
    assert [row["step"] for row in read_metrics(path)] == [1, 4, 5, 6], "no more than three wait"
    assert said[-1] == f"ERROR: {path}: the reports of steps 2 to 3 are lost"


def test_going_back_needs_no_room(tmp_path: Path, room: Callable[[int | None], None]) -> None:
    path, said = tmp_path / METRICS_FILE, list[str]()
    lines = JsonLines(path, 0, said.append)
    for report in reports(4):
        lines.log(report)
    room(path.stat().st_size)
    for report in reports(6)[4:]:
        lines.log(report)
    lines.go_back(5)
    lines.go_back(2)
    lines.log(replace(REPORT, step=3, loss=9.0))
    lines.close()
    assert [(row["step"], row["loss"]) for row in read_metrics(path)] == [(1, 2.5), (2, 2.5), (3, 9.0)]
    assert said[1:] == [f"{path} can be written again"]


def test_what_a_tracker_cannot_write_ends_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Full(Tracker):
        def log(self, metrics: Metrics) -> None:
            raise OSError(28, "No space left on device")

        def close(self) -> None:
            raise OSError(28, "No space left on device")

    path = tmp_path / METRICS_FILE
    trackers = Trackers([Full(), JsonLines(path, 0)])
    for report in reports(2):
        trackers.log(report)
    trackers.close()
    assert [row["step"] for row in read_metrics(path)] == [1, 2]
    assert capsys.readouterr().err == "WARNING: Full cannot write: [Errno 28] No space left on device; training goes on\n"


def test_plots_that_cannot_be_drawn_end_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    def full() -> list[Path]:
        raise OSError(28, "No space left on device", "run/.loss.png.tmp")

    now = iter([0.0, 60.0, 61.0, 161.0, 162.0])
    tracker = Redrawn(full, lambda: next(now))
    for report in reports(2):
        tracker.log(report)
    said = "WARNING: the plots could not be drawn: [Errno 28] No space left on device: 'run/.loss.png.tmp'; training goes on\n"
    assert capsys.readouterr().err == said
    assert next(now, None) is None, "it is tried again"
