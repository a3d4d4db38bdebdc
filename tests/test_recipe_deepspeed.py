"""Keys of DeepSpeed's own that only tell of a training leave it as it is, to the last bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from longtrain.recipe.zero import RAW_KEYS
from tests.recipe_runs import outcome

pytest_plugins = ("tests.recipe_desk",)

TELLING = (
    "zero.deepspeed={wall_clock_breakdown: true, steps_per_print: 1, log_level: info, dump_state: true, "
    "disable_python_gc: true, timers: {throughput: {enabled: true, synchronized: false}}, "
    "comms_logger: {enabled: true, verbose: true, prof_all: false, prof_ops: [all_reduce], debug: false}, "
    "flops_profiler: {enabled: true, profile_step: 2, module_depth: 1, top_modules: 2, detailed: true, recompute_fwd_factor: 1.0, "
    "output_file: flops.txt}}"
)


def test_all_of_them_are_tried() -> None:
    words = TELLING.replace("{", " ").replace(":", " ").split()
    # memory_breakdown collects garbage at every turn, for a minute
    told = {name for name in RAW_KEYS if not name.startswith("zero_optimization")} - {"memory_breakdown"}
    assert all(name.rpartition(".")[2] in words for name in told)


@pytest.mark.usefixtures("recipe_desk")
@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.faults), 3])
def test_training_is_the_same(stage: int, capsys: pytest.CaptureFixture[str]) -> None:
    more = (f"zero.stage={stage}", "training.micro_batch_size=1")
    plain, told = outcome(more), outcome((*more, TELLING))
    assert (told.losses, told.gradients, told.weights) == (plain.losses, plain.gradients, plain.weights)
    assert "DeepSpeed Flops Profiler" in Path("flops.txt").read_text()
    Path("flops.txt").unlink()
    assert "time (ms) | fwd" in capsys.readouterr().out
