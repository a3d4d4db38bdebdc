"""What a plan says of data, dropout and guards where it is worth a line."""

from __future__ import annotations

from pathlib import Path

import pytest

from longtrain.plan import make_plan
from longtrain.plan.describe import describe
from longtrain.recipe.load import load_recipe
from tests.plan_cases import small, words


def test_nothing_is_said_of_what_is_as_usual() -> None:
    said = words(make_plan(small(), 1, "cpu"))
    assert not {"dropout", "loss spikes", "bad steps", "watchdog", "warning"} & said.keys()


@pytest.mark.parametrize(
    ("overrides", "what", "line"),
    [
        (["model.dropout=0.1"], "dropout", "0.1 of activations, 0 of attention weights"),
        (["model.attention_dropout=0.2"], "dropout", "0 of activations, 0.2 of attention weights"),
        (["guards.spike_deviations=null"], "loss spikes", "not looked for"),
        (["guards.on_spike=skip"], "loss spikes", "skipped, from 6 deviations above the mean of the last 100 steps"),
        (["guards.spike_deviations=4"], "loss spikes", "reported, from 4 deviations above the mean of the last 100 steps"),
        (["guards.spike_window=50"], "loss spikes", "reported, from 6 deviations above the mean of the last 50 steps"),
        (["training.max_skipped=5"], "bad steps", "after 5 steps in a row without an update the run stops"),
        (
            ["guards.on_max_skipped=roll_back"],
            "bad steps",
            "after 20 steps in a row without an update back to the last good checkpoint, 3 times at most",
        ),
        (["guards.watchdog_seconds=null"], "watchdog", "none: ranks that are stuck wait for ever"),
        (["guards.watchdog_seconds=600"], "watchdog", "ends the job after 600 seconds without a sign of life"),
    ],
)
def test_what_differs_has_a_line(overrides: list[str], what: str, line: str) -> None:
    assert words(make_plan(small(*overrides), 1, "cpu"))[what] == line


def test_a_gate_of_another_kind_is_told() -> None:
    usual, other = (words(make_plan(small(f"model.hidden_act={act}"), 1, "cpu"))["model"] for act in ("silu", "gelu"))
    assert usual.endswith(", vocabulary 50")
    assert other == f"{usual}, hidden_act gelu"


def test_missing_data_is_told_with_what_prepares_it(tmp_path: Path) -> None:
    here = tmp_path / "here"
    here.mkdir()
    assert words(make_plan(small(f"data.path={here}"), 1, "cpu"))["data"] == str(here)
    said = words(make_plan(small(f"data.path={tmp_path}/gone", "data.corpus=stdlib"), 1, "cpu"))["data"]
    assert said == (
        f"{tmp_path}/gone (not there yet; before training: python scripts/prepare_data.py --source stdlib --vocab-size 50 "
        f"--out {tmp_path}/gone --sequence-length 64)"
    )
    mixed = make_plan(small("data.path=null", f"data.sources={{{here}: 3, {tmp_path}/gone: 1}}"), 1, "cpu")
    lines = [value for what, value in describe(mixed) if what == "data"]
    assert lines[0] == f"{here}, 0.75 of the tokens"
    assert lines[1].startswith(f"{tmp_path}/gone, 0.25 of the tokens (not there yet; before training: python scripts/")


@pytest.mark.parametrize(
    ("name", "world", "seconds", "needed"),
    [
        ("llama-160m-4k", 1, "10", None),
        ("llama-160m-4k", 1, "9.5", "10"),
        ("llama-160m-4k", 1, "null", None),
        ("llama3-8b-512k", 1, "1800", None),
        ("llama3-8b-512k", 1, "1000", "1,199"),
        ("llama3-8b-512k", 16, "1000", None),
    ],
)
def test_a_watchdog_that_would_end_good_runs_is_warned_of(name: str, world: int, seconds: str, needed: str | None) -> None:
    plan = make_plan(load_recipe(name, [f"guards.watchdog_seconds={seconds}"]), world, "cuda")
    warned = [line for what, line in describe(plan) if what == "warning" and "watchdog" in line]
    message = (
        f"guards.watchdog_seconds {seconds} may end a run that is not stuck: one micro batch may take {needed} seconds; set more"
    )
    assert warned == ([message] if needed else [])
