"""The losses that a tiny recipe gave when they were last looked at. A refactor gives the same ones, bit for bit.

tests/golden/losses.json holds them as hexadecimal floats with the torch version and CPU capability that made them; elsewhere they
are the same within 1e-5. After a change that is meant to move them: `python -m tests.train.test_golden`, and say why in the commit.
"""

from __future__ import annotations

import io
import json
import tempfile
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch

from longtrain.parallel.context import ParallelContext
from longtrain.plan import make_plan
from longtrain.train.assemble import open_data
from longtrain.train.resume import Start
from longtrain.train.run import run_training
from longtrain.train.tracking import METRICS_FILE, read_metrics
from tests.distributed import run_ranks
from tests.tiny import tiny_recipe, write_corpus

GOLDEN = Path(__file__).parents[1] / "golden" / "losses.json"
STEPS = 20
RECIPES = {
    "one rank, tied, window": (
        1,
        1,
        ["model.tied_embeddings=true", "model.window=20", "zero.stage=0", "training.micro_batch_size=2"],
    ),
    "ring of two, ZeRO-2": (2, 2, ["parallel.cp=2", "zero.stage=2", "training.sequence_length=45", "training.activations=full"]),
}


def _train(ctx: ParallelContext, folder: str, overrides: list[str]) -> None:
    more = [f"training.steps={STEPS}", "schedule.warmup_steps=4", f"data.path={folder}/data", f"output={folder}/run"]
    plan = make_plan(tiny_recipe(*more, *overrides), ctx.world, "cpu")
    with redirect_stdout(io.StringIO()):
        run_training(plan, ctx, open_data(plan)[0], Start(None), until=None, evaluate=None)


def losses(name: str) -> list[float]:
    """Of every step of a recipe, on this machine."""
    world, cp, overrides = RECIPES[name]
    with tempfile.TemporaryDirectory() as folder:
        write_corpus(Path(folder) / "data", 30)
        run_ranks(_train, world, folder, overrides, cp=cp)
        return [row["loss"] for row in read_metrics(Path(folder) / "run" / METRICS_FILE)]


def made_by() -> dict[str, str]:
    """What decides the last bits."""
    return {"torch": torch.__version__, "cpu": torch.backends.cpu.get_cpu_capability()}


@pytest.mark.parametrize("name", RECIPES)
def test_losses_are_the_golden_ones(name: str) -> None:
    golden = json.loads(GOLDEN.read_text())
    true = [float.fromhex(text) for text in golden["losses"][name]]
    found = losses(name)
    assert len(found) == STEPS
    assert found[-1] < 0.9 * found[0], "it learns"
    if golden["made_by"] == made_by():
        assert [loss.hex() for loss in found] == golden["losses"][name]
    else:
        assert found == pytest.approx(true, rel=1e-5)


def regenerate() -> None:
    """Writes the file anew."""
    found = {name: [loss.hex() for loss in losses(name)] for name in RECIPES}
    GOLDEN.write_text(json.dumps({"made_by": made_by(), "losses": found}, indent=1) + "\n")


if __name__ == "__main__":
    # under its own name, not __main__: ranks have to find the functions they run
    from tests.train import test_golden

    test_golden.regenerate()
