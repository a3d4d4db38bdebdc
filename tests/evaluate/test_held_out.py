"""Held-out loss against a plain computation over every sequence at once."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path

import pytest
import torch

from longtrain.attention import AttentionMask, Band
from longtrain.batch import Batch
from longtrain.data.loader import held_out
from longtrain.data.packed import PackedSplit
from longtrain.evaluate.held_out import FIRST_SPAN, HeldOut, SpanLoss, held_out_loss, position_spans
from longtrain.models import Decoder
from longtrain.parallel import launch
from longtrain.parallel.context import ParallelContext
from longtrain.plan import make_plan
from longtrain.recipe.load import load_recipe
from longtrain.recipe.schema import Recipe
from longtrain.train.assemble import Run, assemble, open_data
from longtrain.train.resume import Start
from longtrain.train.step import prepare_step, train_step
from tests.distributed import run_ranks
from tests.tiny import tiny_recipe, write_corpus
from tests.user import command

pytest_plugins = ("tests.desks",)
pytestmark = pytest.mark.usefixtures("fresh")


def plain_loss(model: Decoder, split: PackedSplit, rows: list[int]) -> HeldOut:
    total, count = 0.0, 0
    sums: dict[int, float] = defaultdict(float)
    counts: dict[int, int] = defaultdict(int)
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
            losses = torch.nn.functional.cross_entropy(logits[0], labels, ignore_index=-100, reduction="none").tolist()
            for loss, label, position in zip(losses, labels.tolist(), one.positions.tolist(), strict=True):
                if label != -100:
                    span = max(FIRST_SPAN, 1 << position.bit_length())
                    sums[span] += loss
                    counts[span] += 1
                    total, count = total + loss, count + 1
    spans = [SpanLoss(end // 2 if end > FIRST_SPAN else 0, end - 1, sums[end] / counts[end], counts[end]) for end in sorted(sums)]
    return HeldOut(total / count, tuple(spans))


def assert_same(found: HeldOut, wanted: HeldOut) -> None:
    assert found.loss == pytest.approx(wanted.loss, rel=1e-6)
    assert [(s.first, s.last, s.tokens) for s in found.by_position] == [(s.first, s.last, s.tokens) for s in wanted.by_position]
    assert [s.loss for s in found.by_position] == pytest.approx([s.loss for s in wanted.by_position], rel=1e-5)


def evaluated(recipe: Recipe, count: int | None = None) -> tuple[HeldOut, Run, PackedSplit]:
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
        found, run, unseen = evaluated(recipe)
        # an odd number of sequences, so that the last micro batch is filled with padding
        assert len(unseen) > 2
        model = run.engine.model
        assert isinstance(model, Decoder)
        assert_same(found, plain_loss(model, unseen, list(range(len(unseen)))))
        assert len(found.by_position) == 2
        assert found.loss > 0
        run.close()
    finally:
        launch.stop()


def test_no_trainable_token_is_nan() -> None:
    recipe = load_recipe(Path("recipe.yaml"))
    plan = make_plan(recipe, 1, "cpu")
    try:
        found, run, unseen = evaluated(recipe, 2)
        empty = [Batch(b.tokens, torch.full_like(b.labels, -100), b.positions, b.segment_ids, b.boundaries) for b in held_out(
            unseen, 2, micro_batch_size=2, dp=1, dp_rank=0
        )]  # fmt: skip
        assert not math.isnan(found.loss)
        for nothing in (empty, []):
            none = held_out_loss(run.engine, plan, run.ctx, nothing)
            assert math.isnan(none.loss)
            assert none.by_position == ()
        run.close()
    finally:
        launch.stop()


@pytest.mark.parametrize(
    ("length", "ends"), [(2, [2]), (16, [16]), (17, [16, 17]), (48, [16, 32, 48]), (512, [16, 32, 64, 128, 256, 512])]
)
def test_spans_double(length: int, ends: list[int]) -> None:
    spans = position_spans(length)
    assert [span.stop for span in spans] == ends
    assert [position for span in spans for position in span] == list(range(length))


def _ring_evaluation(ctx: ParallelContext, folder: str, overrides: list[str]) -> tuple[HeldOut, HeldOut, bool]:
    """Before and after two steps of training, and whether those steps went as without an evaluation."""
    recipe = tiny_recipe(f"data.path={folder}/corpus", f"output={folder}/run", "evaluation.every=1", *overrides)
    plan = make_plan(recipe, ctx.world, "cpu")
    split, unseen = open_data(plan)
    assert unseen is not None
    seen, losses = [], []
    for evaluating in (True, False):
        run = assemble(plan, ctx, split, Start(None))
        batches = held_out(unseen, len(unseen), micro_batch_size=1, dp=plan.dp, dp_rank=ctx.dp_rank)
        if evaluating:
            seen.append(held_out_loss(run.engine, plan, ctx, batches))
        losses.append(
            [train_step(run.engine, plan, ctx, prepare_step(plan, ctx, run.loader.step(step)), 1e-2).loss for step in (0, 1)]
        )
        if evaluating:
            seen.append(held_out_loss(run.engine, plan, ctx, batches))
        run.close()
    return seen[0], seen[1], losses[0] == losses[1]


@pytest.mark.parametrize("layout", ["zigzag", "striped"])
@pytest.mark.parametrize("stage", [1, 3])
def test_a_ring_finds_what_one_rank_finds(tmp_path: Path, layout: str, stage: int) -> None:
    write_corpus(tmp_path / "corpus", 30)
    overrides = [f"zero.stage={stage}", f"parallel.layout={layout}"]
    ((before, after, undisturbed),) = run_ranks(_ring_evaluation, 1, str(tmp_path), overrides)
    assert [span.first for span in before.by_position] == [0, 16, 32]
    assert after.loss < before.loss
    assert undisturbed
    for found in run_ranks(_ring_evaluation, 2, str(tmp_path), [*overrides, "parallel.cp=2"], cp=2):
        assert_same(found[0], before)
        assert found[1].loss == pytest.approx(after.loss, rel=1e-5)
        assert found[2]


def test_evaluation_does_not_disturb_training() -> None:
    for output, every in (("with", "1"), ("without", "null")):
        assert (
            command("train", "--recipe", "recipe.yaml", "--set", f"output={output}", "--set", f"evaluation.every={every}").code == 0
        )
    weights = [Path(name, "checkpoints/step-00000003/rank-00000.safetensors").read_bytes() for name in ("with", "without")]
    assert weights[0] == weights[1]
