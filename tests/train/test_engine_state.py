"""What a checkpoint must bring back into an engine beside master weights: each left out once, which must be seen."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from longtrain.errors import CheckpointError
from longtrain.parallel import deepspeed
from longtrain.parallel.context import ParallelContext
from longtrain.parallel.deepspeed import MOMENTS, SCALER_FIELDS, Engine
from longtrain.train.checkpoint import load, save
from tests.distributed import run_ranks
from tests.one_rank import make_state
from tests.toy import digest, loss_of, make_engine, owned, train

FP32 = [{"stage": 0}, {"stage": 3}]
PLACES = [(1, "none"), (2, "cpu"), (3, "none"), (3, "cpu")]
LOW: list[dict[str, Any]] = [{"stage": stage, "precision": "bf16", "offload": offload} for stage, offload in PLACES]
WORLDS = pytest.mark.parametrize("world", [2, pytest.param(1, marks=pytest.mark.faults)])
FP16 = [{**case, "precision": "fp16"} for case in LOW]


def _masters(engine: Engine) -> list[Any]:
    return [(name, start, tensors["master"]) for name, start, tensors in owned(engine)]


def _allow_fp16() -> None:
    """DeepSpeed refuses it on CPUs, where torch has long been able to compute in it."""
    from deepspeed.accelerator import get_accelerator

    type(get_accelerator()).is_fp16_supported = lambda self: True  # type: ignore[method-assign]


def _before_the_first_step(ctx: ParallelContext, base: str) -> list[dict[str, Any]]:
    seen = []
    for number, case in enumerate(FP32 + LOW):
        folder, engine = Path(base) / f"{ctx.world}-{number}", make_engine(ctx, **case)
        kinds = {key for piece in engine.owned_ranges() for key in piece.tensors}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Engine, "create_moments", lambda self: None)
            with pytest.raises((CheckpointError, KeyError)):
                save(folder, engine, make_state(0), keep=1)
        masters, loss = _masters(engine), loss_of(engine)
        save(folder, engine, make_state(0), keep=1)
        moments = [piece.tensors[key] for piece in engine.owned_ranges() for key in MOMENTS]
        fact = {
            "none before": kinds == {"master"},
            "zero after": bool(moments) and not any(bool(values.any()) for values in moments),
            "no step": set(engine.adam_steps().values()) == {0},
            "weights as they were": (_masters(engine), loss_of(engine)) == (masters, loss),
        }
        train(engine, range(3))
        saved = digest(engine)
        engine.close()
        for how in ("straight", "loaded"):
            engine = make_engine(ctx, **case)
            if how == "loaded":
                load(folder, engine)
            train(engine, range(3))
            fact[how] = digest(engine) == saved
            engine.close()
        seen.append(fact)
    return seen


@WORLDS
def test_moments_that_do_not_exist_yet(tmp_path: Path, world: int) -> None:
    """A checkpoint of step 0 is one of zero moments; making them moves nothing, at any stage, with offload or without."""
    for rank in run_ranks(_before_the_first_step, world, str(tmp_path)):
        for case, fact in zip(FP32 + LOW, rank, strict=True):
            assert all(fact.values()), (case, fact)


def _stale(engine: Engine) -> int:
    """Elements that this rank owns of which the model's weight is not the rounded master weight."""
    parameters, count = dict(engine.model.named_parameters()), 0
    for piece in engine.owned_ranges():
        parameter: Any = parameters[piece.name]
        # at stage 3 there is this rank's shard only
        shard = parameter.ds_tensor.flatten() if engine.stage == 3 else parameter.detach().flatten()[piece.start :]
        count += int((shard[: piece.numel] != piece.tensors["master"].to(shard.dtype)).sum())
    return count


def _rewritten(ctx: ParallelContext, base: str) -> list[tuple[int, bool, int]]:
    seen = []
    for number, case in enumerate(LOW):
        folder, engine = Path(base) / str(number), make_engine(ctx, **case)
        train(engine, range(3))
        save(folder, engine, make_state(3), keep=1)
        loss = loss_of(engine)
        engine.close()
        counts = []
        for refresh in (Engine.refresh_weights, lambda self: None):
            engine = make_engine(ctx, **case)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Engine, "refresh_weights", refresh)
                load(folder, engine)
            counts.append((_stale(engine), loss_of(engine) == loss))
            engine.close()
        seen.append((counts[0][0], counts[0][1] and not counts[1][1], counts[1][0]))
    return seen


@WORLDS
def test_low_precision_weights_are_rewritten_from_the_master(tmp_path: Path, world: int) -> None:
    for rank in run_ranks(_rewritten, world, str(tmp_path)):
        for case, (stale, computes, control) in zip(LOW, rank, strict=True):
            assert (stale, computes) == (0, True), case
            assert control > 20, f"{case}: the weights of a new engine must differ"


def _poison(step: int) -> float:
    """Overflows at every third step, so that the scale falls while the window would let it rise."""
    return float("inf") if step % 3 == 2 else 1.0


def _restored(ctx: ParallelContext, base: str) -> list[dict[str, Any]]:
    """fp16, 4 steps of which one overflows, then 4 more: straight, loaded, and loaded without one thing."""
    _allow_fp16()
    seen = []

    def go_on(case: dict[str, Any], folder: Path, spoil: Callable[[Engine], None]) -> tuple[Any, ...]:
        engine = make_engine(ctx, **case)
        load(folder, engine)
        before = engine.scaler_state()
        spoil(engine)
        train(engine, range(4, 8), _poison)
        found = before, engine.scaler_state(), digest(engine)
        engine.close()
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deepspeed, "SCALE_WINDOW", 3)
        for number, case in enumerate(FP16):
            folder, engine = Path(base) / str(number), make_engine(ctx, **case)
            first = engine.scaler_state() or {}
            taken = sum(not result.skipped for result in train(engine, range(4), _poison))
            save(folder, engine, make_state(4), keep=1)
            middle, counted = engine.scaler_state(), set(engine.adam_steps().values()) == {taken}
            train(engine, range(4, 8), _poison)
            end = middle, engine.scaler_state(), digest(engine)
            engine.close()
            seen.append(
                {
                    "counted": counted and 0 < taken < 4,
                    "first": first,
                    "middle": middle,
                    "loaded": go_on(case, folder, lambda engine: None) == end,
                    "without the scaler": go_on(case, folder, partial(Engine.set_scaler_state, state=first))[1] == end[1],
                    "without Adam's step": go_on(case, folder, _forget_steps)[2] == end[2],
                }
            )
    return seen


def _forget_steps(engine: Engine) -> None:
    engine.set_adam_steps(dict.fromkeys(engine.parameters(), 0))


@WORLDS
def test_the_step_of_adam_and_the_loss_scale_come_back(tmp_path: Path, world: int) -> None:
    for rank in run_ranks(_restored, world, str(tmp_path)):
        for case, fact in zip(FP16, rank, strict=True):
            assert fact["counted"], "a step that overflows is none of Adam's"
            assert set(fact["middle"]) == set(SCALER_FIELDS)
            assert all(fact["middle"][field] != fact["first"][field] for field in ("cur_iter", "last_overflow_iter")), fact
            assert fact["middle"]["cur_scale"] != fact["first"]["cur_scale"], fact
            assert fact["loaded"], case
            assert not fact["without the scaler"], case
            assert not fact["without Adam's step"], case
