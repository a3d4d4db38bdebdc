"""What benchmarks/training.py refuses to report, and that its overrides fit the recipes."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import training
from benchmarks.long_text import documents, write
from longtrain.plan import make_plan
from longtrain.plan.describe import state_bytes
from longtrain.recipe.load import load_recipe


def rows(losses: list[float], **more: Any) -> list[dict[str, Any]]:
    rate = {
        "tokens_per_second": 10.0,
        "tokens_per_second_per_rank": 10.0,
        "step_seconds": 1.0,
        "mfu_causal": None,
        "mfu_full": None,
    }
    fixed = {"skipped_steps": 0, "memory_gib": 2.0, "tokens": 64} | rate | more
    return [{"step": step, "loss": loss} | fixed for step, loss in enumerate(losses, 1)]


FALLING = [9.0 - step / 2 for step in range(12)]


@pytest.mark.parametrize("name", training.CASES)
def test_overrides_fit_the_recipes(name: str, tmp_path: Path) -> None:
    case = training.CASES[name]
    overrides = training.common(tmp_path, tmp_path / "run", case.steps, "cuda") | case.overrides
    overrides |= {"parallel.cp": "1", "checkpoint.every": "null", "tracking.wandb": "disabled", "tracking.tensorboard": "false"}
    plan = make_plan(load_recipe(name, [f"{key}={value}" for key, value in overrides.items()]), 1, "cuda")
    assert case.steps >= 20
    assert state_bytes(plan) / 2**30 < (101 if "7b" in name else 20)


def test_figures_leave_out_the_first_steps_and_want_a_falling_loss() -> None:
    metrics = rows(FALLING)
    for row in metrics[: 3 + training.WARM]:
        row["step_seconds"] = 100.0
    found = training.figures(metrics, 12, first=3)
    assert (found["step_seconds"], found["counted_steps"], found["peak_memory_gib"]) == (1.0, 4, 2.0)
    assert found["loss_first"] > found["loss_last"]
    for broken in (rows(FALLING[::-1]), rows(FALLING[:11]), rows(FALLING, skipped_steps=1), rows([float("nan")] * 12)):
        with pytest.raises(SystemExit, match="of 12 steps"):
            training.figures(broken, 12, first=0)


def test_a_run_that_begins_anew_has_not_resumed() -> None:
    def kill() -> dict[str, Any]:
        return {"checkpoint": 5, "killed_after": 8, "losses": FALLING[:8]}

    assert training.check_resumed(kill(), rows(FALLING)) == 0.0
    other = FALLING[:5] + [loss + 0.5 for loss in FALLING[5:]]
    again = [FALLING[0] + 0.1, *FALLING[1:]]
    for metrics in (rows(other), rows(again), rows(FALLING)[1:]):
        with pytest.raises(SystemExit):
            training.check_resumed(kill(), metrics)


def test_a_line_that_is_being_written_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step"')
    assert training.read(tmp_path) == [{"step": 1}]
    assert training.read(tmp_path / "none") == []


def test_results_of_other_recipes_stay(tmp_path: Path) -> None:
    given = Namespace(out=tmp_path / "results.json")
    for name, value in (("a", 1), ("b", 2), ("a", 3)):
        training.record([{"recipe": name, "value": value, "made_by": {"device": "x", "versions": {}}}], given)
    assert [(row["recipe"], row["value"]) for row in json.loads(given.out.read_text())["rows"]] == [("b", 2), ("a", 3)]


def test_packages_become_long_documents(tmp_path: Path) -> None:
    for name in ("alpha/a.py", "alpha/deep/b.py", "alpha/tests/c.py", "beta/d.py", "test/e.py"):
        (tmp_path / "lib" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "lib" / name).write_text(f"# of {name}\n" + "x = 1\n" * 20)
    found = list(documents([tmp_path / "lib"], least=100))
    assert [text.splitlines()[0] for text in found] == ["# alpha/a.py", "# alpha/deep/b.py", "# beta/d.py"]
    assert len(list(documents([tmp_path / "lib"], least=200))) == 1, "files of one package are joined, the rest is left"
    out = write(tmp_path / "out.jsonl", 1.0, [tmp_path / "lib"], least=100)
    assert len([json.loads(line)["text"] for line in out.read_text().splitlines()]) == 3
