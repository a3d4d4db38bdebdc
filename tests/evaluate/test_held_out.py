"""Held-out loss against a plain computation over every sequence at once."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from longtrain.attention import AttentionMask, Band
from longtrain.batch import Batch
from longtrain.data.loader import held_out
from longtrain.data.packed import PackedSplit
from longtrain.evaluate.held_out import held_out_loss
from longtrain.models import Decoder
from longtrain.parallel import launch
from longtrain.plan import make_plan
from longtrain.recipe.load import load_recipe
from longtrain.recipe.schema import Recipe
from longtrain.train.assemble import Run, assemble, open_data
from longtrain.train.resume import Start
from tests.user import command

pytest_plugins = ("tests.desks",)
pytestmark = pytest.mark.usefixtures("fresh")


def plain_loss(model: Decoder, split: PackedSplit, rows: list[int]) -> float:
    total, count = 0.0, 0
    with torch.no_grad():
        for row in rows:
            one = split.sequence(row)
            segments = torch.from_numpy(one.segment_ids)[None]
            logits = model(
                torch.from_numpy(one.tokens)[None],
                torch.from_numpy(one.positions)[None],
                AttentionMask(Band.causal(), segments, segments),
            )
            labels = torch.from_numpy(one.labels)
            total += float(torch.nn.functional.cross_entropy(logits[0], labels, ignore_index=-100, reduction="sum"))
            count += int((labels != -100).sum())
    return total / count


def evaluated(recipe: Recipe, count: int | None = None) -> tuple[float, Run, PackedSplit]:
    """Over `count` held-out sequences, or all."""
    plan = make_plan(recipe, 1, "cpu")
    split, unseen = open_data(plan)
    assert unseen is not None
    ctx = launch.start(launch.Launch(), device="cpu")
    run = assemble(plan, ctx, split, Start(None))
    batches = held_out(unseen, count or len(unseen), micro_batch_size=recipe.training.micro_batch_size, dp=1, dp_rank=0)
    loss = held_out_loss(run.engine, plan, ctx, batches)
    assert run.engine.model.training, "training goes on afterwards"
    return loss, run, unseen


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_equals_plain_computation(stage: int) -> None:
    recipe = load_recipe(Path("recipe.yaml"), [f"zero.stage={stage}", "training.batch_size=4"])
    try:
        loss, run, unseen = evaluated(recipe)
        # an odd number of sequences, so that the last micro batch is filled with padding
        assert len(unseen) > 2
        model = run.engine.model
        assert isinstance(model, Decoder)
        assert loss == pytest.approx(plain_loss(model, unseen, list(range(len(unseen)))), rel=1e-6)
        assert loss > 0
        run.close()
    finally:
        launch.stop()


def test_no_trainable_token_is_nan() -> None:
    recipe = load_recipe(Path("recipe.yaml"))
    plan = make_plan(recipe, 1, "cpu")
    try:
        loss, run, unseen = evaluated(recipe, 2)
        empty = [Batch(b.tokens, torch.full_like(b.labels, -100), b.positions, b.segment_ids, b.boundaries) for b in held_out(
            unseen, 2, micro_batch_size=2, dp=1, dp_rank=0
        )]  # fmt: skip
        assert not math.isnan(loss)
        assert math.isnan(held_out_loss(run.engine, plan, run.ctx, empty))
        assert math.isnan(held_out_loss(run.engine, plan, run.ctx, []))
        run.close()
    finally:
        launch.stop()


def test_evaluation_does_not_disturb_training() -> None:
    for output, every in (("with", "1"), ("without", "null")):
        assert (
            command("train", "--recipe", "recipe.yaml", "--set", f"output={output}", "--set", f"evaluation.every={every}").code == 0
        )
    weights = [Path(name, "checkpoints/step-00000003/rank-00000.safetensors").read_bytes() for name in ("with", "without")]
    assert weights[0] == weights[1]
