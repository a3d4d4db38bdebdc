"""Runs on GPUs over NCCL, in fp16 and bf16: a bad step of one rank changes nothing on any, and a stop in between changes no bit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from longtrain.parallel.context import ParallelContext
from longtrain.parallel.deepspeed import Engine
from longtrain.plan import make_plan
from longtrain.train.assemble import open_data
from longtrain.train.checkpoint_format import read_state
from longtrain.train.resume import CHECKPOINTS, choose
from longtrain.train.run import run_training
from longtrain.train.tracking import METRICS_FILE, read_metrics
from tests.distributed import run_ranks
from tests.tiny import tiny_recipe, write_corpus

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
STEPS, STOP, BAD = 6, 4, 3


def _train(ctx: ParallelContext, overrides: Sequence[str], until: int | None, bad: int | None) -> None:
    """One process of a run. bad: step (from 1) with an infinite loss on the last rank."""
    plan = make_plan(tiny_recipe(*overrides), ctx.world, ctx.device.type)
    split, _ = open_data(plan)
    start = choose(plan.recipe, split, "auto")
    ctx.all_gather_text("chosen")
    forward, steps = Engine.forward, 0

    def spoilt(engine: Engine, *arguments: Any) -> Any:
        nonlocal steps
        loss = forward(engine, *arguments)
        # the probe at the start runs forward with one tensor
        steps += len(arguments) > 1
        return loss + float("inf") if len(arguments) > 1 and steps == bad and ctx.rank == ctx.world - 1 else loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "forward", spoilt)
        run_training(plan, ctx, split, start, until=until, evaluate=None)


def _train_all(ctx: ParallelContext, runs: Sequence[tuple[list[str], str]]) -> None:
    for overrides, output in runs:
        _train(ctx, [*overrides, f"output={output}-whole"], None, BAD)
        _train(ctx, [*overrides, f"output={output}-halves"], STOP, BAD)
        _train(ctx, [*overrides, f"output={output}-halves"], None, None)


@pytest.mark.parametrize(("world", "cp"), [(1, 1), (2, 1), (2, 2)])
def test_a_bad_step_and_a_stop(tmp_path: Path, world: int, cp: int) -> None:
    if torch.cuda.device_count() < world:
        pytest.skip(f"needs {world} GPUs")
    write_corpus(tmp_path / "data", 7)
    common = [f"data.path={tmp_path / 'data'}", f"training.steps={STEPS}", "checkpoint.every=1", "checkpoint.keep=9"]
    common += ["device=cuda", f"parallel.cp={cp}", f"training.micro_batch_size={4 * cp // world}"]
    kinds = [(precision, stage) for precision in ("fp16", "bf16") for stage in (1, 2, 3)]
    runs = [
        ([*common, f"training.precision={precision}", f"zero.stage={stage}"], str(tmp_path / f"{precision}-{stage}"))
        for precision, stage in kinds
    ]
    run_ranks(_train_all, world, runs, dp=world // cp, cp=cp, device="cuda", timeout=280)
    for precision, stage in kinds:
        whole, halves = (tmp_path / f"{precision}-{stage}-{name}" for name in ("whole", "halves"))
        assert [row["skipped_steps"] for row in read_metrics(whole / METRICS_FILE)] == [0, 0, 1, 1, 1, 1]

        def parts(run: Path, step: int) -> list[bytes]:
            folder = run / CHECKPOINTS / f"step-{step:08d}"
            return [path.read_bytes() for path in sorted(folder.glob("rank-*.safetensors"))]

        assert parts(whole, BAD - 1) == parts(whole, BAD) != parts(whole, BAD + 1)
        assert parts(whole, STEPS) == parts(halves, STEPS)
        states = [read_state(run / CHECKPOINTS / f"step-{STEPS:08d}") for run in (whole, halves)]
        assert states[0].scaler == states[1].scaler
        if precision == "fp16":
            before, at = (read_state(whole / CHECKPOINTS / f"step-{step:08d}").scaler for step in (BAD - 1, BAD))
            assert before is not None
            assert at is not None
            assert at["cur_scale"] < before["cur_scale"]
